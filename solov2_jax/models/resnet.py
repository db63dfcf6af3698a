"""ResNet-18/34/50/101/152 and its variants, with batch norm, frozen or trained, or group norm.

ResNeXt (`groups`), ResNet-D or vd (`deep_stem`, `avg_down`) and deformable convolutions.

Source: detectron2/modeling/backbone/resnet.py, build_resnet_backbone; mmdet/models/backbones,
ResNeXt and ResNetV1d; PaddleDetection's ppdet/modeling/backbones/resnet.py, variant "d".
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.backbone import Backbone
from solov2_jax.models.deform import Deform
from solov2_jax.models.layers import ConvNorm, residual_scale_init

# depth -> (blocks of res2..res5, bottleneck)
STAGES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class Block(nn.Module):
    """What the kinds of residual blocks share.

    Attributes:
      avg_down: the shortcut halves its input by the mean of 2x2, not by the stride.
      frozen: see `ConvNorm`.
      deform: how the second convolution is deformed, None: not at all.
    """

    features: int
    stride: int = 1
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    avg_down: bool = False
    frozen: Sequence[str] = ()
    deform: Deform | None = None

    @property
    def _conv(self) -> functools.partial:
        return functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)

    def _shortcut(self, x: jax.Array, extent: Int[Array, "B 2"] | None) -> jax.Array:
        if x.shape[-1] == self.features:
            return x
        stride = self.stride
        if self.avg_down and stride == 2:
            x, extent, stride = ops.downsample2x_bilinear(x), ops.at_stride(extent, 2), 1
        return self._conv(self.features, 1, stride, name="shortcut")(x, extent)


class BasicBlock(Block):
    """Two 3x3 convolutions; the stride is in the first."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        conv = self._conv
        y = nn.relu(conv(self.features, 3, self.stride, name="conv1")(x, extent))
        init = residual_scale_init
        last = conv(self.features, 3, scale_init=init, deform=self.deform, name="conv2")
        y = last(y, ops.at_stride(extent, self.stride))
        return nn.relu(self._shortcut(x, extent) + y)


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; the 3x3 has the groups.

    `stride_in_1x1` puts the stride in the first (MSRA and Caffe weights), else it is in
    the 3x3 (torchvision weights).
    """

    stride_in_1x1: bool = True
    groups: int = 1
    width: int = 64  # of the 3x3

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        conv = self._conv
        stride1, stride2 = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        y = nn.relu(conv(self.width, 1, stride1, name="conv1")(x, extent))
        middle = conv(self.width, 3, stride2, groups=self.groups, deform=self.deform, name="conv2")
        y = nn.relu(middle(y, ops.at_stride(extent, stride1)))
        last = conv(self.features, 1, scale_init=residual_scale_init, name="conv3")
        y = last(y, ops.at_stride(extent, self.stride))
        return nn.relu(self._shortcut(x, extent) + y)


class Stem(nn.Module):
    """7x7 convolution at stride 2, ReLU, 3x3 maximum at stride 2.

    `deep`: three 3x3 convolutions, of 32, 32 and 64 channels, the first at stride 2.
    """

    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # see `ConvNorm`
    deep: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ 64"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)
        sizes = ((32, 3, 2), (32, 3, 1), (64, 3, 1)) if self.deep else ((64, 7, 2),)
        for i, (features, size, stride) in enumerate(sizes, start=1):
            x = nn.relu(conv(features, size, stride, name=f"conv{i}")(x, extent))
            extent = ops.at_stride(extent, stride)
        return ops.max_pool_3x3_stride2(x)


class ResNet(Backbone):
    """Image to {"res2": ..., "res5": ...} at strides 4, 8, 16, 32.

    The first `freeze_at` of (stem, res2, ... res5) get no gradient.

    Attributes:
      groups, width_per_group: of the 3x3 of bottlenecks; their product is its width in res2.
      deep_stem, avg_down: see `Stem` and `Block`.
      deform: how the convolutions of `deform_stages`, such as (3, 4, 5), are deformed.
    """

    depth: int = 50
    stride_in_1x1: bool = True
    groups: int = 1
    width_per_group: int = 64
    deep_stem: bool = False
    avg_down: bool = False
    deform: Deform | None = None
    deform_stages: Sequence[int] = ()
    norm: str = "frozen_bn"

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        if self.depth not in STAGES:
            raise ValueError(f"model.backbone.depth is {self.depth}; known are {list(STAGES)}")
        num_blocks, _ = STAGES[self.depth]
        stem = Stem(
            self.norm_of(self.norm, 1), self.dtype, self.frozen, self.deep_stem, name="stem"
        )
        x, extent = self.cut(stem(image, extent), 1), ops.at_stride(extent, 4)
        features = {}
        for stage, blocks in enumerate(num_blocks, start=2):
            block = self._block_of(stage)
            for i in range(blocks):
                stride = 2 if stage > 2 and i == 0 else 1
                x = block(stride=stride, name=f"res{stage}_{i}")(x, extent)
                extent = ops.at_stride(extent, stride)
            x = features[f"res{stage}"] = self.cut(x, stage)
        return features

    def _block_of(self, stage: int) -> functools.partial:
        """Returns the block of a stage, but for its stride and name."""
        _, bottleneck = STAGES[self.depth]
        scale = 2 ** (stage - 2)
        shared = {
            "features": (256 if bottleneck else 64) * scale,
            "norm": self.norm_of(self.norm, stage),
            "dtype": self.dtype,
            "avg_down": self.avg_down,
            "frozen": self.frozen,
            "deform": self.deform if stage in self.deform_stages else None,
        }
        if not bottleneck:
            return functools.partial(BasicBlock, **shared)
        return functools.partial(
            BottleneckBlock,
            stride_in_1x1=self.stride_in_1x1,
            groups=self.groups,
            width=self.groups * self.width_per_group * scale,
            **shared,
        )
