"""The name tables: every reference name has its leaf and comes back, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import reference_shapes, small_state
from flax.traverse_util import flatten_dict
from golden_weights import from_adelaidet

from configs import base
from solov2_jax.models import build_model
from solov2_jax.weights import names, tables

MODELS = ["r18", "r34", "r50", "r101", "r50_light", "r18_light"]


def mmdet_name(key):
    """Returns mmdetection's name of a reference name, written down from its structure:
    layerN, downsample, neck.*_convs counted from 0, cls for cate, conv/gn modules."""
    key = key.replace("backbone.bottom_up.stem.conv1.norm", "backbone.bn1")
    key = key.replace("backbone.bottom_up.stem.conv1", "backbone.conv1")
    key = re.sub(r"backbone\.bottom_up\.res(\d)", lambda m: f"backbone.layer{int(m[1]) - 1}", key)
    key = key.replace("shortcut.norm", "downsample.1")
    key = key.replace("shortcut", "downsample.0")
    key = re.sub(r"conv(\d)\.norm", r"bn\1", key)
    key = re.sub(
        r"backbone\.fpn_(lateral|output)(\d)",
        lambda m: f"neck.{ {'output': 'fpn'}.get(m[1], m[1]) }_convs.{int(m[2]) - 2}.conv",
        key,
    )
    key = re.sub(r"^mask_head", "mask_head.mask_feature_head", key)
    key = re.sub(
        r"(conv\d|conv_pred)\.([01])\.(\w+)$",
        lambda m: f"{m[1]}.{('conv', 'gn')[int(m[2])]}.{m[3]}",
        key,
    )
    key = re.sub(
        r"ins_head\.(cate|kernel)_tower\.(\d+)",
        lambda m: f"ins_head.{m[1]}_convs.{int(m[2]) // 3}.{('conv', 'gn')[int(m[2]) % 3]}",
        key,
    )
    key = re.sub(r"ins_head\.(cate|kernel)_pred", r"ins_head.conv_\1", key)
    return (
        key.replace("ins_head.cate_convs", "ins_head.cls_convs")
        .replace("ins_head.conv_cate", "ins_head.conv_cls")
        .replace("ins_head", "mask_head")
    )


def solo_name(key):
    """Returns the paper's own code's name of a reference name."""
    key = mmdet_name(key)
    if key.startswith("mask_head.mask_feature_head"):
        key = key.replace("mask_head.mask_feature_head", "mask_feat_head")
        return key.replace("conv_pred", "conv_pred.0")
    key = re.sub(r"^mask_head\.cls_convs", "bbox_head.cate_convs", key)
    key = re.sub(r"^mask_head\.kernel_convs", "bbox_head.kernel_convs", key)
    key = re.sub(r"^mask_head\.conv_cls", "bbox_head.solo_cate", key)
    return re.sub(r"^mask_head\.conv_kernel", "bbox_head.solo_kernel", key)


def equal(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name])


@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_bit_exact(model):
    state = small_state(model)
    flat = from_adelaidet(state)
    assert len(flat) == len(state)
    equal(tables.to_adelaidet(flat), state)


def test_round_trip_of_ours_is_bit_exact():
    flat = from_adelaidet(small_state("r50"))
    equal(from_adelaidet(tables.to_adelaidet(flat)), flat)


def config_of(model):
    config = base.get_config()
    config.model.backbone.depth = int(re.findall(r"r(\d+)", model)[0])
    shapes = reference_shapes(model)
    head, mask = config.model.ins_head, config.model.mask_head
    head.channels = shapes["ins_head.kernel_pred.weight"][1]
    head.num_kernels = shapes["ins_head.kernel_pred.weight"][0]
    head.num_convs = sum(bool(re.search(r"cate_tower\.\d+\.w", k)) for k in shapes) // 2
    mask.channels = shapes["mask_head.conv_pred.0.weight"][1]
    return config, shapes["ins_head.cate_pred.weight"][0]


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_the_references(model):
    """Our network's leaves, under the reference's names, are its state dict: what
    `load_state_dict(strict=True)` asks for."""
    config, classes = config_of(model)
    network = build_model(config, classes)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    # A scalar in every leaf's shape: no memory.
    flat = {
        n: np.broadcast_to(np.float32(0), s.shape) for n, s in flatten_dict(shapes, sep="/").items()
    }
    state = tables.to_adelaidet(flat)
    assert {key: a.shape for key, a in state.items()} == reference_shapes(model)


@pytest.mark.parametrize("rename", [mmdet_name, solo_name])
@pytest.mark.parametrize("model", MODELS)
def test_mmdetection_and_the_papers_code_fill_the_same_leaves(model, rename):
    state = small_state(model)
    theirs = {rename(key): value for key, value in state.items()}
    assert len(theirs) == len(state)
    theirs["backbone.bn1.num_batches_tracked"] = np.array(7)
    flat, rest = names.from_names(tables.MMDET, theirs)
    equal(flat, from_adelaidet(state))
    assert list(rest) == ["backbone.bn1.num_batches_tracked"]
    assert "counter" in names.drop_reason(tables.MMDET, *rest)


@pytest.mark.parametrize("model", ["r18", "r50", "r101"])
def test_torchvision_and_timm_fill_the_backbone(model):
    state = {k: v for k, v in small_state(model).items() if "bottom_up" in k}
    theirs = {mmdet_name(k).removeprefix("backbone."): v for k, v in state.items()}
    theirs["fc.weight"] = np.zeros((1000, 8), np.float32)
    flat, rest = names.from_names(tables.TORCHVISION, theirs)
    equal(flat, from_adelaidet(state))
    assert list(rest) == ["fc.weight"]
    assert "classifier" in names.drop_reason(tables.TORCHVISION, "fc.weight")


def caffe2_state(state):
    """Returns the Caffe2 blobs of a backbone: affine norms, statistics folded in."""
    units = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
    blobs = {}
    for key, value in state.items():
        stem = re.fullmatch(r"backbone\.bottom_up\.stem\.conv1\.(.*)", key)
        block = re.fullmatch(r"backbone\.bottom_up\.res(\d)\.(\d+)\.(\w+)\.(.*)", key)
        if stem:
            conv, norm, leaf = "conv1", "res_conv1", stem[1]
        else:
            conv = norm = f"res{block[1]}_{block[2]}_branch{units[block[3]]}"
            leaf = block[4]
        name = {
            "weight": f"{conv}_w",
            "norm.weight": f"{norm}_bn_s",
            "norm.bias": f"{norm}_bn_b",
        }.get(leaf)
        if name:
            blobs[name] = value
    return blobs


def test_caffe2_names_and_affine_norms():
    state = {k: v for k, v in small_state("r50").items() if "bottom_up" in k}
    blobs = caffe2_state(state)
    blobs |= {"conv1_b": np.zeros(4), "fc1000_w": np.zeros(2), "pred_b": np.zeros(2)}
    flat, rest = names.from_names(tables.DETECTRON2, blobs)
    want = from_adelaidet(state)
    assert sorted(flat) == sorted(want)
    for leaf, value in flat.items():
        if leaf.endswith("/mean"):
            assert not value.any()
        elif leaf.endswith("/var"):
            # 1 / sqrt(var + eps) is 1 to float32's precision: an identity.
            np.testing.assert_allclose(value + np.float32(1e-5), 1.0, atol=1e-7)
        else:
            assert np.array_equal(value, want[leaf])
    assert sorted(rest) == ["conv1_b", "fc1000_w", "pred_b"]
    assert all(names.drop_reason(tables.DETECTRON2, name) for name in rest)


def test_detectron2_names_without_and_with_prefix():
    state = {k: v for k, v in small_state("r50").items() if "bottom_up" in k}
    bare = {k.removeprefix("backbone.bottom_up."): v for k, v in state.items()}
    assert names.drop_reason(tables.DETECTRON2, "stem.fc.weight")
    for theirs in (bare, state):
        equal(names.from_names(tables.DETECTRON2, theirs)[0], from_adelaidet(state))


def test_two_tensors_for_one_leaf_are_refused():
    state = {
        "stem.conv1.weight": np.zeros((2, 3, 7, 7)),
        "conv1_w": np.zeros((2, 3, 7, 7)),
    }
    with pytest.raises(ValueError, match=r"'stem.conv1.weight' and 'conv1_w' both"):
        names.from_names(tables.DETECTRON2, state)


def test_unknown_names_are_refused_in_both_directions():
    flat, rest = names.from_names(tables.ADELAIDET, {"foo": np.zeros(1)})
    assert not flat and list(rest) == ["foo"]
    with pytest.raises(ValueError, match="AdelaiDet has no names for params/foo"):
        tables.to_adelaidet({"params/foo": np.zeros(1)})


@pytest.mark.parametrize("name", ["ins_head.cate_tower.2.weight", "ins_head.cate_tower.00.weight"])
def test_names_between_the_rules_match_none(name):
    assert names.targets_of(tables.ADELAIDET, name) == []
