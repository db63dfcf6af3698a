"""The features that dynamic kernels turn into heatmaps of key points."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.heads import MaskHead, coords_of

COORDS = 4  # x, y and their squares, by which a kernel can place a gaussian by itself
SCALE = 4.0  # of x and y in -1..1: what the features' scale is


class KeypointHead(nn.Module):
    """A small mask head, whose features get coordinates."""

    channels: int
    norm: str = "gn"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: dict[str, jax.Array], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h4 w4 F"]:
        """Returns float32 features, F = channels + 4."""
        head = MaskHead(self.channels, self.channels, self.dtype, norm=self.norm, name="features")
        x = head(features, extent).astype(jnp.float32)
        xy = SCALE * coords_of(x, ops.at_stride(extent, 4))
        return jnp.concatenate([x, xy, jnp.square(xy)], axis=-1)


def kernel_size(channels: int) -> int:
    """Returns how many numbers the kernel of one point has: weights and a bias."""
    return channels + COORDS + 1
