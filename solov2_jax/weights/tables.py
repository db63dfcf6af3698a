"""The names of each program that publishes weights, as `names.NameTable`s.

Names that a program gives to different layers of different networks have a table each, see
`table_of`: the numbers of a sequence shift where a layer is left out or put before.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import no_type_check

import numpy as np

from solov2_jax.weights import backbones, paddle_static
from solov2_jax.weights.names import (
    COUNTER,
    Drop,
    Flat,
    NameTable,
    Rule,
    batch_norm,
    conv,
    group_norm,
    targets_of,
    to_names,
)


def _unit(source: str, norm: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a convolution and its batch norm."""
    return (*conv(source, target), *batch_norm(norm, f"{target}/norm"))


def _offsets(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of the convolution that predicts a deformable one's offsets."""
    return conv(source, f"{target}/offset", bias=True)


def _backbone(
    prefix: str, stem: Sequence[tuple[str, str]], block: str, units: Mapping[str, tuple[str, str]]
) -> tuple[Rule, ...]:
    """Returns the rules of a ResNet.

    Args:
      stem: (convolution, batch norm) of the stem's convolutions.
      block: template of a block's name.
      units: likewise in a block, by our name.
    """
    rules: list[Rule] = []
    for i, (conv_name, norm_name) in enumerate(stem, start=1):
        rules += _unit(prefix + conv_name, prefix + norm_name, f"backbone/stem/conv{i}")
    for unit, pair in units.items():
        names = (f"{prefix}{block}.{name}" for name in pair)
        rules += _unit(*names, target=f"backbone/res{{s}}_{{i}}/{unit}")
    return tuple(rules)


def _detectron2_backbone(prefix: str) -> tuple[Rule, ...]:
    """Source: detectron2/modeling/backbone/resnet.py."""
    units = {u: (u, f"{u}.norm") for u in ("shortcut", "conv1", "conv2", "conv3")}
    stem = [(f"stem.conv{i}", f"stem.conv{i}.norm") for i in (1, 2, 3)]
    return (
        *_backbone(prefix, stem, "res{s}.{i}", units),
        *_offsets(f"{prefix}res{{s}}.{{i}}.conv2_offset", "backbone/res{s}_{i}/conv2"),
    )


def _torchvision_backbone(
    prefix: str, avg_down: bool = False, deep_stem: bool = False
) -> tuple[Rule, ...]:
    """Source: torchvision/models/resnet.py; timm and mmdetection name theirs alike.

    Deep stems: "stem" in mmdetection's ResNetV1d, "conv1" in timm's resnet50d, whose last
    norm has the plain one's name. Offsets: "conv2.conv_offset" in mmcv, "conv2_offset" in
    mmdetection before 1.0.

    Args:
      avg_down: the shortcut's pooling is the first layer of a sequence.
      deep_stem: timm's "bn1" is the third convolution's.
    """
    units = {f"conv{n}": (f"conv{n}", f"bn{n}") for n in (1, 2, 3)}
    first = int(avg_down)
    units["shortcut"] = (f"downsample.{first}", f"downsample.{first + 1}")
    rules: list[Rule] = []
    for i in range(3):
        target, at = f"backbone/stem/conv{i + 1}", (3 * i, 3 * i + 1)
        rules += _unit(f"{prefix}stem.{at[0]}", f"{prefix}stem.{at[1]}", target)
        norm = "bn1" if i == 2 else f"conv1.{at[1]}"
        if i < 2 or deep_stem:
            rules += _unit(f"{prefix}conv1.{at[0]}", prefix + norm, target)
    plain = [] if deep_stem else [("conv1", "bn1")]
    rules = [*_backbone(prefix, plain, "layer{s-1}.{i}", units), *rules]
    for name in ("conv2.conv_offset", "conv2_offset"):
        rules += _offsets(f"{prefix}layer{{s-1}}.{{i}}.{name}", "backbone/res{s}_{i}/conv2")
    return tuple(rules)


def _caffe2_backbone() -> tuple[Rule, ...]:
    """Source: detectron2/checkpoint/c2_model_loading.py, convert_basic_c2_names."""

    def unit(conv_name: str, norm_name: str, target: str) -> list[Rule]:
        scale, stats = f"{norm_name}_s", f"batch_stats/{target}/norm"
        return [
            Rule(f"{conv_name}_w", f"params/{target}/kernel", "kernel"),
            Rule(scale, f"params/{target}/norm/scale"),
            Rule(f"{norm_name}_b", f"params/{target}/norm/bias"),
            Rule(scale, f"{stats}/mean", "zeros"),
            Rule(scale, f"{stats}/var", "identity_var"),
        ]

    rules = unit("conv1", "res_conv1_bn", "backbone/stem/conv1")
    branches = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
    for branch, name in branches.items():
        source = f"res{{s}}_{{i}}_branch{branch}"
        rules += unit(source, f"{source}_bn", f"backbone/res{{s}}_{{i}}/{name}")
    return tuple(rules)


def _paddle_unit(source: str, target: str) -> tuple[Rule, ...]:
    """Source: ppdet/modeling/backbones/resnet.py, ConvNormLayer."""
    norm, ours = f"{source}.norm", f"{target}/norm"
    return (
        *conv(f"{source}.conv", target),
        *group_norm(norm, ours),
        Rule(f"{norm}._mean", f"batch_stats/{ours}/mean"),
        Rule(f"{norm}._variance", f"batch_stats/{ours}/var"),
    )


def _paddle_backbone(prefix: str) -> tuple[Rule, ...]:
    """Source: ppdet/modeling/backbones/resnet.py; name_adapter.py for the blocks' letters:
    res4a, res4b, ..., and res4a, res4b1, res4b2, ... where there are more than ten."""
    rules = [*_paddle_unit(f"{prefix}conv1.conv1", "backbone/stem/conv1")]
    for i in (1, 2, 3):
        rules += _paddle_unit(f"{prefix}conv1.conv1_{i}", f"backbone/stem/conv{i}")
    blocks = [("res{s}b{i}", "{i}"), *((f"res{{s}}{c}", str(n)) for n, c in enumerate("abcdefgh"))]
    for block, i in blocks:
        source, target = f"{prefix}res{{s}}.{block}", f"backbone/res{{s}}_{i}"
        for n, branch in enumerate("abc", start=1):
            rules += _paddle_unit(f"{source}.branch2{branch}", f"{target}/conv{n}")
        rules += _offsets(f"{source}.branch2b.conv_offset", f"{target}/conv2")
        for short in ("short", "short.conv"):
            rules += _paddle_unit(f"{source}.{short}", f"{target}/shortcut")
    return tuple(rules)


def _fpn(lateral: str, output: str) -> tuple[Rule, ...]:
    return (*conv(lateral, "fpn/lateral{l}", bias=True), *conv(output, "fpn/output{l}", bias=True))


def _fpn_norms(lateral: str, output: str) -> tuple[Rule, ...]:
    norms = {lateral: "fpn/lateral{l}/norm", output: "fpn/output{l}/norm"}
    return tuple(rule for source, ours in norms.items() for rule in batch_norm(source, ours))


def _paddle_fpn() -> tuple[Rule, ...]:
    """Source: ppdet/modeling/necks/fpn.py; with a norm, its convolution is one level down."""
    rules: list[Rule] = []
    for source, target in (
        ("fpn_inner_res5_sum", "fpn/lateral5"),
        ("fpn_inner_res{l}_sum_lateral", "fpn/lateral{l}"),
        ("fpn_res{l}_sum", "fpn/output{l}"),
    ):
        rules += conv(f"neck.{source}", target, bias=True)
        rules += _paddle_unit(f"neck.{source}", target)
    return tuple(rules)


def _heads(
    *,
    towers: Mapping[str, tuple[str, str]],
    preds: Mapping[str, str],
    block: tuple[str, str],
    mask_pred: tuple[str, str],
    offset: str = "conv_offset",
    deformed: str = "",
) -> tuple[Rule, ...]:
    """Returns the rules of both heads; pairs are a convolution and its norm.

    Args:
      towers, preds: the class and the kernel tower, and their last layers.
      block, mask_pred: of the mask head, and its last one.
      offset: what a deformable convolution's name is followed by for its offsets'.
      deformed: likewise for itself, where it differs from a plain one.
    """
    rules: list[Rule] = []

    def unit(names: tuple[str, str], target: str, norm: str) -> None:
        rules.extend(conv(names[0], target, bias=True))
        if deformed:
            rules.extend(conv(f"{names[0]}.{deformed}", target, bias=True))
        rules.extend(_offsets(f"{names[0]}.{offset}", target))
        rules.extend(group_norm(names[1], norm))

    for branch, names in towers.items():
        tower = f"ins_head/{branch}_tower"
        unit(names, f"{tower}/conv{{i}}", f"{tower}/gn{{i}}")
        rules += conv(preds[branch], f"ins_head/{branch}_pred", bias=True)
    unit(block, "mask_head/level{l}/conv{j}", "mask_head/level{l}/gn{j}")
    unit(mask_pred, "mask_head/conv_pred", "mask_head/gn_pred")
    return tuple(rules)


def _adelaidet_heads(conv_at: str, norm_at: str) -> tuple[Rule, ...]:
    """Source: adet/modeling/solov2/solov2.py, SOLOv2InsHead and SOLOv2MaskHead."""
    level = "mask_head.convs_all_levels.{l}.conv{j}"
    return _heads(
        towers={
            branch: (f"ins_head.{branch}_tower.{conv_at}", f"ins_head.{branch}_tower.{norm_at}")
            for branch in ("cate", "kernel")
        },
        preds={"cate": "ins_head.cate_pred", "kernel": "ins_head.kernel_pred"},
        block=(f"{level}.0", f"{level}.1"),
        mask_pred=("mask_head.conv_pred.0", "mask_head.conv_pred.1"),
    )


def _conv_module(name: str) -> tuple[str, str]:
    """Returns the convolution and the norm of mmcv's ConvModule."""
    return f"{name}.conv", f"{name}.gn"


# mmdet/models/dense_heads/solov2_head.py, mmdetection 2.x and 3.x.
_MMDET_HEADS = _heads(
    towers={
        "cate": _conv_module("mask_head.cls_convs.{i}"),
        "kernel": _conv_module("mask_head.kernel_convs.{i}"),
    },
    preds={"cate": "mask_head.conv_cls", "kernel": "mask_head.conv_kernel"},
    block=_conv_module("mask_head.mask_feature_head.convs_all_levels.{l}.conv{j}"),
    mask_pred=_conv_module("mask_head.mask_feature_head.conv_pred"),
)
# WXinlong/SOLO, the paper's code on mmdetection 1.0: mmdet/models/anchor_heads/
# solov2_head.py, mask_heads/mask_feat_head.py. NVlabs/DiscoBox and BoxInstSeg keep its names.
_SOLO_HEADS = _heads(
    towers={
        "cate": _conv_module("bbox_head.cate_convs.{i}"),
        "kernel": _conv_module("bbox_head.kernel_convs.{i}"),
    },
    preds={"cate": "bbox_head.solo_cate", "kernel": "bbox_head.solo_kernel"},
    block=_conv_module("mask_feat_head.convs_all_levels.{l}.conv{j}"),
    mask_pred=_conv_module("mask_feat_head.conv_pred.0"),
)
# ppdet/modeling/heads/solov2_head.py; layers.py, ConvNormLayer and DeformableConvV2.
_PADDLE_HEADS = _heads(
    towers={
        branch: (
            f"solov2_head.bbox_head.{branch}_convs.{{i}}.conv",
            f"solov2_head.bbox_head.{branch}_convs.{{i}}.norm",
        )
        for branch in ("cate", "kernel")
    },
    preds={b: f"solov2_head.bbox_head.solo_{b}" for b in ("cate", "kernel")},
    block=(
        "mask_head.conv_pre_feat{l}.mask_feat_head.convs_all_levels.{l}.conv{j}.conv",
        "mask_head.conv_pre_feat{l}.mask_feat_head.convs_all_levels.{l}.conv{j}.norm",
    ),
    mask_pred=(
        "mask_head.mask_feat_head.conv_pred.0.conv",
        "mask_head.mask_feat_head.conv_pred.0.norm",
    ),
    deformed="conv_dcn",
)

_CLASSIFIER = Drop(
    r"((stem\.)?fc|fc1000|pred|classifier|linear)[._].*", "ImageNet classifier, not used"
)
_OTHER_HEADS = Drop(
    r"(proposal_generator|roi_heads?|rpn_head|bbox_head|sem_seg_head|anchor_generator"
    r"|basis_module)\..*",
    "head of another detector",
)
_PIXELS = Drop(r"pixel_(mean|std)", "read as settings, see `input.mean`, `input.std`")
_MOMENTUM = Drop(r".*_momentum", "optimiser state")
_STEM_BIAS = Drop(r"(stem\.)?conv1(_b|\.bias)", "the reference ignores it too")
_EMA_BUFFER = Drop(r"ema_.*", "moving average kept by an EMA hook")
# A layer that is an attribute and a sublayer of another name has both in Paddle.
_SECOND_NAME = Drop(
    r"solov2_head\.solo_(cate|kernel)\..*|mask_head\.conv_pred\..*",
    "there under its sublayer's name",
)
_TEACHER = Drop(r"(tsw\.)?teacher\..*|tsw\..*", "copy of the network that taught it")

_DETECTRON2_NETWORK = (
    *_detectron2_backbone("backbone.bottom_up."),
    *_fpn("backbone.fpn_lateral{l}", "backbone.fpn_output{l}"),
    *_fpn_norms("backbone.fpn_lateral{l}.norm", "backbone.fpn_output{l}.norm"),
)
_ADELAIDET_DROPS = (COUNTER, _PIXELS, _OTHER_HEADS)
ADELAIDET = NameTable((*_DETECTRON2_NETWORK, *_adelaidet_heads("{3i}", "{3i+1}")), _ADELAIDET_DROPS)
# MODEL.SOLOV2.NORM "none": a convolution and a ReLU each.
ADELAIDET_NO_NORM = NameTable(
    (*_DETECTRON2_NETWORK, *_adelaidet_heads("{2i}", "no_norm.{i}")), _ADELAIDET_DROPS
)
DETECTRON2 = NameTable(
    (*_caffe2_backbone(), *_detectron2_backbone(""), *_DETECTRON2_NETWORK),
    (COUNTER, _PIXELS, _OTHER_HEADS, _CLASSIFIER, _MOMENTUM, _STEM_BIAS),
)


@cache
def _mmdet(avg_down: bool, deep_stem: bool = False, group_norm: bool = False) -> NameTable:
    """Returns mmdetection's names; the first for a leaf is the one that is written.

    `group_norm`: of the FPN, whose norms are called by their kind.
    """
    neck = ("neck.lateral_convs.{l-2}", "neck.fpn_convs.{l-2}")
    norms = ("gn", "bn") if group_norm else ("bn", "gn")
    rules = (
        *_torchvision_backbone("backbone.", avg_down, deep_stem),
        *_fpn(*(f"{name}.conv" for name in neck)),
        *(rule for norm in norms for rule in _fpn_norms(*(f"{name}.{norm}" for name in neck))),
        *_MMDET_HEADS,
        *_SOLO_HEADS,
    )
    return NameTable(rules, (COUNTER, _TEACHER, _OTHER_HEADS, _EMA_BUFFER))


MMDET, MMDET_AVG_DOWN = _mmdet(avg_down=False), _mmdet(avg_down=True)
TORCHVISION = NameTable(_torchvision_backbone(""), (COUNTER, _CLASSIFIER))
# timm's resnet50d.
RESNET_D = NameTable(_torchvision_backbone("", True, True), (COUNTER, _CLASSIFIER))
PADDLE = NameTable(
    (
        *_paddle_backbone("backbone."),
        *_paddle_backbone(""),
        *_paddle_fpn(),
        *_PADDLE_HEADS,
    ),
    (COUNTER, _CLASSIFIER, _SECOND_NAME),
)

TABLES: dict[str, NameTable] = {
    "adelaidet": ADELAIDET,
    "detectron2": DETECTRON2,
    "mmdet": MMDET,
    "torchvision": TORCHVISION,
    "timm": TORCHVISION,
    "keras": TORCHVISION,
    "paddle": PADDLE,
    **backbones.TABLES,
}
# source -> (a name that only this network has, its table).
_OTHERS: dict[str, tuple[str, NameTable]] = {
    "adelaidet": (r"ins_head\.cate_tower\.2\.weight", ADELAIDET_NO_NORM),
    "mmdet": (r"backbone\.layer\d\.\d+\.downsample\.2\.weight", MMDET_AVG_DOWN),
    "torchvision": (r"conv1\.3\.weight", RESNET_D),
    "timm": (r"conv1\.3\.weight", RESNET_D),
    "swin": (r"layers\.0\.downsample\.reduction\.weight", backbones.SWIN_LATE),
    "paddle": ("|".join(paddle_static.MARKS), paddle_static.PADDLE_STATIC),
}
# The last is the stem's: in static graphs of Paddle's, ResNets with a deep one.
_AVG_DOWN = re.compile(r".*(downsample\.2\.weight|\.short\.conv\.conv\.weight)|conv1_1_weights")


def table_of(source: str, tensors: Iterable[str]) -> NameTable:
    """Returns the table of a source's tensors, by their names."""
    pattern, other = _OTHERS.get(source, ("", TABLES[source]))
    fits = pattern and any(re.fullmatch(pattern, name) for name in tensors)
    return other if fits else TABLES[source]


def has_avg_down(tensors: Iterable[str]) -> bool:
    """Returns whether shortcuts halve their input by a mean, by the tensors' names."""
    return any(_AVG_DOWN.fullmatch(name) for name in tensors)


_ALL = (
    ADELAIDET,
    ADELAIDET_NO_NORM,
    DETECTRON2,
    MMDET,
    MMDET_AVG_DOWN,
    TORCHVISION,
    RESNET_D,
    PADDLE,
    paddle_static.PADDLE_STATIC,
    backbones.SWIN_LATE,
    *backbones.TABLES.values(),
)


@no_type_check
def is_known(name: str) -> bool:
    """Returns whether any table, or our own naming, has a rule for a tensor's name."""
    return any(targets_of(t, name) for t in _ALL) or name.startswith(("params/", "batch_stats/"))


def to_adelaidet(flat: Mapping[str, np.ndarray]) -> Flat:
    """Returns the AdelaiDet state dict (OIHW) of our flat leaves."""
    tower = "params/ins_head/cate_tower/"
    no_norm = f"{tower}conv0/kernel" in flat and f"{tower}gn0/scale" not in flat
    return to_names(ADELAIDET_NO_NORM if no_norm else ADELAIDET, flat, "AdelaiDet")


def to_mmdet(flat: Mapping[str, np.ndarray], avg_down: bool = False) -> Flat:
    """Returns mmdetection's state dict (2.x and 3.x, OIHW) of our flat leaves."""
    deep_stem = "params/backbone/stem/conv2/kernel" in flat
    group_norm = "batch_stats/fpn/lateral2/norm/mean" not in flat
    return to_names(_mmdet(avg_down, deep_stem, group_norm), flat, "mmdetection")
