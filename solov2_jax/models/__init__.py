"""The network: image -> Outputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from solov2_jax.io import InputError
from solov2_jax.models.backbone import Backbone
from solov2_jax.models.convnext import ConvNeXt
from solov2_jax.models.deform import Deform
from solov2_jax.models.mobilenet import MobileNetV3, PaddleMobileNetV3
from solov2_jax.models.resnet import ResNet
from solov2_jax.models.solov2 import SOLOv2, intermediates
from solov2_jax.models.swin import Swin
from solov2_jax.models.vit import ViT
from solov2_jax.user_code import check_call, import_object

__all__ = [
    "AUXILIARY",
    "Backbone",
    "ResNet",
    "SOLOv2",
    "build_backbone",
    "build_model",
    "intermediates",
]

AUXILIARY = ("semantic_head",)  # parts that only the training's loss reads
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# By name: the class, and what differs from its defaults.
BACKBONES: dict[str, tuple[type[Backbone], dict[str, Any]]] = {
    "convnext_t": (ConvNeXt, {}),
    "convnext_s": (ConvNeXt, {"depths": (3, 3, 27, 3)}),
    "mobilenet_v3_large": (MobileNetV3, {}),
    "mobilenet_v3_large_paddle": (PaddleMobileNetV3, {}),
    "swin_t": (Swin, {}),
    "swin_s": (Swin, {"depths": (2, 2, 18, 2)}),
    "dinov2_s": (ViT, {}),
}


def build_model(config: Any, num_classes: int, *, auxiliary: bool = False) -> SOLOv2:
    """Returns the network that `config.model` describes, with the norms that
    `config.optim.freeze` freezes.

    Args:
      auxiliary: with the heads that training alone needs, where their loss has a weight.

    Raises:
      ValueError: for a `model.dtype` other than float32 and bfloat16.
    """
    model = config.model
    if model.dtype not in _DTYPES:
        raise ValueError(f"model.dtype is {model.dtype!r}; choose one of {sorted(_DTYPES)}")
    dcn, deform = model.dcn, _deform(config, bias=model.dcn.head_bias)
    return SOLOv2(
        num_classes=num_classes,
        backbone=build_backbone(config),
        fpn_channels=model.fpn.channels,
        fpn_norm=model.fpn.norm,
        num_grids=tuple(model.ins_head.num_grids),
        num_kernels=model.ins_head.num_kernels,
        head_channels=model.ins_head.channels,
        head_convs=model.ins_head.num_convs,
        head_norm=model.ins_head.norm,
        head_deform=None if dcn.towers == "none" else deform,
        head_deform_last=dcn.towers == "last",
        mask_channels=model.mask_head.channels,
        mask_norm=model.mask_head.norm,
        mask_deform=deform if dcn.mask_head else None,
        prior_prob=model.ins_head.prior_prob,
        dtype=_DTYPES[model.dtype],
        frozen=tuple(config.optim.freeze),
        num_keypoints=len(model.keypoint_head.names),
        keypoint_channels=model.keypoint_head.channels,
        semantic=auxiliary and config.loss.semantic_weight > 0,
        matmul_precision=model.matmul_precision,
    )


def build_backbone(config: Any) -> Backbone:
    """Returns the backbone that `config.model.backbone` describes.

    Raises:
      InputError: for an import path that leads to no `Backbone`, and for options that it
        does not have.
    """
    backbone = config.model.backbone
    shared = {
        "freeze_at": backbone.freeze_at,
        "dtype": _DTYPES[config.model.dtype],
        "frozen": tuple(config.optim.freeze),
    }
    kind, options = ResNet, {}
    if backbone.name in BACKBONES:
        kind, options = BACKBONES[backbone.name]
    elif backbone.name != "resnet":
        kind = import_object(backbone.name, "model.backbone.name")
        if not (isinstance(kind, type) and issubclass(kind, Backbone)):
            raise InputError(
                f"model.backbone.name: {backbone.name} is no subclass of "
                "solov2_jax.models.Backbone; see docs/training.md, Your own backbone"
            )
        if not any("__call__" in vars(parent) for parent in kind.__mro__):
            raise InputError(f"model.backbone.name: {backbone.name} has no method __call__")
        arguments = ("self", "image", "extent")
        check_call(kind.__call__, arguments, f"model.backbone.name: {backbone.name}: __call__")
    fields = _fields(kind, set(shared))
    given = backbone.options.to_dict()
    if kind is ResNet:
        options = {
            "depth": backbone.depth,
            "stride_in_1x1": backbone.stride_in_1x1,
            "groups": backbone.groups,
            "width_per_group": backbone.width_per_group,
            "deep_stem": backbone.deep_stem,
            "avg_down": backbone.avg_down,
            "deform": _deform(config),
            "deform_stages": tuple(config.model.dcn.stages),
            "norm": backbone.norm,
        }
        fields = {}  # its options are keys
    elif "norm" in fields and "norm" not in given:
        options = {**options, "norm": backbone.norm}
    return kind(**{**options, **_checked(given, fields, backbone.name)}, **shared)


def _fields(kind: type[Backbone], others: set[str]) -> dict[str, Any]:
    """Returns the defaults of a backbone's own fields, by name."""
    others = others | {"parent", "name"}
    return {f.name: f.default for f in dataclasses.fields(kind) if f.name not in others}


def _checked(
    given: Mapping[str, Any], fields: Mapping[str, Any], backbone: str
) -> Mapping[str, Any]:
    """Returns the options that are given, if they are like the fields' defaults."""
    for name, value in given.items():
        key = f"model.backbone.options.{name}"
        if name not in fields:
            raise InputError(
                f"{key}: {backbone} has no such option; it has {', '.join(fields) or 'none'}"
            )
        if not _is_like(value, fields[name]):
            raise InputError(f"{key} = {value!r} should be like {fields[name]!r}")
    return given


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has a default's type; any has that of None or of no default."""
    if default is None or default is dataclasses.MISSING:
        return True
    if isinstance(default, tuple) and default:
        few = isinstance(value, tuple) and len(value) == len(default)
        return few and all(_is_like(v, d) for v, d in zip(value, default, strict=True))
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _deform(config: Any, bias: bool = False) -> Deform:
    return Deform(version=config.model.dcn.version, groups=config.model.dcn.groups, bias=bias)
