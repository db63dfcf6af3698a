"""Other backbones than ResNet: against torchvision and timm, and by the contract of all.

The goldens are made by `golden_backbones.py`.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_backbones import (
    DEPTHS,
    SWIN_DEPTHS,
    SWIN_HEADS,
    WIDTHS,
    backbone_weight,
    golden_image,
)
from PIL import Image
from tiny_network import tiny_config, tiny_variables

from configs import base
from solov2_jax import stored
from solov2_jax.config import check_config
from solov2_jax.io import InputError
from solov2_jax.models import build_backbone, build_model
from solov2_jax.models.backbone import LEVELS, check_features
from solov2_jax.models.depthwise import _plain, depthwise_conv2d
from solov2_jax.training.optim import layer_rates, make_optimizer, trainable_mask
from solov2_jax.weights import backbones, convert, names, tables
from solov2_jax.weights.sources import detect_source, read_weights

ROOT = Path(__file__).resolve().parent.parent
# name of the backbone -> (options that make it small, of the goldens; family's golden cases)
SMALL = {
    "convnext_t": (
        {"depths": DEPTHS, "widths": WIDTHS},
        ("convnext_torchvision", "convnext_timm"),
    ),
    "mobilenet_v3_large": ({}, ("mobilenet_torchvision", "mobilenet_timm")),
    "mobilenet_v3_large_paddle": ({}, ("mobilenet_paddle",)),
    "swin_t": (
        {"depths": SWIN_DEPTHS, "heads": SWIN_HEADS, "width": 8},
        ("swin_torchvision", "swin_timm"),
    ),
    "dinov2_s": ({"depth": 4, "width": 32, "heads": 2, "grid": 5}, ("dinov2_timm",)),
}
OF_CASE = {"swin_timm": {"window": 2}}  # further options
# What no classifier has: it ends a backbone's results.
NEW = ("out_ln", "pyramid", "ln_pyramid")
# Published numbers of parameters, without the classifier's norm and layer.
PARAMETERS = {
    "convnext_t": 28_589_128 - 2 * 768 - 769_000,
    "convnext_s": 50_223_688 - 2 * 768 - 769_000,
    # Besides the last convolution and its norm, and two layers.
    "swin_t": 28_288_354 - 2 * 768 - 769_000,
    "swin_s": 49_606_258 - 2 * 768 - 769_000,
    "dinov2_s": 22_056_576 - 384,  # without the token of masked patches
    "mobilenet_v3_large_paddle": 2_970_406,  # of its class, by golden_backbones.py
    "mobilenet_v3_large": 5_483_032 - 160 * 960 - 2 * 960 - 961 * 1280 - 1281 * 1000,
}
CASES = [(name, case) for name, (_, cases) in SMALL.items() for case in cases]


def backbone_config(name, **options):
    config = tiny_config()
    config.model.backbone.name = name
    config.model.backbone.options.update(options)
    return config


def small_backbone(name, **options):
    return build_backbone(backbone_config(name, **SMALL[name][0], **options))


@functools.cache
def shapes_of(backbone, channels=3):
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    return jax.eval_shape(backbone.init, jax.random.key(0), image)


def random_variables(backbone):
    rng = np.random.default_rng(0)

    def values(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("scale", "var", "gamma"):
            return 1 + 0.1 * np.abs(noise)
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
        return noise / np.float32(np.sqrt(fan))

    return jax.tree_util.tree_map_with_path(values, shapes_of(backbone))


def is_new(leaf):
    return leaf.split("/")[1].startswith(NEW)


def golden_state(arrays, case):
    shapes = json.loads(str(arrays[f"{case}_shapes"]))
    return {name: backbone_weight(name, tuple(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_features_are_the_originals(golden, name, case):
    arrays = golden("backbones")
    state = golden_state(arrays, case)
    source = detect_source(state, "pickle")
    table = tables.table_of(source, state)
    flat, rest = names.from_names(table, state)
    assert all(names.drop_reason(table, tensor) for tensor in rest), rest
    backbone = small_backbone(name, **OF_CASE.get(case, {}))
    if any(field.name == "out_norm" for field in dataclasses.fields(backbone)):
        backbone = dataclasses.replace(backbone, out_norm=False)
    of_network = {"/".join(k): v.shape for k, v in flatten_dict(shapes_of(backbone)).items()}
    flat = {leaf.replace("/backbone/", "/"): value for leaf, value in flat.items()}
    new = {leaf: np.zeros(s, np.float32) for leaf, s in of_network.items() if is_new(leaf)}
    flat |= new
    assert {leaf: value.shape for leaf, value in flat.items()} == of_network
    variables = unflatten_dict(flat, sep="/")
    run = functools.partial(backbone.apply, mutable=["intermediates"])
    features, state = jax.jit(run)(variables, golden_image(case))
    if new:  # all of the original's is in one map
        features = {"res2": state["intermediates"]["tokens"][0]}
    for level in LEVELS[: len(features)]:
        want = arrays[f"{case}_{level}"]
        got = np.asarray(features[level])
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4 * want.std(), level


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 64), (96, 32)])
def test_features_within_an_extent_are_those_of_the_exact_shape(name, size):
    backbone = small_backbone(name)
    variables, rng = random_variables(backbone), np.random.default_rng(2)
    canvas = rng.standard_normal((2, 96, 128, 3)).astype(np.float32)
    canvas[0, size[0] :] = canvas[0, :, size[1] :] = 0
    apply = jax.jit(backbone.apply)
    exact = apply(variables, canvas[:1, : size[0], : size[1]])
    shared = apply(variables, canvas, np.array([size, (96, 128)], np.int32))
    full = apply(variables, canvas[1:])
    for i, level in enumerate(LEVELS):
        h, w = (side // (4 << i) for side in size)
        spread = np.ptp(exact[level])
        near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * spread)
        near(shared[level][0, :h, :w], exact[level][0])
        near(shared[level][1], full[level][0])


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    config = base.get_config()
    config.model.backbone.name = name
    shapes = flatten_dict(shapes_of(build_backbone(config))["params"])
    count = sum(int(np.prod(v.shape)) for k, v in shapes.items() if not k[0].startswith(NEW))
    assert count == PARAMETERS[name]
    leaves = {"/".join(("params", "backbone", *k)): v for k, v in shapes.items()}
    assert backbones.backbone_of(leaves) == name
    suggested = backbones.suggest_weights(config.model.backbone)
    assert "timm/" in suggested or name.endswith("_paddle")


@pytest.mark.parametrize("name", SMALL)
def test_stages_freeze_and_layers_hold_every_parameter_once(name):
    backbone = small_backbone(name)
    params = {"backbone": shapes_of(backbone)["params"]}
    leaves = ["/".join(k) for k in flatten_dict(params)]
    masks = [trainable_mask(params, n, "gn", (), backbone.stages()) for n in range(6)]
    counts = [sum(jax.tree.leaves(mask)) for mask in masks]
    assert counts[0] == len(leaves) and counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 6
    free = {"/".join(k) for k, value in flatten_dict(masks[5]).items() if value}
    assert all(is_new(leaf) for leaf in free)  # of no stage: what ends the results
    rate = layer_rates(backbone.layers(), 0.5)
    number = len(backbone.layers())
    exponents = {leaf: round(-np.log2(rate(leaf))) for leaf in leaves}
    assert set(exponents.values()) == set(range(1, number + 1))
    assert exponents["backbone/stem/conv1/kernel"] == number
    assert rate("fpn/lateral2/kernel") == 1


def test_rates_decay_by_layer_in_both_optimisers():
    params = {"backbone": {"stem": jnp.ones(2), "res5_0": jnp.ones(2)}, "fpn": jnp.ones(2)}
    trainable = jax.tree.map(lambda _: True, params)
    factor_of = layer_rates((("stem*",), ("res5*",)), 0.5)
    for name in ("sgd", "adamw"):
        make = functools.partial(
            make_optimizer,
            lambda step: 0.1,
            name=name,
            momentum=0.9,
            weight_decay=0.01,
            weight_decay_norm=0.0,
            clip_norm=0.0,
            trainable=trainable,
        )
        plain, scaled = make(), make(factor_of=factor_of)
        updates = [tx.update(params, tx.init(params), params)[0] for tx in (plain, scaled)]
        want = jax.tree.map(
            lambda x, f: x * f,
            updates[0],
            {"backbone": {"stem": 0.25, "res5_0": 0.5}, "fpn": 1.0},
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates[1], want)


@pytest.mark.parametrize(
    ("size", "stride", "shape"),
    [(7, 1, (9, 12)), (5, 2, (8, 11)), (3, 2, (7, 8))],
)
def test_depthwise_convolutions_and_their_gradients(size, stride, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *shape, 4)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 1, 4)).astype(np.float32)
    want, pull_back = jax.vjp(lambda x, k: _plain(x, k, stride), x, kernel)
    got, pull = jax.vjp(lambda x, k: depthwise_conv2d(x, k, stride), x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    grad = rng.standard_normal(want.shape).astype(np.float32)
    for a, b in zip(pull(grad), pull_back(grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "convnext_t",
            {"depth": 3},
            "depth: convnext_t has no such option; it has depths",
        ),
        ("convnext_t", {"depths": (1, 2)}, r"options.depths = \(1, 2\) should be like \(3, 3, 9"),
        ("convnext_t", {"out_norm": 1}, "options.out_norm = 1 should be like True"),
        ("resnet", {"groups": 32}, "options.groups: resnet has no such option"),
        ("nowhere.nets:Stub", {}, "model.backbone.name: 'nowhere.nets:Stub' cannot be imported"),
        ("os:getcwd", {}, "os:getcwd is no subclass of solov2_jax.models.Backbone"),
    ],
)
def test_wrong_backbones_are_one_error(name, options, message):
    with pytest.raises(InputError, match=message):
        build_backbone(backbone_config(name, **options))


def test_features_of_another_form_are_refused():
    image = jnp.zeros((1, 64, 64, 3))
    good = {level: jnp.zeros((1, 16 >> i, 16 >> i, 8)) for i, level in enumerate(LEVELS)}
    check_features(good, image, "Stub")
    with pytest.raises(ValueError, match=r"Stub returned \['res2'\]; it must return a dict of"):
        check_features({"res2": good["res2"]}, image, "Stub")
    with pytest.raises(ValueError, match=r"returned res5 of shape \(1, 4, 4, 8\) for an image"):
        check_features({**good, "res5": good["res4"]}, image, "Stub")


def write_file(path, state):
    np.savez(path, **state)
    return str(path)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_files_are_read_by_their_names_and_fit(golden, tmp_path, name, case):
    weights = read_weights(write_file(tmp_path / "x.npz", golden_state(golden("backbones"), case)))
    config = backbone_config(name, **SMALL[name][0], **OF_CASE.get(case, {}))
    config.data.channels = 5
    targets = convert.network_shapes(config, 2)
    flat, report = convert.match(weights, targets)
    stem = "params/backbone/stem/conv1/kernel"
    assert flat[stem].shape[2] == 5  # red, green, blue in turn
    of_backbone = [leaf for leaf in report.new if "/backbone/" in leaf]
    assert all(is_new(leaf.replace("/backbone", "")) for leaf in of_backbone)
    assert not [entry for entry in report.dropped if entry[1] == "no rule for this name"]
    with pytest.raises(ValueError, match="do not fit the network|the network has another"):
        convert.match(weights, convert.network_shapes(tiny_config(), 2))


@pytest.mark.parametrize(
    ("case", "name", "extra", "message"),
    [
        ("mobilenet_timm", "tf_mobilenetv3_large_100.npz", {}, "TensorFlow's weights"),
        ("mobilenet_timm", "models--timm--tf_mobilenetv3/snapshots/1/model.npz", {}, "pad other"),
        ("dinov2_timm", "a.npz", {"reg_token": (1, 4, 32)}, "DINOv2 with registers"),
        ("swin_timm", "a.npz", {"layers.0.blocks.0.attn.logit_scale": (1,)}, "Swin of version 2"),
        ("convnext_timm", "a.npz", {"stages.0.blocks.0.mlp.grn.weight": (8,)}, "ConvNeXt of vers"),
    ],
)
def test_relatives_of_a_family_are_refused(golden, tmp_path, case, name, extra, message):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    state = golden_state(golden("backbones"), case)
    state |= {tensor: np.zeros(shape, np.float32) for tensor, shape in extra.items()}
    with pytest.raises(InputError, match=message):
        read_weights(write_file(path, state))


def test_deformed_stages_are_of_resnet_only():
    config = backbone_config("convnext_t")
    config.model.dcn.towers = "all"
    check_config(config)
    config.model.dcn.stages = (4, 5)
    with pytest.raises(ValueError, match=r"model.dcn.stages = \(4, 5\) is for model.backbone.name"):
        check_config(config)


def stub_source():
    """Returns the code of the page on backbones of one's own."""
    text = (ROOT / "docs" / "training.md").read_text().partition("## Your own backbone")[2]
    return re.findall(r"```python\n(.*?)```", text, re.S)[0]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stubnets.py").write_text(stub_source())
    monkeypatch.syspath_prepend(tmp_path)
    yield "stubnets:Stub"
    sys.modules.pop("stubnets", None)


def test_ones_own_backbone_is_one_module_and_one_path(stub, tmp_path):
    overrides = {
        "model.backbone.name": stub,
        "model.backbone.options.width": 8,
        "model.backbone.freeze_at": 0,
        "optim.layer_decay": 0.8,
        "optim.learning_rate": 0.001,
        "train.steps": 2,
        "train.batch_size": 2,
        "train.log_every": 1,
        "train.after_training": (),
        "eval.reports": (),
        "eval.max_images": 2,
        "input.min_sizes_train": (64,),
        "input.max_size_train": 64,
        "input.min_size_test": 64,
        "input.max_size_test": 64,
        "model.fpn.channels": 32,
        "data.num_workers": 0,
        "data.generated.image_size": (64, 64),
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "solov2_jax"]
    run = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    done = run([*command, "train", "--config=quickstart", "--workdir=run", *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(not line.get("skipped") for line in lines)
    image = np.random.default_rng(0).integers(0, 255, (60, 50, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    done = run([*command, "predict", "--workdir=run", "--input=a.png", "--output=out"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "out").rglob("*"))


def test_programs_of_ones_own_backbone_are_not_kept(stub):
    own = build_model(backbone_config(stub), 2)
    ours = build_model(backbone_config("convnext_t", **SMALL["convnext_t"][0]), 2)
    assert stored.program_name(own, "detect", 1) == ""
    assert "ConvNeXt" in stored.program_name(ours, "detect", 1)
    assert stored.program_name(ours, 1) != stored.program_name(ours, 2)
    variables = tiny_variables(backbone_config(stub))
    assert {"stem", "res2", "res5"} <= set(variables["params"]["backbone"])
