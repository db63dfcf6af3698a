"""From files to variables: what is filled, what is refused, what travels along."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import (
    p_dict,
    p_int,
    p_list,
    p_str,
    p_tensor,
    p_tuple,
    small_state,
    state_pickle,
    write_state,
    write_zip,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_weights import from_adelaidet
from test_weights_names import mmdet_name

from configs import base
from solov2_jax.checkpoint import CheckpointManager, read_run
from solov2_jax.config import load_config
from solov2_jax.training.step import TrainState
from solov2_jax.training.workdir import describe_run
from solov2_jax.weights import tables
from solov2_jax.weights.array_files import write_safetensors
from solov2_jax.weights.convert import (
    fit,
    network_shapes,
    report_of,
    save_weights,
)
from solov2_jax.weights.settings import check_settings, parse_setting
from solov2_jax.weights.sources import read_weights, sha256_of

ROOT = Path(__file__).resolve().parent.parent


def variables_of(state, fill=0.5):
    """Returns our variables of a reference state dict's shapes, all `fill`."""
    flat = from_adelaidet(state)
    return unflatten_dict({n: np.full(a.shape, fill, np.float32) for n, a in flat.items()}, sep="/")


def load_weights(path, variables, config=None, **options):
    """Returns what `fit` does, of a file; checked against a config where one is given."""
    weights = read_weights(path)
    if config is not None:
        check_settings(weights.settings, config, path)
    return fit(weights, variables, **options)


def renamed(state):
    return {mmdet_name(key): value for key, value in state.items()}


def config_of(depth=50):
    """Returns a config of the 16 times narrower network of `small_state`."""
    config = base.get_config()
    config.model.backbone.depth = depth
    config.model.fpn.channels = 16
    config.model.ins_head.channels = 32
    config.model.ins_head.num_kernels = 16
    config.model.mask_head.channels = 8
    return config


def write_mmdet(path, state, meta):
    model, storages = state_pickle(renamed(state))
    return write_zip(path, p_dict({"meta": meta, "state_dict": model}), storages)


@pytest.mark.parametrize("model", ["r18", "r50", "r101", "r50_light"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip_through_files_is_bit_exact(tmp_path, model, suffix):
    state = small_state(model)
    start = write_state(tmp_path / "start.pth", state)
    weights = read_weights(start)
    ours = str(tmp_path / f"ours{suffix}")
    save_weights(ours, weights.flat, weights.settings)
    again = read_weights(ours)
    assert again.settings == weights.settings
    loaded, report = fit(again, variables_of(state), strict=True)
    assert not report.new
    back = tables.to_adelaidet(flatten_dict(loaded, sep="/"))
    assert sorted(back) == sorted(state)
    for key, value in state.items():
        assert back[key].dtype == np.float32 and np.array_equal(back[key], value)


def test_every_tensor_and_every_leaf_is_accounted_for(tmp_path):
    state = small_state("r50")
    backbone = {k: v for k, v in state.items() if "bottom_up" in k}
    theirs = {k.removeprefix("backbone."): v for k, v in renamed(backbone).items()}
    theirs["fc.weight"] = theirs["surprise"] = np.zeros(3, np.float32)
    path = write_state(tmp_path / "resnet50.pth", theirs, optimizer=p_dict({}))
    variables = variables_of(state)
    loaded, report = load_weights(path, variables)
    assert report.source == "torchvision"
    assert dict(report.dropped) == {
        "fc.weight": "ImageNet classifier, not used",
        "surprise": "no rule for this name",
        "optimizer": "optimiser state",
    }
    leaves = {name for name in flatten_dict(variables, sep="/")}
    assert set(report.loaded) | set(report.new) == leaves
    assert not set(report.loaded) & set(report.new)
    assert len(theirs) == len(report.loaded) + 2
    flat = flatten_dict(loaded, sep="/")
    want = from_adelaidet(state)
    for leaf in report.loaded:
        assert np.array_equal(flat[leaf], want[leaf])
    for leaf in report.new:
        assert (flat[leaf] == 0.5).all()
    text = report.summary()
    assert "265 leaves loaded, 68 newly initialised, 3 tensors not used" in text
    assert "ins_head/cate_pred (2)" in text and "surprise" in text
    assert json.loads(json.dumps(report.to_dict()))["sha256"] == sha256_of(path)


def test_another_number_of_classes_keeps_all_but_the_class_layer(tmp_path, caplog):
    state = small_state("r50")
    path = write_state(tmp_path / "coco.pth", state)
    one_class = dict(state)
    for key in ("ins_head.cate_pred.weight", "ins_head.cate_pred.bias"):
        one_class[key] = state[key][:1]
    variables = variables_of(one_class)
    with caplog.at_level(logging.INFO):
        loaded, report = load_weights(path, variables, config=config_of())
    assert report.new == (
        "params/ins_head/cate_pred/kernel",
        "params/ins_head/cate_pred/bias",
    )
    assert dict(report.dropped) == {
        "params/ins_head/cate_pred/kernel": "class layer of 5 classes",
        "params/ins_head/cate_pred/bias": "class layer of 5 classes",
    }
    assert (loaded["params"]["ins_head"]["cate_pred"]["bias"] == 0.5).all()
    assert "331 leaves loaded, 2 newly initialised" in caplog.text
    assert "newly initialised: ins_head/cate_pred (2)" in caplog.text
    with pytest.raises(ValueError, match="cate_pred/kernel is .*, the network's"):
        load_weights(path, variables, strict=True)


def test_mismatches_are_reported_together(tmp_path):
    path = write_state(tmp_path / "x.pth", small_state("r50"))
    variables = variables_of(small_state("r50", divide=8))
    with pytest.raises(ValueError) as error:
        load_weights(path, variables)
    message = str(error.value)
    assert "tensors do not fit the network" in message
    assert "params/backbone/stem/conv1/kernel is (7, 7, 3, 4)" in message
    assert "331 tensors do not fit" in message and message.count("the network's") == 20


def test_another_depth_is_named(tmp_path):
    path = write_state(tmp_path / "x.pth", small_state("r50"))
    with pytest.raises(ValueError, match=r"ResNet-50, the network is a ResNet-101"):
        load_weights(path, variables_of(small_state("r101")))


def test_a_missing_tensor_is_newly_initialised_and_strict_refuses(tmp_path, caplog):
    state = small_state("r18")
    variables = variables_of(state)
    del state["backbone.bottom_up.res3.0.shortcut.weight"]
    path = write_state(tmp_path / "x.pth", state)
    _, report = load_weights(path, variables)
    assert report.new == ("params/backbone/res3_0/shortcut/kernel",)
    assert "1 leaves of backbone are missing" in caplog.text
    with pytest.raises(ValueError, match="lacks .*res3_0/shortcut/kernel"):
        load_weights(path, variables, strict=True)
    path = write_state(tmp_path / "y.pth", {**small_state("r18"), "new": np.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown tensors \[new\]"):
        load_weights(path, variables, strict=True)


def test_shapes_alone_suffice_when_everything_is_filled(tmp_path):
    state = small_state("r18")
    shapes = unflatten_dict(
        {
            name: SimpleNamespace(shape=leaf.shape, dtype=np.dtype("f4"))
            for name, leaf in flatten_dict(variables_of(state), sep="/").items()
        },
        sep="/",
    )
    path = write_state(tmp_path / "x.pth", state)
    loaded, _ = load_weights(path, shapes, strict=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in flatten_dict(loaded, sep="/").values())
    backbone = {k: v for k, v in state.items() if "bottom_up" in k}
    path = write_state(tmp_path / "y.pth", backbone)
    with pytest.raises(ValueError, match="pass `init`"):
        load_weights(path, shapes)
    drawn = flatten_dict(variables_of(state, 0.25), sep="/")
    asked = []

    def init(leaves):
        asked.extend(leaves)
        return {leaf: drawn[leaf] for leaf in leaves}

    loaded, _ = load_weights(path, shapes, init=init)
    assert (loaded["params"]["fpn"]["lateral2"]["bias"] == 0.25).all()
    assert asked and not any("backbone" in leaf for leaf in asked)


def test_half_precision_weights_become_float32(tmp_path):
    state = small_state("r18")
    path = str(tmp_path / "x.npz")
    np.savez(path, **{key: value.astype(np.float16) for key, value in state.items()})
    loaded, _ = load_weights(path, variables_of(state), strict=True)
    for leaf, value in from_adelaidet(state).items():
        found = flatten_dict(loaded, sep="/")[leaf]
        assert found.dtype == np.float32
        assert np.array_equal(found, value.astype(np.float16).astype(np.float32))


# ------------------------------------------------------------------ settings


def test_settings_follow_the_source(tmp_path):
    state = small_state("r50")
    adelaidet = read_weights(write_state(tmp_path / "a.pth", state))
    mmdet = read_weights(write_state(tmp_path / "m.pth", renamed(state)))
    assert adelaidet.settings["input.channel_order"] == "BGR"
    assert adelaidet.settings["model.backbone.stride_in_1x1"] is True
    assert mmdet.settings["input.channel_order"] == "RGB"
    assert mmdet.settings["input.std"] == [58.395, 57.12, 57.375]
    assert mmdet.settings["model.backbone.stride_in_1x1"] is False
    for weights in (adelaidet, mmdet):
        assert weights.settings["model.backbone.depth"] == 50
        assert weights.num_classes == 5 and weights.class_names is None
        assert weights.settings["model.backbone.norm"] == "frozen_bn"
        assert weights.settings["norm_eps"] == 1e-5
    basic = read_weights(write_state(tmp_path / "b.pth", renamed(small_state("r18"))))
    assert "model.backbone.stride_in_1x1" not in basic.settings


def test_a_backbone_with_group_norm_is_told_by_its_missing_statistics(tmp_path):
    state = {k: v for k, v in small_state("r50").items() if "running" not in k}
    weights = read_weights(write_state(tmp_path / "x.pth", state))
    assert weights.settings["model.backbone.norm"] == "gn"
    assert tables.to_adelaidet(weights.flat).keys() == state.keys()


def test_mmdetection_tells_its_classes_and_its_config(tmp_path):
    state = small_state("r50")
    text = (
        "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0],"
        " to_rgb=False)\nmodel = dict(backbone=dict(type='ResNet', style='caffe'))\n"
        "a = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"
    )
    classes = p_tuple(*map(p_str, "abcde"))
    meta = p_dict({"CLASSES": classes, "config": p_str(text), "epoch": p_int(12)})
    weights = read_weights(write_mmdet(tmp_path / "x.pth", state, meta))
    assert weights.class_names == tuple("abcde")
    assert weights.settings["input.channel_order"] == "BGR"
    assert weights.settings["input.mean"] == [103.53, 116.28, 123.675]
    assert weights.settings["model.backbone.stride_in_1x1"] is True
    nested = p_dict({"dataset_meta": p_dict({"classes": p_list(*map(p_str, "abcd"))})})
    with pytest.raises(ValueError, match="names 4 classes and has weights for 5"):
        read_weights(write_mmdet(tmp_path / "y.pth", state, nested))


def test_detectron2_tells_its_pixels_and_its_author(tmp_path):
    state = small_state("r50")
    pixels = {
        "pixel_mean": np.array([123.675, 116.28, 103.53], "f4").reshape(3, 1, 1),
        "pixel_std": np.array([58.395, 57.12, 57.375], "f4").reshape(3, 1, 1),
    }
    weights = read_weights(write_state(tmp_path / "a.pth", {**state, **pixels}))
    assert weights.settings["input.mean"] == [123.675, 116.28, 103.53]
    assert weights.settings["input.std"] == [58.395, 57.12, 57.375]
    assert {name for name, _ in weights.dropped} == set(pixels)
    bare = {k.removeprefix("backbone.bottom_up."): v for k, v in state.items() if "bottom_up" in k}
    path = write_state(tmp_path / "b.pth", bare, __author__=p_str("torchvision"))
    assert read_weights(path).settings["input.channel_order"] == "RGB"
    path = write_state(tmp_path / "c.pth", bare)
    assert read_weights(path).settings["input.channel_order"] == "BGR"


def test_class_names_travel(tmp_path):
    state = small_state("r50")
    meta = p_dict({"CLASSES": p_tuple(*map(p_str, "abcde"))})
    weights = read_weights(write_mmdet(tmp_path / "x.pth", state, meta))
    for name in ("y.safetensors", "y.pth"):
        path = str(tmp_path / name)
        save_weights(path, weights.flat, weights.settings)
        assert read_weights(path).class_names == tuple("abcde")
        assert read_weights(path).settings == weights.settings


def test_mmdetections_names_are_written_and_read_again(tmp_path):
    state = small_state("r50")
    weights = read_weights(write_mmdet(tmp_path / "x.pth", state, p_dict({})))
    path = str(tmp_path / "y.pth")
    save_weights(path, weights.flat, weights.settings, "mmdet")
    again = read_weights(path)
    assert again.source == "mmdet" and again.flat.keys() == weights.flat.keys()
    for name, leaf in weights.flat.items():
        np.testing.assert_array_equal(again.flat[name], leaf)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input.channel_order", "RGB"),
        ("input.mean", (123.675, 116.28, 103.53)),
        ("input.std", (58.395, 57.12, 57.375)),
        ("model.backbone.stride_in_1x1", False),
        ("model.backbone.depth", 101),
        ("model.backbone.norm", "gn"),
        ("model.ins_head.num_convs", 2),
        ("model.ins_head.channels", 512),
        ("model.ins_head.num_kernels", 128),
        ("model.mask_head.channels", 64),
        ("model.fpn.channels", 256),
    ],
)
def test_a_config_that_contradicts_is_an_error_that_names_the_key(tmp_path, key, value):
    weights = read_weights(write_state(tmp_path / "x.pth", small_state("r50")))
    config = config_of()
    check_settings(weights.settings, config, weights.path)
    *groups, name = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[name] = value
    with pytest.raises(ValueError, match=rf"x\.pth: .*: {key} is .* in the config, "):
        check_settings(weights.settings, config, weights.path)


def test_contradictions_are_named_together_and_means_have_some_play(tmp_path):
    path = write_state(tmp_path / "x.pth", renamed(small_state("r50")))
    with pytest.raises(ValueError, match="channel_order.*mean.*std.*stride_in_1x1"):
        load_weights(path, variables_of(small_state("r50")), config=config_of())
    config = config_of()
    config.input.mean = (103.939, 116.779, 123.68)  # Caffe's, of the same images
    adelaidet = read_weights(write_state(tmp_path / "y.pth", small_state("r50")))
    check_settings(adelaidet.settings, config, "y.pth")


def test_settings_can_be_corrected(tmp_path):
    path = write_state(tmp_path / "x.pth", small_state("r50"))
    settings = dict(
        map(
            parse_setting,
            ["input.channel_order=RGB", "model.backbone.stride_in_1x1=False"],
        )
    )
    weights = read_weights(path, settings=settings)
    assert weights.settings["input.channel_order"] == "RGB"
    assert weights.settings["model.backbone.stride_in_1x1"] is False
    with pytest.raises(ValueError, match="setting 'input.size' is none of"):
        read_weights(path, settings={"input.size": 3})
    assert parse_setting("input.mean=(1, 2.5, 3)") == ("input.mean", [1, 2.5, 3])
    with pytest.raises(ValueError, match="not of the form KEY=VALUE"):
        parse_setting("input.mean")


def test_settings_that_are_no_settings(tmp_path):
    path = str(tmp_path / "x.safetensors")
    flat = {"params/a": np.zeros(1, np.float32)}
    for text, message in {
        "[1]": "settings are not a JSON object",
        "nonsense": "settings are not JSON",
        "[" * 100_000: "settings are not JSON",
        '{"input.size": 3}': "setting 'input.size' is none of",
        '{"input.mean": []}': r"setting input.mean = \[\] should be like",
        '{"input.mean": ["a", 1, 2]}': "setting input.mean",
        '{"class_names": [[]]}': "setting class_names",
        '{"model.backbone.depth": "50"}': "depth = 50 should be like 50",
    }.items():
        write_safetensors(path, flat, {"solov2_jax": text})
        with pytest.raises(ValueError, match=message):
            read_weights(path)
    save_weights(path, flat, {"norm_eps": 1e-3})
    with pytest.raises(ValueError, match="norm_eps is 1e-05 in the network, 0.001"):
        check_settings(read_weights(path).settings, config_of(), path)


# ---------------------------------------------------------------- the command


def test_checksums(tmp_path):
    path = write_state(tmp_path / "x.pth", small_state("r18"))
    digest = sha256_of(path)
    weights = read_weights(path, sha256=digest.upper())
    assert report_of(weights).sha256 == digest
    assert read_weights(path, sha256=digest[:8]).sha256 == digest
    for wrong in ("00", digest[:7], digest[:-1] + "x", "0" * 64):
        with pytest.raises(ValueError, match=f"sha256 is {digest}, expected {wrong}"):
            read_weights(path, sha256=wrong)


def wide_state():
    """Returns a state dict of an R18 with narrow heads that a config can describe."""
    config = load_config(
        str(ROOT / "configs" / "r50_3x.py"),
        [
            "--config.model.backbone.depth=18",
            "--config.model.fpn.channels=8",
            "--config.model.ins_head.channels=32",
            "--config.model.ins_head.num_kernels=32",
            "--config.model.ins_head.num_convs=1",
            "--config.model.mask_head.channels=32",
        ],
    )
    shapes = flatten_dict(network_shapes(config, 4), sep="/")
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
    return tables.to_adelaidet(flat)


def run(*args):
    return subprocess.run(
        [sys.executable, ROOT / "convert.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_there_and_back(tmp_path):
    state = wide_state()
    start = write_state(tmp_path / "start.pth", state, optimizer=p_dict({}))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    args = ["--config", ROOT / "configs" / "r50_3x.py", "--config.model.fpn.channels=8"]
    args += [f"--config.model.ins_head.{k}=32" for k in ("channels", "num_kernels")]
    args += ["--config.model.mask_head.channels=32", "--config.model.backbone.depth=18"]
    args += ["--config.model.ins_head.num_convs=1"]
    digest = ["--sha256", sha256_of(start)]
    done = run("--input", start, "--output", ours, *args, *digest, "--strict")
    assert done.returncode == 0, done.stderr
    assert f"{len(state)} leaves loaded, 0 newly initialised, 1 tensors" in done.stdout
    assert "torch zip file with adelaidet names" in done.stdout
    assert "(optimiser state): optimizer" in done.stdout
    assert f"sha256 {sha256_of(str(ours))}" in done.stdout
    done = run("--to", "adelaidet", "--input", ours, "--output", back)
    assert done.returncode == 0, done.stderr
    again = read_weights(str(back))
    found = tables.to_adelaidet(again.flat)
    assert all(np.array_equal(found[key], value) for key, value in state.items())


def test_the_command_writes_into_a_folder(tmp_path):
    start = write_state(tmp_path / "start.pth", small_state("r18"))
    done = run("--input", start, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read_weights(str(tmp_path / "out" / "start.safetensors")).num_classes == 3
    report = json.loads((tmp_path / "out/start.safetensors.report.json").read_text())
    assert report["sha256"] == sha256_of(start) and report["loaded"] == 168


def test_a_runs_weights_have_its_settings_and_its_classes(tmp_path):
    state = small_state("r18")
    variables = variables_of(state)
    train_state = TrainState(
        jnp.int32(3), variables["params"], {"batch_stats": variables["batch_stats"]}, ()
    )
    checkpoints = CheckpointManager(tmp_path, keep=1)
    checkpoints.save(3, train_state.parts(), {})
    checkpoints.close()
    config = config_of(18)
    config.input.channel_order = "RGB"
    describe_run(tmp_path, config, ["a", "b", "c"], [1, 2, 3])
    weights = read_run(tmp_path)
    assert weights.path.endswith("(step 3)")
    assert weights.class_names == ("a", "b", "c")
    assert weights.settings["input.channel_order"] == "RGB"
    assert "model.backbone.stride_in_1x1" not in weights.settings
    check_settings(weights.settings, config, weights.path)
    path = str(tmp_path / "model.pth")
    save_weights(path, weights.flat, weights.settings)
    again = read_weights(path)
    assert again.settings == weights.settings and again.source == "adelaidet"
    assert tables.to_adelaidet(again.flat).keys() == state.keys()
    (tmp_path / "classes.json").unlink()
    with pytest.raises(ValueError, match="classes.json: no such file"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "missing.pth", "--output", "x.safetensors"], "no such weights"),
        (["--input", "x.pth", "--output", "y.pth"], "writes .safetensors files"),
        (["--input", "x.pth", "--output", "o", "--strict"], "need a --config"),
        (["--input", ".", "--output", "o"], "no checkpoint"),
        (["--input", ".", "--output", "o", "--source", "mmdet"], "--source is for weights files"),
        (["--input", "x.pth", "--output", "o", "--checkpoint", "3"], "--checkpoint is for folders"),
        (["--input", "missing.pth", "--output", "new/deep/x.safetensors"], "no such weights"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, args, message):
    write_state(tmp_path / "x.pth", {"layer1.0.conv1.weight": np.zeros((1, 1, 1, 1))})
    done = subprocess.run(
        [sys.executable, ROOT / "convert.py", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert os.listdir(tmp_path) == ["x.pth"]  # no folder stays that was made for nothing


def test_old_or_strange_storages_are_refused_by_name(tmp_path):
    tensor = p_tensor("0", "f4", 2, (2,)).replace(b"FloatStorage", b"QInt8Storage")
    path = write_zip(tmp_path / "x.pth", p_dict({"w": tensor}), {"0": bytes(8)})
    with pytest.raises(ValueError, match=r"'torch\.QInt8Storage'"):
        read_weights(path)
