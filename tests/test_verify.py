"""`solov2 verify`: ours beside the original, whose place a stand-in takes here."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_network import tiny_config, tiny_variables

from solov2_jax.io import InputError
from solov2_jax.tools.cli import verify
from solov2_jax.tools.verify import compare, original, ours
from solov2_jax.weights.convert import save_weights
from solov2_jax.weights.settings import settings_of_shapes
from solov2_jax.weights.sources import read_weights

# What an interpreter with the original does, the network aside: it sees the folder.
STAND_IN = """#!{python}
import json, pathlib, shutil, sys
import numpy as np
script, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
case, image = json.loads((folder / "case.json").read_text()), np.load(folder / "image.npy")
assert script.is_file() and case["model"]["backbone"]["depth"] == 18
assert image.dtype == np.float32 and image.shape == (1, 64, 96, 3)
state = np.load(folder / "state.npz")
assert "mask_head.conv_cls.weight" in state.files and "backbone.layer1.0.conv1.weight" in state
{what}
"""


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Returns the path of an mmdetection checkpoint that detects something."""
    config = tiny_config()
    flat = flatten_dict(tiny_variables(config), sep="/")
    path = str(tmp_path_factory.mktemp("verify") / "ünï code.pth")
    save_weights(path, flat, {**settings_of_shapes(flat), "class_names": ["a", "b"]}, "mmdet")
    return path


@pytest.fixture(scope="module")
def computed(weights_file):
    weights = read_weights(weights_file)
    picture = ours.example_picture(64, 96)
    return ours.run_network(ours.config_of(weights), weights, picture)[0]


def stand_in(tmp_path, what):
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, what=what))
    script.chmod(0o755)
    return str(script)


def answer(tmp_path, computed, **changes):
    """Returns an interpreter that answers with what we compute, changed."""
    arrays = {**computed.tensors}
    for part in ours.Detected._fields:
        arrays[f"detected/{part}"] = getattr(computed.detected, part)
    np.savez(tmp_path / "answer.npz", **{**arrays, **changes})
    return stand_in(
        tmp_path, f"shutil.copy({str(tmp_path / 'answer.npz')!r}, folder/'original.npz')"
    )


def run(monkeypatch, *flags):
    """Returns the exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["solov2 verify", "--keep_memory=false", *flags])
    try:
        verify.run()
    except SystemExit as end:
        return end.code
    return 0


def test_the_same_network_is_told_to_be(computed, weights_file, tmp_path, monkeypatch, capsys):
    assert len(computed.detected.scores) > 2
    report = tmp_path / "report.json"
    flags = (f"--input={weights_file}", "--size=64,96", f"--output={report}")
    assert run(monkeypatch, *flags, f"--python={answer(tmp_path, computed)}") == 0
    out = capsys.readouterr().out
    assert "beside mmdetection's SOLOv2" in out and out.endswith("the same, but for rounding\n")
    assert "fpn/p6" in out and "mask IoU" in out
    found = json.loads(report.read_text())
    assert found["wrong"] == [] and found["same_classes"] and found["not_finite"] == []
    assert set(found["tensors"]) >= {"backbone/res5", "fpn/p2", "cate", "kernel", "mask_feat"}
    assert max(found["tensors"].values()) <= 1e-5


def test_differences_are_named_and_exit_with_1(
    computed, weights_file, tmp_path, monkeypatch, capsys
):
    labels, scores, masks = computed.detected
    kernel = computed.tensors["kernel"].copy()
    kernel[0, 0, 0] += 0.1 * kernel.std()
    python = answer(
        tmp_path,
        computed,
        **{"kernel": kernel, "detected/labels": 1 - labels, "detected/scores": scores - 0.01},
    )
    flags = (f"--input={weights_file}", "--size=64,96", f"--python={python}")
    assert run(monkeypatch, *flags) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("DIFFERENT: kernel by 1.0e-01 of its spread; the detections' classes")
    assert "scores by more than" in last


def test_without_the_program_it_says_what_to_install(weights_file, tmp_path, monkeypatch, capsys):
    python = stand_in(
        tmp_path, "print(json.dumps({'missing': 'mmdet is not installed'}));sys.exit(3)"
    )
    flags = (f"--input={weights_file}", "--size=64,96", f"--python={python}")
    assert run(monkeypatch, *flags) == 0
    out = capsys.readouterr().out
    assert "not compared: mmdetection's SOLOv2: mmdet is not installed in" in out
    assert "pip install torch" in out and "0 newly initialised" in out
    assert out.endswith("nothing wrong was found\n") and "pixels" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size=60,96",), "--size 60,96: both sides must be positive multiples of 32"),
        (("--image=nowhere.jpg",), "nowhere.jpg"),
        (("--output=nowhere/x.json",), "--output nowhere/x.json: its folder is not there"),
        (("--config.seed=1",), "--config.seed=1: give the --config"),
        (("--python=nowhere/python", "--size=64,96"), "--python nowhere/python: cannot be started"),
    ],
)
def test_wrong_flags_are_one_line(weights_file, monkeypatch, capsys, flags, message):
    assert run(monkeypatch, f"--input={weights_file}", *flags) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1] and errors[-1].startswith("error: ")


def test_a_program_that_fails_is_an_error_with_its_last_line(weights_file, tmp_path):
    weights = read_weights(weights_file)
    config = ours.config_of(weights)
    python = stand_in(tmp_path, "raise ValueError('its network lacks 3')")
    found = original.find_original(config, weights)
    image = ours.normalised(config, ours.example_picture(64, 96))
    with pytest.raises(InputError, match="failed: ValueError: its network lacks 3"):
        original.run_original(found, config, image, tmp_path, python)


def test_which_program_a_file_is_run_by(weights_file):
    weights = read_weights(weights_file)
    config = ours.config_of(weights)
    found = original.find_original(config, weights)
    assert found.program == "mmdet" and "mask_head.conv_cls.weight" in found.state
    adet = dataclasses.replace(weights, source="adelaidet", path="")
    assert "under the names of our tables" in original.find_original(config, adet).described
    config.model.ins_head.norm = "none"
    reason = original.find_original(config, weights).reason
    assert reason == "mmdetection has no such network: model.ins_head.norm = 'none'"


def test_a_backbone_alone_is_compared_by_its_features(golden, tmp_path):
    from golden_backbones import backbone_weight

    shapes = json.loads(str(golden("backbones")["mobilenet_torchvision_shapes"]))
    state = {name: backbone_weight(name, tuple(shape)) for name, shape in shapes.items()}
    np.savez(tmp_path / "mobile.npz", **state)
    weights = read_weights(str(tmp_path / "mobile.npz"))
    config = ours.config_of(weights)
    assert config.model.backbone.name == "mobilenet_v3_large"
    picture = ours.example_picture(64, 96)
    first, report = ours.run_backbone(config, weights, picture)
    assert set(first.tensors) == {f"backbone/res{i}" for i in (2, 3, 4, 5)}
    assert report.loaded and not ours.not_finite(first)
    assert original.find_original(config, weights).program == "torch"


def test_comparisons_of_other_shapes_and_nan():
    image = np.ones((1, 2, 2, 3), np.float32)
    one = ours.Computed({"cate": image}, None)
    nan = ours.Computed({"cate": np.full_like(image, np.nan)}, None)
    assert compare.compare(one, one).wrong() == []
    assert ours.not_finite(nan) == ["cate"]
    assert compare.compare(one, nan).wrong() and compare.compare(nan, one).wrong()
    with pytest.raises(ValueError, match=r"cate is \(1, 2, 2, 3\) here and None there"):
        compare.compare(one, ours.Computed({}, None))


def test_the_programs_say_what_is_missing(tmp_path):
    """Run by this environment, which has none of them."""
    case = original.case_of(tiny_config())
    runs = functools.partial(original.run_program, case=case, folder=tmp_path)
    for program, package in (("mmdet", "mmcv"), ("torch", "torch"), ("paddle", "paddle")):
        assert runs(program, python=sys.executable) == f"{package} is not installed"
