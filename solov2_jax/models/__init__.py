"""The network: image -> Outputs."""

from typing import Any

import jax.numpy as jnp

from solov2_jax.models.solov2 import SOLOv2, intermediates

__all__ = ["SOLOv2", "build_model", "intermediates"]

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
    return SOLOv2(
        num_classes=num_classes,
        depth=model.backbone.depth,
        freeze_at=model.backbone.freeze_at,
        stride_in_1x1=model.backbone.stride_in_1x1,
        backbone_norm=model.backbone.norm,
        fpn_channels=model.fpn.channels,
        num_grids=tuple(model.ins_head.num_grids),
        num_kernels=model.ins_head.num_kernels,
        head_channels=model.ins_head.channels,
        head_convs=model.ins_head.num_convs,
        mask_channels=model.mask_head.channels,
        prior_prob=model.ins_head.prior_prob,
        dtype=_DTYPES[model.dtype],
        frozen=tuple(config.optim.freeze),
        matmul_precision=model.matmul_precision,
    )
