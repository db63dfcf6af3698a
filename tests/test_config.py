import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from solov2_jax import config as configs

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "configs" / "base.py")


def test_loads_a_file_and_applies_overrides_of_every_type():
    config = configs.load_config(
        BASE,
        [
            "--config.train.steps=100",
            "--config.optim.learning_rate=1",
            "--config.optim.milestones=(10, 20)",
            "--config.data.keep_empty=False",
            "--config.init_from=weights.npz",
            "--config.train.steps=200",
        ],
    )
    assert config.train.steps == 200
    assert config.optim.learning_rate == 1.0
    assert config.optim.milestones == (10, 20)
    assert config.data.keep_empty is False
    assert config.init_from == "weights.npz"
    assert config.is_locked


def test_split_overrides_takes_both_forms():
    argv = [
        "train.py",
        "--workdir=w",
        "--config=c",
        "--config.a.b=1",
        "--config.c",
        "2",
    ]
    rest, overrides = configs.split_overrides(argv)
    assert rest == ["train.py", "--workdir=w", "--config=c"]
    assert overrides == ["--config.a.b=1", "--config.c=2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lerning_rate=1", "did you mean optim.learning_rate?"),
        ("learning_rate=1", "did you mean optim.learning_rate?"),
        ("train.step=1", "did you mean train.steps?"),
        ("model.depth=18", "did you mean model.backbone.depth?"),
        ("optim=1", "is a group of keys"),
        ("train.steps=many", "--config.train.steps=many"),
        ("train.batch_size=0", "train.batch_size = 0 must be at least 1"),
        ("model.dtype=float16", "must be one of ('float32', 'bfloat16')"),
        ("optim.milestones=(20, 10)", "must increase"),
        ("optim.milestones=abc", "whole numbers"),
        ("model.ins_head.num_grids=(40, 36)", "must have 5 entries, and has 2"),
    ],
)
def test_a_bad_override_is_one_clear_error(override, message):
    with pytest.raises(ValueError) as error:
        configs.load_config(BASE, [f"--config.{override}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="no such file; in .* there are .*base.py"):
        configs.load_config(str(ROOT / "configs" / "r50_9x.py"))
    with pytest.raises(ValueError, match="no such file"):
        configs.load_config(str(tmp_path / "x.py"))


def test_a_key_that_base_does_not_have_is_an_error(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.optim.lerning_rate = 0.1\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match="mine.py.*learning_rate"):
        configs.load_config(str(file))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "get_config"),
        ("def get_config(): return 3", "no ConfigDict"),
        ("def get_config(:", "invalid syntax"),
        ("import nothing_like_this", "nothing_like_this"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=message):
        configs.load_config(str(file))


def test_json_round_trip_keeps_every_value_and_type(tmp_path):
    config = base.get_config()
    configs.save_config(config, tmp_path / "config.json")
    again = configs.load_config(str(tmp_path / "config.json"))
    assert again.to_dict() == config.to_dict()
    assert configs.changed_keys(config, again) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_changed_keys():
    a, b = base.get_config(), base.get_config()
    b.train.steps = 5
    changed = configs.changed_keys(a, b)
    assert changed == {"train.steps": (270_000, 5)}


def test_a_broken_json_is_one_clear_error(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"seed": ')
    with pytest.raises(ValueError, match="config.json: cannot be read as a config.json"):
        configs.read_config(file)
    file.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="no JSON object"):
        configs.read_config(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nothing.py"], "no such file"),
        (["--config=configs/base.py", "--config.train.step=1"], "train.steps?"),
        (["--config=configs/base.py", "--work=1"], "unknown flag --work; did you mean --workdir?"),
        (["--config=configs/base.py", "extra"], "unknown argument 'extra'"),
    ],
)
def test_train_py_prints_one_line_and_exits_with_2(tmp_path, arguments, message):
    command = [sys.executable, "train.py", f"--workdir={tmp_path}/run", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_variants_of_the_zoo_are_networks_with_their_publishers_figures():
    from configs import zoo

    assert len(zoo.VARIANTS) > 25
    for name, variant in zoo.VARIANTS.items():
        config = configs.load_config(f"configs/zoo.py:{name}")
        flat = configs.flatten(config)
        assert all(flat[key] == value for key, value in variant.keys.items()), name
        assert variant.ap is None or 29 < variant.ap < 43
    assert configs.load_config("zoo:mmdet_x101_dcn").model.backbone.groups == 64


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("configs/zoo.py", "no variant ''.*zoo.py:NAME with one of adelaidet_r50"),
        ("configs/zoo.py:r101", "no variant 'r101'"),
        ("configs/r50_3x.py:x", r"takes no variant, 'x' is given"),
        ("configs/none.py:x", "none.py: no such file"),
        ("configs/zoo.py:", "no such file"),
    ],
)
def test_variants_that_are_not_there(path, message):
    with pytest.raises(ValueError, match=message):
        configs.load_config(path)


@pytest.mark.parametrize(
    "name",
    sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "zoo")),
)
def test_every_shipped_config_is_valid(name):
    config = configs.load_config(name)
    assert len(config.model.ins_head.num_grids) == len(config.targets.scale_ranges)
