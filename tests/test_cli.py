"""What commands share, run as commands."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import solov2_jax
from solov2_jax.config_schema import several, share, switch, text
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, env, flags, shared, solov2

ROOT = Path(__file__).resolve().parent.parent
COMMAND = """
import os, sys
from solov2_jax.tools.cli import app

def main(overrides):
    started = open("/proc/self/environ").read().split("\\0")
    for place in (started, [f"{k}={v}" for k, v in os.environ.items()]):
        print([x for x in place if x.startswith("MALLOC_ARENA_MAX")])
    print(overrides)

if __name__ == "__main__":
    app.run(main, ())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    "arguments, given, started, inherited",
    [
        ([], {}, ["MALLOC_ARENA_MAX=4"], []),
        (["--nokeep_memory"], {}, [], []),
        ([], {"MALLOC_ARENA_MAX": "7"}, ["MALLOC_ARENA_MAX=7"], ["MALLOC_ARENA_MAX=7"]),
    ],
)
def test_a_command_starts_anew_with_the_allocators_settings(
    tmp_path, arguments, given, started, inherited
):
    """And keeps them from its children. What the user set stays, for both."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(script), "--config.seed=3", *arguments],
        env={**clean, **given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    want = [str(started), str(inherited), str(["--config.seed=3"])]
    assert done.stdout.splitlines() == want


HEAVY = ("jax", "flax", "tensorflow", "matplotlib", "scipy", "orbax", "grain")


@pytest.mark.parametrize("command", solov2.COMMANDS)
def test_the_help_has_two_examples_and_the_flags_and_imports_nothing_heavy(command):
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['solov2', {command!r}, '--help']\n"
        "runpy.run_module('solov2_jax', run_name='__main__')\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *text, heavy = done.stdout.strip().splitlines()
    assert heavy == "[]"
    examples = [line for line in text if line.startswith(f"    solov2 {command}")]
    assert len(examples) >= 2
    assert "Flags:" in text and "  --[no]debug" in text
    assert max(map(len, text)) <= 100


def test_every_command_has_its_names():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["solov2"] == "solov2_jax.tools.cli.solov2:main"
    for name in ("train", "evaluate", "predict", "export", "convert", "serve"):
        assert scripts[f"solov2-{name}"] == solov2.COMMANDS[name][0]
        assert (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("words", "code", "out"),
    [
        ([], 0, "summary"),
        (["--help"], 0, "doctor"),
        (["--version"], 0, solov2_jax.__version__),
        (["trian"], 2, "unknown command 'trian'; did you mean train?"),
        (["train", "--config"], 2, "--config: expected one argument"),
        (["train", "--config=quickstart"], 2, "--workdir is missing"),
        (["import", "coco"], 2, "give a format first, one of yolo, labelme, voc, masks"),
        (["import", "yolo", "--void=3", "--output=x"], 2, "--void is not for yolo"),
        (["tfds", "--config.seed=1"], 2, "--name is missing"),
        (["summary", "--config=r50_3x", "--depth=nan"], 2, "--depth=nan must be a whole number"),
        (["predict", "--input=x", "--output=y", "--score=nan"], 2, "--score=nan must be finite"),
    ],
)
def test_the_dispatcher(monkeypatch, capsys, words, code, out):
    monkeypatch.setattr(sys, "argv", ["solov2", *words])
    try:
        solov2.main()
    except SystemExit as stopped:
        assert stopped.code == code
    else:
        assert code == 0
    printed = capsys.readouterr()
    assert out in (printed.err if code else printed.out)
    assert not code or re.fullmatch("error: .*\n", printed.err)


def flags_of(command):
    module, _, _ = solov2.COMMANDS[command][0].partition(":")
    return importlib.import_module(module).FLAGS


ALL_FLAGS = [(command, flag) for command in solov2.COMMANDS for flag in flags_of(command)]
NUMERIC = [(c, f) for c, f in ALL_FLAGS if f.rule.kind in (int, float)]


def parsed(flag, *words):
    flags.parse([flag], words)
    return flag.value


@pytest.mark.parametrize(("command", "flag"), NUMERIC, ids=lambda x: getattr(x, "name", x))
def test_no_numeric_flag_takes_nonsense(command, flag):
    for word in ("nan", "inf", "-inf", "-1", "-0.5", "1e30", str(10**30), "x", "", "()", "None"):
        with pytest.raises(InputError, match=f"--{flag.name}=.* must "):
            flags.parse([flag], [f"--{flag.name}={word}"])


@pytest.mark.parametrize(("command", "flag"), ALL_FLAGS, ids=lambda x: getattr(x, "name", x))
def test_every_flag_has_a_help_and_a_possible_default(command, flag):
    assert flag.help.endswith(".") or "commas." in flag.help
    if not flag.rule.choices and flag.rule.kind is not bool and flag.default is not None:
        assert not flag.rule.error(flag.default)
    assert flag.lines().startswith(f"  --{'[no]' * (flag.rule.kind is bool)}{flag.name}")


def test_the_spellings_of_a_value():
    score, track = flags.Flag("score", share(0.3), "x."), flags.Flag("track", switch(False), "x.")
    assert parsed(score) == 0.3 and not score.present
    for words in (["--score=0.5"], ["--score", "0.5"], ["-score=0.5"], ["-score", "0.5"]):
        assert parsed(score, *words) == 0.5 and score.present
    assert parsed(score, "--score=0.5", "--score=0.7") == 0.7
    for words in (["--track"], ["-track"], ["--track=true"], ["--track=1"]):
        assert parsed(track, *words) is True
    for words in ([], ["--notrack"], ["--track=false"], ["--track", "--notrack"]):
        assert parsed(track, *words) is False
    names = flags.Flag("names", several((), text()), "x.")
    assert parsed(names, "--names=a, b,") == ("a", "b")
    expect = flags.Flag("expect", several((), text()), "x.", repeated=True)
    assert parsed(expect, "--expect=a,b", "--expect", "c") == ["a,b", "c"]
    for words in (["--notrack=true"], ["--track=maybe"], ["--no"], ["--trac"], ["x"]):
        with pytest.raises(InputError):
            parsed(track, *words)


def test_overrides_of_the_config_pass_through():
    score = flags.Flag("score", share(0.3), "x.")
    words = ["--config.a.b=1", "--score", "0.5", "-config.c", "2"]
    assert flags.parse([score], words) == ["--config.a.b=1", "--config.c=2"]


def test_env_is_a_report(capsys, monkeypatch):
    monkeypatch.setenv("JAX_SECRET_TOKEN", "hush")
    monkeypatch.setenv("JAX_TESTED", "yes")
    app.run(
        env.main,
        env.FLAGS,
        argv=["--config=quickstart", "--config.train.steps=7"],
        platform=False,
    )
    out = capsys.readouterr().out
    for part in ("Python 3.", "jax 0.", "devices: cpu:0", "JAX_TESTED=yes", "train.steps = 7"):
        assert part in out
    assert "data.name = 'shapes'" in out and "optim.gamma" not in out and "hush" not in out


@pytest.mark.parametrize(
    "key", ["optim.gamma=0.5", "train.steps=3", "seed=1", "loss.dice_weight=1"]
)
def test_keys_of_training_are_refused_where_nothing_trains(monkeypatch, key):
    monkeypatch.setattr(shared.WORKDIR, "value", "nowhere")
    with pytest.raises(InputError, match=f"--config.{key} has no effect: .* does not train"):
        shared.load_predictor([f"--config.{key}"])
