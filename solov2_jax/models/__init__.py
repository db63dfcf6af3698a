"""The network: image -> Outputs."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from solov2_jax.models.deform import Deform
from solov2_jax.models.resnet import ResNet
from solov2_jax.models.solov2 import SOLOv2, intermediates

__all__ = ["ResNet", "SOLOv2", "build_backbone", "build_model", "intermediates"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(config: Any, num_classes: int) -> SOLOv2:
    """Returns the network that `config.model` describes, with the norms that
    `config.optim.freeze` freezes.

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
        matmul_precision=model.matmul_precision,
    )


def build_backbone(config: Any) -> nn.Module:
    """Returns the backbone that `config.model.backbone` describes; see `SOLOv2.backbone`."""
    model, backbone = config.model, config.model.backbone
    return ResNet(
        depth=backbone.depth,
        freeze_at=backbone.freeze_at,
        stride_in_1x1=backbone.stride_in_1x1,
        groups=backbone.groups,
        width_per_group=backbone.width_per_group,
        deep_stem=backbone.deep_stem,
        avg_down=backbone.avg_down,
        deform=_deform(config),
        deform_stages=tuple(model.dcn.stages),
        norm=backbone.norm,
        dtype=_DTYPES[model.dtype],
        frozen=tuple(config.optim.freeze),
    )


def _deform(config: Any, bias: bool = False) -> Deform:
    return Deform(version=config.model.dcn.version, groups=config.model.dcn.groups, bias=bias)
