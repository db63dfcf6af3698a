"""A study: its levers and folds, what may change when it goes on, its judge and its table."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import toy
from tiny_coco import annotation, content, write

from configs import base
from solov2_jax.config import load_config
from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError, write_json
from solov2_jax.tools.cli import study as command
from solov2_jax.tools.study import design as designs
from solov2_jax.tools.study import pace
from solov2_jax.tools.study.table import collect, format_table, write_table
from solov2_jax.tools.study.trial import OUTCOME, Judge, trial_folder
from solov2_jax.training import loop
from solov2_jax.training.hooks import Run
from solov2_jax.weights.convert import save_weights


def make_design(*levers, seeds=2, folds=1, **changes):
    values = {"hopeless": 0.5, "judge_from": 0.25} | changes
    return designs.Design(levers=designs.parse_levers(levers), seeds=seeds, folds=folds, **values)


def test_levers_have_names_and_keys():
    plain, paste, decay = designs.parse_levers(
        ["copy & paste: augment.paste_prob=0.5 augment.stop_last=0.1", "optim.layer_decay=0.8"]
    )
    assert plain == designs.Lever("plain", ()) and plain.folder == "plain"
    assert paste.overrides == (
        "--config.augment.paste_prob=0.5",
        "--config.augment.stop_last=0.1",
    )
    assert (paste.name, paste.folder) == ("copy & paste", "copy_paste")
    assert decay.folder == "optim.layer_decay=0.8"
    (_, long) = designs.parse_levers(["ü" * 300 + ": augment.paste_prob=0.5"])
    assert len(long.folder.encode()) == 200
    (_, quoted) = designs.parse_levers(["scale: 'augment.scale=(0.5, 2.0)'"])
    assert quoted.overrides == ("--config.augment.scale=(0.5, 2.0)",)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optim.layer_decay"], "write key=value"),
        (["x: "], "write key=value"),
        (["a: b='1"], "close the quotes"),
        (["a: seed=1", "a: seed=2"], "two levers have this name"),
        (["plain: optim.gamma=0.2"], "the recipe is called plain"),
    ],
)
def test_a_lever_that_is_none_is_an_error(texts, message):
    with pytest.raises(InputError, match=message):
        designs.parse_levers(texts)


@pytest.mark.parametrize(
    ("lever", "message"),
    [
        ("optim.layer_decai=0.8", "did you mean optim.layer_decay"),
        ("optim.layer_decay=2", "optim.layer_decay"),
        ("optim.final_rate=0.1", "has no effect"),
        ("seed=3", "is the same for all runs"),
        ("data.train.images=x", "is the same for all runs"),
    ],
)
def test_a_lever_that_the_recipe_does_not_take_is_an_error(lever, message):
    levers = designs.parse_levers(["augment.paste_prob=0.5", lever])
    with pytest.raises(InputError, match=message) as error:
        designs.check_levers(levers, base.get_config())
    assert str(error.value).startswith(f"--lever {lever}")


def test_a_lever_s_weights_bring_their_convention(tmp_path):
    config = load_config("quickstart")
    path = str(tmp_path / "w.safetensors")
    leaves = {"params/backbone/stem/conv/kernel": np.zeros((7, 7, 3, 64), np.float32)}
    save_weights(path, leaves, {"input.channel_order": "RGB", "input.mean": [1.0, 2.0, 3.0]})
    _, own, kept = designs.parse_levers(
        [f"own: init_from={path}", f"kept: init_from={path} input.mean=(4,5,6)"]
    )
    for lever, mean in ((own, (1, 2, 3)), (kept, (4, 5, 6))):
        changed = load_config("quickstart", lever.overrides)
        designs.adopt_weights(changed, lever)
        assert changed.input.channel_order == "RGB" and tuple(changed.input.mean) == mean
    designs.adopt_weights(config, designs.Lever("x", ("--config.optim.gamma=0.5",)))
    assert config.input.channel_order == "BGR"


def test_levers_and_seeds_may_be_added_and_nothing_else(tmp_path):
    config = base.get_config()
    first = make_design("a: augment.paste_prob=0.5")
    designs.keep_design(tmp_path, first, config)
    assert designs.read_design(tmp_path) == first
    more = make_design("a: augment.paste_prob=0.5", "b: optim.layer_decay=0.8", seeds=3)
    designs.keep_design(tmp_path, more, config)
    assert len(designs.read_design(tmp_path).trials()) == 9
    assert more.trial("b/seed2_fold0").seed == 2
    with pytest.raises(InputError, match="no such run; it has plain/seed0_fold0"):
        more.trial("c/seed0_fold0")
    for changed, message in (
        (make_design("a: augment.paste_prob=0.6"), "the lever a was begun with"),
        (dataclasses.replace(first, folds=3), "begun with --folds 1"),
    ):
        with pytest.raises(InputError, match=message):
            designs.keep_design(tmp_path, changed, config)
    for part in ("train", "val"):
        config.data[part].annotations = str(tmp_path / f"{part}.json")
        (tmp_path / f"{part}.json").write_text("{}")
    designs.keep_design(tmp_path / "data", first, config)
    assert designs.read_design(tmp_path / "data").data
    designs.keep_design(tmp_path / "data", more, config, "(only of folds)")
    (tmp_path / "val.json").write_text("[]")
    with pytest.raises(InputError, match="annotations of its data.* have changed"):
        designs.keep_design(tmp_path / "data", first, config)
    config = base.get_config()
    config.optim.momentum = 0.8
    with pytest.raises(InputError, match="begun with optim.momentum = 0.9, not 0.8"):
        designs.keep_design(tmp_path, first, config)
    with pytest.raises(InputError, match="is no study's folder"):
        designs.read_design(tmp_path / "other")


def test_folds_part_all_images_and_groups_stay_together(tmp_path):
    values = content()
    for i in range(5):  # the same picture is many
        values["images"].append(
            {"id": 20 + i, "file_name": f"p{i // 2}_{i}.png", "height": 48, "width": 64}
        )
        values["annotations"].append(annotation(50 + i, 20 + i, 5))
    images, json_file = write(tmp_path / "train", values)
    for i in range(5):
        (tmp_path / "train" / "images" / f"p{i // 2}_{i}.png").write_bytes(
            (tmp_path / "train" / "images" / "a.png").read_bytes()
        )
    val_images, val_json = write(tmp_path / "val")
    config = base.get_config()
    config.data.train.images, config.data.train.annotations = images, json_file
    config.data.val.images, config.data.val.annotations = val_images, val_json
    study = tmp_path / "study"
    designs.write_folds(study, config, 3, r"^(p\d)_")
    trials = make_design(folds=3, seeds=1).trials()
    seen, number = [], None
    for trial in trials:
        keys = dict(
            o.removeprefix("--config.").split("=", 1)
            for o in designs.fold_overrides(study, trial, 3)
        )
        train = load_coco(keys["data.train.images"], keys["data.train.annotations"])
        val = load_coco(keys["data.val.images"], keys["data.val.annotations"])
        names = set(train.file_names.tolist()), set(val.file_names.tolist())
        assert not names[0] & names[1] and len(names[0] | names[1]) == 11
        groups = [{n.split("/")[-1][:2] for n in part if "/p" in n} for part in names]
        assert not groups[0] & groups[1]
        assert number in (None, len(train.labels) + len(val.labels))
        number = len(train.labels) + len(val.labels)
        seen += val.file_names.tolist()
    assert number == 11 and sorted(seen) == sorted(set(seen)) and len(seen) == 11
    before = [p.read_bytes() for p in sorted(study.rglob("*.json"))]
    designs.write_folds(study, config, 3, r"^(p\d)_")
    assert [p.read_bytes() for p in sorted(study.rglob("*.json"))] == before
    with pytest.raises(InputError, match="--folds 12: there are only 9 groups"):
        designs.write_folds(study, config, 12, r"^(p\d)_")


def write_lines(folder, values):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": s, "segm/AP": v, "study/seconds": s * 2.0}) for s, v in values]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def fake_run(step, total=100):
    run = object.__new__(Run)  # what a judge looks at, and no state
    run.step = run.results_step = step
    run.total_steps, run.stop, run.scalars = total, "", {}
    return run


@pytest.mark.parametrize(
    ("values", "step", "stops"),
    [
        ([(10, 0.0)], 10, False),  # too early
        ([(10, 0.0), (30, 0.05)], 30, True),
        ([(10, 0.2), (30, 0.05)], 30, False),  # the best so far counts
        ([(10, 0.0), (30, 0.2)], 30, False),
        ([(30, None)], 30, True),
        ([(100, 0.0)], 100, False),  # it is at its end anyway
    ],
)
def test_a_hopeless_run_ends(tmp_path, values, step, stops):
    write_lines(tmp_path / "plain", [(10, 0.1), (30, 0.3), (60, 0.9)])
    write_lines(tmp_path / "own", values)
    judge = Judge(tmp_path / "own", tmp_path / "plain", metric="segm/AP", share=0.5, start=0.25)
    run = fake_run(step)
    judge.before_train(run)  # as after a resume
    assert bool(run.stop) == stops, run.stop
    judge.after_step(run)
    assert run.scalars["study/seconds"] >= 2.0 * step
    free = fake_run(step)
    Judge(tmp_path / "own", None, metric="segm/AP", share=0.5, start=0.25).before_train(free)
    assert not free.stop


def test_the_table_has_means_spreads_and_gains_in_pairs(tmp_path):
    design = make_design("a: augment.paste_prob=0.5", "b | c: optim.layer_decay=0.8", seeds=3)
    values = {"plain": (0.1, 0.2, 0.3), "a": (0.2, 0.3, None), "b_c": (None, 0.1, None)}
    for trial in design.trials():
        if (value := values[trial.lever.folder][trial.seed]) is not None:
            folder = trial_folder(tmp_path, trial)
            folder.mkdir(parents=True)
            metrics = {"segm/AP": value}
            write_json({"step": 5, "metrics": metrics, "seconds": 10.0}, folder / OUTCOME)
    failed = {"a/seed2_fold0": "out of memory"}
    results = collect(tmp_path, design, "segm/AP", failed)
    plain, a, b = results["rows"]
    assert plain["mean"] == pytest.approx(0.2) and plain["spread"] == pytest.approx(0.1)
    assert plain["gain"] is None and plain["seconds"] == 10
    assert a["gain"] == pytest.approx(0.1) and a["gain_spread"] == pytest.approx(0, abs=1e-9)
    assert (a["finished"], a["runs"]) == (2, 3)
    assert b["gain"] == pytest.approx(-0.1) and b["gain_spread"] is None
    table = format_table(results)
    assert "| a | 2 of 3 | 0.2500 ± 0.0707 | +0.1000 ± 0.0000 | 10 |" in table
    assert "| b \\| c | 1 of 3 | 0.1000 | -0.1000 | 10 |" in table
    assert "a/seed2_fold0 failed: out of memory" in table
    write_table(tmp_path, results)
    assert json.loads((tmp_path / "study.json").read_text())["rows"] == results["rows"]
    assert (tmp_path / "study.md").read_text() == table


def test_runs_of_equal_time_have_as_many_steps_as_their_pace_allows(tmp_path, monkeypatch):
    trained = []

    def train(config, folder, hooks):
        trained.append(folder.name)
        assert config.train.steps == 64 and not config.train.eval_every
        return loop.train(config, folder, toy.toy_task, hooks=hooks)

    monkeypatch.setattr(pace, "train", train)
    config = toy.toy_config()
    seconds = pace.step_seconds(tmp_path, "a", config)
    assert 0 < seconds < 1 and trained == ["a"]
    assert pace.step_seconds(tmp_path, "a", config) == seconds and trained == ["a"]
    assert [p.name for p in (tmp_path / "paces").iterdir()] == ["a.json"]
    (tmp_path / "paces" / "a.json").write_text("{}")
    with pytest.raises(InputError, match="a.json.*Delete it"):
        pace.step_seconds(tmp_path, "a", config)

    longer = load_config("quickstart", pace.lengthened(load_config("quickstart"), 1.5))
    assert longer.train.steps == 1350 and longer.optim.milestones == (975, 1230)
    assert longer.optim.warmup_steps == 50
    shorter = load_config("finetune", pace.lengthened(load_config("finetune"), 0.5))
    assert shorter.train.epochs == load_config("finetune").train.epochs / 2

    levers = designs.parse_levers(["longer: train.steps=2000"])
    with pytest.raises(InputError, match="longer: train.steps .* follows from --equal_time"):
        designs.check_levers(levers, load_config("quickstart"), equal_time=True)
    designs.check_levers(levers, load_config("quickstart"))
    design = make_design(equal_time=True)
    designs.keep_design(tmp_path, design, base.get_config())
    with pytest.raises(InputError, match="was begun with --equal_time"):
        designs.keep_design(tmp_path, make_design(), base.get_config())
    table = format_table(collect(tmp_path, design, "segm/AP", {}))
    assert "| seconds a run | steps |" in table and "| plain | 0 of 2 |  |  |  |  |" in table


def fail(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["solov2 study", *map(str, arguments)])
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # no new start
    with pytest.raises(SystemExit) as stop:
        command.run()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, capsys, monkeypatch):
    study = tmp_path / "study"
    place = ["--workdir", study]
    said = fail(capsys, monkeypatch, *place)
    assert "--config is missing, or --data" in said
    said = fail(capsys, monkeypatch, *place, "--config=quickstart", "--lever=optim.gama=1")
    assert "--lever optim.gama=1" in said
    said = fail(capsys, monkeypatch, *place, "--config=/nowhere.py")
    assert "/nowhere.py" in said
    said = fail(capsys, monkeypatch, *place, "--only=plain/seed0_fold0")
    assert "is no study's folder" in said
    said = fail(capsys, monkeypatch, *place, "--only=plain/seed0_fold0", "--seeds=2")
    assert "--seeds does not go with --only" in said
    said = fail(
        capsys, monkeypatch, *place, "--config=quickstart", "--config.train.batch_size=auto"
    )
    assert "train.batch_size = auto" in said
    for key, message in (("distill_from", "no such folder"), ("init_from", "/nowhere")):
        lever = f"--lever=other: {key}=/nowhere"
        said = fail(capsys, monkeypatch, *place, "--config=quickstart", lever)
        assert "--lever other: " in said and key in said and message in said
    images, annotations = write(tmp_path)
    data = {"name": "", "train.images": images, "train.annotations": annotations}
    data |= {"val.images": images, "val.annotations": annotations}
    keys = [f"--config.data.{key}={value}" for key, value in data.items()]
    said = fail(capsys, monkeypatch, *place, "--config=quickstart", "--folds=99", *keys)
    assert "--folds 99: there are only" in said
    assert not study.exists()


def test_a_run_gets_the_study_s_signal_and_not_the_terminal_s_too(tmp_path, monkeypatch):
    """A second signal ends a run at once, and Ctrl-C goes to a whole group of processes."""
    python = tmp_path / "python"
    lines = "import os, sys", "print(os.getpgid(0), os.getpid(), file=sys.stderr)", "sys.exit(1)"
    python.write_text("\n".join([f"#!{sys.executable}", *lines]))
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    with command._stopping() as child:
        assert child.run(tmp_path, "plain/seed0_fold0")
    group, process = said.getvalue().split()
    assert group == process
