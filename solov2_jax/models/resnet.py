"""ResNet-18/34/50/101/152 with batch norm, frozen or trained, or group norm.

Source: detectron2/modeling/backbone/resnet.py, build_resnet_backbone.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.layers import ConvNorm, residual_scale_init

# depth -> (blocks of res2..res5, bottleneck)
STAGES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the stride is in the first."""

    features: int
    stride: int = 1
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # see `ConvNorm`

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)
        y = nn.relu(conv(self.features, 3, self.stride, name="conv1")(x, extent))
        last = conv(self.features, 3, scale_init=residual_scale_init, name="conv2")
        y = last(y, ops.at_stride(extent, self.stride))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, name="shortcut")(x, extent)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide.

    `stride_in_1x1` puts the stride in the first (MSRA and Caffe weights), else it is in
    the 3x3 (torchvision weights).
    """

    features: int
    stride: int = 1
    stride_in_1x1: bool = True
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # see `ConvNorm`

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)
        width = self.features // 4
        stride1, stride2 = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        y = nn.relu(conv(width, 1, stride1, name="conv1")(x, extent))
        y = nn.relu(conv(width, 3, stride2, name="conv2")(y, ops.at_stride(extent, stride1)))
        last = conv(self.features, 1, scale_init=residual_scale_init, name="conv3")
        y = last(y, ops.at_stride(extent, self.stride))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, name="shortcut")(x, extent)
        return nn.relu(x + y)


class Stem(nn.Module):
    """7x7 convolution at stride 2, ReLU, 3x3 maximum at stride 2."""

    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # see `ConvNorm`

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ 64"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)
        return ops.max_pool_3x3_stride2(nn.relu(conv(64, 7, 2, name="conv1")(x, extent)))


class ResNet(nn.Module):
    """Image to {"res2": ..., "res5": ...} at strides 4, 8, 16, 32.

    The first `freeze_at` of (stem, res2, ... res5) get no gradient.
    """

    depth: int = 50
    freeze_at: int = 2
    stride_in_1x1: bool = True
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # see `ConvNorm`

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        if self.depth not in STAGES:
            raise ValueError(f"model.backbone.depth is {self.depth}; known are {list(STAGES)}")
        num_blocks, bottleneck = STAGES[self.depth]
        x = Stem(self._norm_of(1), self.dtype, self.frozen, name="stem")(image, extent)
        extent = ops.at_stride(extent, 4)
        if self.freeze_at >= 1:
            x = lax.stop_gradient(x)
        features = {}
        for stage, blocks in enumerate(num_blocks, start=2):
            block = BasicBlock
            if bottleneck:
                block = functools.partial(BottleneckBlock, stride_in_1x1=self.stride_in_1x1)
            for i in range(blocks):
                stride = 2 if stage > 2 and i == 0 else 1
                x = block(
                    features=(256 if bottleneck else 64) * 2 ** (stage - 2),
                    stride=stride,
                    norm=self._norm_of(stage),
                    dtype=self.dtype,
                    frozen=self.frozen,
                    name=f"res{stage}_{i}",
                )(x, extent)
                extent = ops.at_stride(extent, stride)
            if self.freeze_at >= stage:
                x = lax.stop_gradient(x)
            features[f"res{stage}"] = x
        return features

    def _norm_of(self, stage: int) -> str:
        """Returns the norm of a stage: a frozen stage's batch norm is frozen too."""
        frozen = self.norm == "sync_bn" and self.freeze_at >= stage
        return "frozen_bn" if frozen else self.norm
