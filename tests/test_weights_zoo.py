"""The names and settings of the published variants: written, read again, told by their shapes."""

import pickle
import re

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import zoo
from solov2_jax.config import flatten, load_config
from solov2_jax.weights import names, tables
from solov2_jax.weights.convert import network_shapes
from solov2_jax.weights.settings import implied_settings
from solov2_jax.weights.sources import read_weights

STRUCTURE = ("model.backbone.", "model.dcn.", "model.fpn.", "model.ins_head.", "model.mask_head.")
MMDET = [n for n in zoo.VARIANTS if n.startswith(("mmdet", "solo_"))]
PADDLE = [n for n in zoo.VARIANTS if n.startswith("paddle_r")]


def leaves_of(config):
    """Returns our leaves as zeros that need no memory."""
    shapes = flatten_dict(network_shapes(config, 80), sep="/")
    return {name: np.broadcast_to(np.float32(0), s.shape) for name, s in shapes.items()}


def assert_same(config, source, state):
    """The state dict fills the config's network, and says what the config says of it."""
    flat, rest = names.from_names(tables.table_of(source, state), state)
    assert not rest
    leaves = leaves_of(config)
    assert {n: a.shape for n, a in flat.items()} == {n: a.shape for n, a in leaves.items()}
    settings = implied_settings(source, flat, state, {})
    for key, value in flatten(config).items():
        if not key.startswith(STRUCTURE) or key not in settings:
            continue
        wanted = list(value) if isinstance(value, tuple) else value
        batch_norms = {"frozen_bn", "sync_bn"}  # the same weights
        same = settings[key] == wanted
        assert same or {settings[key], wanted} <= batch_norms, (key, settings[key], wanted)
    return settings


@pytest.mark.parametrize("name", MMDET)
def test_mmdetections_names_of_every_variant(name):
    config = load_config(f"zoo:{name}")
    assert_same(config, "mmdet", tables.to_mmdet(leaves_of(config)))


@pytest.mark.parametrize(
    ("override", "present"),
    [
        ("model.fpn.norm=gn", "neck.fpn_convs.3.gn.weight"),
        ("model.fpn.norm=sync_bn", "neck.lateral_convs.0.bn.running_mean"),
        ("model.backbone.deep_stem=True", "backbone.stem.7.weight"),
        ("model.dcn.mask_head=True", "mask_head.mask_feature_head.conv_pred.conv.conv_offset.bias"),
        ("model.dcn.stages=(5,)", "backbone.layer4.0.conv2.conv_offset.weight"),
    ],
)
def test_mmdetections_names_of_one_part(override, present):
    config = load_config("zoo:mmdet_r50", [f"--config.{override}"])
    state = tables.to_mmdet(leaves_of(config))
    assert present in state
    assert_same(config, "mmdet", state)


def test_mmdetections_names_with_pooled_shortcuts():
    config = load_config("zoo:paddle_r101_vd_dcn", ["--config.model.dcn.head_bias=False"])
    state = tables.to_mmdet(leaves_of(config), avg_down=True)
    assert state["backbone.layer2.0.downsample.1.weight"].ndim == 4
    assert_same(config, "mmdet", state)


def test_adelaidets_names_without_norms_and_with_norms_of_the_fpn():
    norms = [f"--config.model.{head}.norm=none" for head in ("ins_head", "mask_head")]
    config = load_config("r50_3x", [*norms, "--config.model.fpn.norm=sync_bn"])
    state = tables.to_adelaidet(leaves_of(config))
    assert {"ins_head.cate_tower.6.bias", "backbone.fpn_lateral5.norm.running_var"} <= state.keys()
    assert "ins_head.cate_tower.1.weight" not in state
    assert_same(config, "adelaidet", state)


def paddle_name(leaf, leaves, counts, deep):
    """Returns PaddleDetection's name of our leaf, written down from its layers."""
    *path, last = leaf.split("/")[1:]
    changed = {"kernel": "weight", "scale": "weight", "mean": "_mean", "var": "_variance"}
    part, last = path[0], changed.get(last, last)
    if part == "fpn":
        level = path[1][-1]
        inner = "fpn_inner_res5_sum" if level == "5" else f"fpn_inner_res{level}_sum_lateral"
        return f"neck.{inner if 'lateral' in path[1] else f'fpn_res{level}_sum'}.{last}"
    if part == "ins_head" and path[1].endswith("_pred"):
        return f"solov2_head.bbox_head.solo_{path[1].removesuffix('_pred')}.{last}"
    if part == "ins_head":
        branch, number = path[1].removesuffix("_tower"), re.sub(r"\D", "", path[2])
        layer = f"solov2_head.bbox_head.{branch}_convs.{number}"
    elif part == "mask_head" and path[1].startswith("level"):
        level, number = path[1][-1], path[2][-1]
        layer = f"mask_head.conv_pre_feat{level}.mask_feat_head.convs_all_levels.{level}"
        layer += f".conv{number}"
    elif part == "mask_head":
        layer = "mask_head.mask_feat_head.conv_pred.0"
    elif path[1] == "stem":
        layer = f"backbone.conv1.conv1{f'_{path[2][-1]}' if deep else ''}"
    else:
        stage, index = map(int, path[1].removeprefix("res").split("_"))
        many = counts[stage - 2] > 10
        letter = ("a", f"b{index}")[index > 0] if many else "abcdefgh"[index]
        short = "short.conv" if deep and stage > 2 else "short"
        branch = short if path[2] == "shortcut" else f"branch2{'abc'[int(path[2][-1]) - 1]}"
        layer = f"backbone.res{stage}.res{stage}{letter}.{branch}"
    if path[-1] == "norm" or path[-1].startswith("gn"):
        return f"{layer}.norm.{last}"
    if path[-1] == "offset":
        return f"{layer}{'' if part == 'backbone' else '.conv'}.conv_offset.{last}"
    deformed = f"params/{'/'.join(path)}/offset/kernel" in leaves and part != "backbone"
    return f"{layer}.conv{'.conv_dcn' if deformed else ''}.{last}"


@pytest.mark.parametrize("name", PADDLE)
def test_paddles_names_of_every_variant(name):
    config = load_config(f"zoo:{name}")
    leaves, deep = leaves_of(config), config.model.backbone.deep_stem
    counts = (3, 4, 6, 3) if config.model.backbone.depth == 50 else (3, 4, 23, 3)
    state = {}
    for leaf, value in leaves.items():
        key = paddle_name(leaf, leaves, counts, deep)
        assert key not in state, key
        state[key] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    settings = assert_same(config, "paddle", state)
    assert settings["model.backbone.avg_down"] is deep
    assert settings["input.channel_order"] == "RGB"


def test_paddles_second_names_of_a_layer_are_left_out():
    """Its state dicts have these twice: as an attribute and as a sublayer of another name."""
    for first, second in (
        ("solov2_head.bbox_head.solo_cate.weight", "solov2_head.solo_cate.weight"),
        ("mask_head.mask_feat_head.conv_pred.0.norm.bias", "mask_head.conv_pred.norm.bias"),
    ):
        assert names.targets_of(tables.PADDLE, first)
        assert not names.targets_of(tables.PADDLE, second)
        assert "sublayer's name" in names.drop_reason(tables.PADDLE, second)


def test_a_pdparams_file_is_read_and_a_hostile_one_refused(tmp_path):
    values = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    key = "solov2_head.bbox_head.solo_cate.weight"
    content = {
        key: values,
        "solov2_head.bbox_head.solo_cate.bias": values[:, 0, 0, 0].copy(),
        "StructuredToParameterName@@": {key: "conv2d_9.w_0"},
    }
    for protocol in (2, 4):
        path = tmp_path / f"p{protocol}.pdparams"
        path.write_bytes(pickle.dumps(content, protocol))
        weights = read_weights(str(path))
        assert weights.source == "paddle"
        leaf = weights.flat["params/ins_head/cate_pred/kernel"]
        np.testing.assert_array_equal(leaf, values.transpose(2, 3, 1, 0))
        assert ("StructuredToParameterName@@", "Paddle's own names") in weights.dropped

    class Call:
        def __reduce__(self):
            return print, ("owned",)

    bad = tmp_path / "bad.pdparams"
    bad.write_bytes(pickle.dumps({key: Call()}, 4))
    with pytest.raises(ValueError, match=r"bad\.pdparams.*'builtins.print'.*nothing was executed"):
        read_weights(str(bad))


@pytest.mark.parametrize("prefix", ["tsw.teacher.", "teacher."])
def test_the_teachers_copies_are_left_out(tmp_path, prefix):
    one, path = np.ones((2, 4, 3, 3), np.float32), str(tmp_path / "disco.npz")
    own = {"bbox_head.solo_cate.weight": one, "neck.lateral_convs.0.conv.weight": one}
    copies = {f"{prefix}{name}": 2 * value for name, value in own.items()}
    np.savez(path, **own, **copies)
    weights = read_weights(path)
    assert weights.source == "mmdet" and len(weights.flat) == 2
    assert all((leaf == 1).all() for leaf in weights.flat.values())
    reasons = dict(weights.dropped)
    assert {reasons[name] for name in copies} == {"copy of the network that taught it"}
