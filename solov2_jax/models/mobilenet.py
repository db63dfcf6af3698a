"""MobileNetV3-large: inverted residuals with squeeze and excitation, for small machines.

Source: torchvision/models/mobilenetv3.py; timm's mobilenetv3_large_100. The last 1x1
convolution, to 960 channels, is left out. PaddleDetection's network for detectors, which has
it, is another: see `PaddleMobileNetV3`.
"""

import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.backbone import LEVELS, Backbone
from solov2_jax.models.dense import Dense
from solov2_jax.models.layers import ConvNorm

# Of each block: kernel, channels inside, channels, squeeze and excitation, hard swish.
BlockSizes = tuple[int, int, int, bool, bool]
STEM: BlockSizes = (3, 16, 16, False, False)
STAGES: tuple[tuple[BlockSizes, ...], ...] = (
    ((3, 64, 24, False, False), (3, 72, 24, False, False)),
    ((5, 72, 40, True, False), (5, 120, 40, True, False), (5, 120, 40, True, False)),
    (
        (3, 240, 80, False, True),
        (3, 200, 80, False, True),
        (3, 184, 80, False, True),
        (3, 184, 80, False, True),
        (3, 480, 112, True, True),
        (3, 672, 112, True, True),
    ),
    ((5, 672, 160, True, True), (5, 960, 160, True, True), (5, 960, 160, True, True)),
)
LAST: BlockSizes = (1, 960, 960, False, True)  # PaddleDetection's last convolution


class SqueezeExcitation(nn.Module):
    """Factors of the channels by their means over the image.

    Attributes:
      paddle: as PaddleDetection has it: a quarter of the channels, whatever they are, and
        a slope of 0.2 instead of 1/6.
    """

    paddle: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        total = jnp.sum(ops.zero_outside(x, extent).astype(jnp.float32), (1, 2))
        sides = jnp.asarray([x.shape[1:3]]) if extent is None else extent
        mean = (total / jnp.prod(sides, 1, keepdims=True)).astype(self.dtype)
        inside = channels // 4 if self.paddle else _squeezed(channels)
        squeezed = nn.relu(Dense(inside, dtype=self.dtype, name="reduce")(mean))
        logits = Dense(channels, dtype=self.dtype, name="expand")(squeezed)
        factor = nn.hard_sigmoid(1.2 * logits if self.paddle else logits)
        return x * factor[:, None, None]


def _squeezed(channels: int) -> int:
    """Returns a quarter of the channels, as a multiple of 8, at most a tenth below it."""
    quarter = channels // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise, squeeze and excitation, 1x1 to fewer.

    Without the first where `x` has that many channels already.

    Attributes:
      frozen: see `ConvNorm`.
      paddle: as PaddleDetection has it: the first, at stride 1, in any case.
    """

    sizes: BlockSizes
    stride: int = 1
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()
    paddle: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        kernel, inside, channels, excite, swish = self.sizes
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype, frozen=self.frozen)
        act = nn.hard_swish if swish else nn.relu
        y = x
        if inside != x.shape[-1] or (self.paddle and self.stride == 1):
            y = act(conv(inside, 1, name="expand")(y, extent))
        y = act(conv(inside, kernel, self.stride, groups=inside, name="dw")(y, extent))
        extent = ops.at_stride(extent, self.stride)
        if excite:
            y = SqueezeExcitation(self.paddle, self.dtype, name="se")(y, extent)
        y = conv(channels, 1, name="project")(y, extent)
        return x + y if y.shape == x.shape else y


class MobileStem(nn.Module):
    """3x3 convolution at stride 2, hard swish, one block."""

    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()
    paddle: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ 16"]:
        options = {"norm": self.norm, "dtype": self.dtype, "frozen": self.frozen}
        x = nn.hard_swish(ConvNorm(STEM[2], 3, 2, name="conv1", **options)(x, extent))
        block = InvertedResidual(STEM, name="block", paddle=self.paddle, **options)
        return block(x, ops.at_stride(extent, 2))


class MobileNetV3(Backbone):
    """Image to {"res2": ..., "res5": ...} of 24, 40, 112 and 160 channels."""

    norm: str = "frozen_bn"
    paddle: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        stem = MobileStem(
            norm=self.norm_of(self.norm, 1),
            dtype=self.dtype,
            frozen=self.frozen,
            paddle=self.paddle,
            name="stem",
        )
        x, extent = self.cut(stem(image, extent), 1), ops.at_stride(extent, 2)
        features = {}
        for stage, (level, blocks) in enumerate(zip(LEVELS, STAGES, strict=True), start=2):
            options = {
                "norm": self.norm_of(self.norm, stage),
                "dtype": self.dtype,
                "frozen": self.frozen,
            }
            for i, sizes in enumerate(blocks):
                stride = 2 if i == 0 else 1
                block = InvertedResidual(
                    sizes=sizes,
                    stride=stride,
                    paddle=self.paddle,
                    name=f"{level}_{i}",
                    **options,
                )
                x, extent = block(x, extent), ops.at_stride(extent, stride)
            if self.paddle:
                _, inside, _, _, swish = STAGES[stage - 1][0] if stage < 5 else LAST
                x = ConvNorm(inside, 1, name=f"{level}_out", **options)(x, extent)
                x = nn.hard_swish(x) if swish else nn.relu(x)
            x = features[level] = self.cut(x, stage)
        return features


class PaddleMobileNetV3(MobileNetV3):
    """Image to {"res2": ..., "res5": ...} of 72, 240, 672 and 960 channels.

    A stage ends with the first 1x1 of the next one's first block, the last with a 1x1 of its
    own. Squeezing, its slope and the first block are other than torchvision's too.

    Source: PaddleDetection at release 2.3, static/ppdet/modeling/backbones/mobilenet_v3.py,
    MobileNetV3RCNN with feature_maps [2, 3, 4, 6].
    """

    paddle: ClassVar[bool] = True
