"""ConvNeXt: 7x7 depthwise convolutions and layer norms.

Source: torchvision/models/convnext.py and timm's, without stochastic depth; the norms of the
results are those of the paper's detectors (facebookresearch/ConvNeXt, object_detection).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.backbone import LEVELS, Backbone
from solov2_jax.models.dense import (
    Dense,
    DepthwiseConv,
    LayerNorm,
    PatchConv,
    PatchStem,
    gelu,
    scale_channels,
)

KERNEL = 7


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two layers with GELU between; added to the input by `gamma`."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        y = DepthwiseConv(KERNEL, dtype=self.dtype, name="dw")(ops.zero_outside(x, extent))
        y = LayerNorm(name="ln")(y)
        y = gelu(Dense(4 * channels, dtype=self.dtype, name="fc1")(y))
        y = Dense(channels, dtype=self.dtype, name="fc2")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
        return x + scale_channels(y, gamma)


class Down(nn.Module):
    """A norm, then patches of 2 x 2."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ D"]:
        return PatchConv(self.features, 2, self.dtype, name="conv")(LayerNorm(name="ln")(x))


class ConvNeXt(Backbone):
    """Image to {"res2": ..., "res5": ...}; the defaults are ConvNeXt-T.

    Attributes:
      depths, widths: blocks and channels of each stage.
      out_norm: whether a layer norm of its own ends each result.
    """

    depths: Sequence[int] = (3, 3, 9, 3)
    widths: Sequence[int] = (96, 192, 384, 768)
    out_norm: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        x = self.cut(PatchStem(self.widths[0], dtype=self.dtype, name="stem")(image), 1)
        features, extent = {}, ops.at_stride(extent, 4)
        for i, level in enumerate(LEVELS):
            if i:
                x = Down(self.widths[i], self.dtype, name=f"{level}_down")(x)
                extent = ops.at_stride(extent, 2)
            for n in range(self.depths[i]):
                x = ConvNeXtBlock(self.dtype, name=f"{level}_{n}")(x, extent)
            x = self.cut(x, i + 2)
            features[level] = LayerNorm(name=f"out_ln{i + 2}")(x) if self.out_norm else x
        return features

    def layers(self) -> Sequence[Sequence[str]]:
        """Returns the stem, then up to three blocks at a time.

        Source: the layer-wise rates of the paper's detectors: 6 layers of T, 12 of S.
        """
        layers: list[tuple[str, ...]] = [("stem*",)]
        for level, depth in zip(LEVELS, self.depths, strict=True):
            for first in range(0, depth, 3):
                blocks = tuple(f"{level}_{n}/*" for n in range(first, min(first + 3, depth)))
                layers.append((f"{level}_down/*", *blocks) if first == 0 else blocks)
        return layers
