"""Feature pyramid network.

Source: detectron2/modeling/backbone/fpn.py, FPN and LastLevelMaxPool.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Int

from solov2_jax import ops
from solov2_jax.models.layers import Conv, ConvNorm, xavier_init


class FPN(nn.Module):
    """{"res2".."res5"} to {"p2".."p6"}: lateral 1x1, nearest top-down sum, output 3x3.

    Convolutions have biases and no norm, or a norm and no biases; p6 is p5 subsampled by two.

    Attributes:
      norm: "none", "gn" or "sync_bn", see `ConvNorm`.
    """

    channels: int = 256
    dtype: Dtype = jnp.float32
    norm: str = "none"
    frozen: Sequence[str] = ()  # see `ConvNorm`

    @nn.compact
    def __call__(
        self, features: dict[str, jax.Array], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is the image's."""
        conv = functools.partial(Conv, self.channels, kernel_init=xavier_init, dtype=self.dtype)
        if self.norm != "none":
            conv = functools.partial(
                ConvNorm,
                self.channels,
                kernel_init=xavier_init,
                dtype=self.dtype,
                norm=self.norm,
                frozen=self.frozen,
            )

        out, top = {}, None
        for level in (5, 4, 3, 2):
            of_level = ops.at_stride(extent, 2**level)
            x = conv(1, name=f"lateral{level}")(features[f"res{level}"], of_level)
            top = x if top is None else x + ops.upsample2x_nearest(top)
            out[f"p{level}"] = conv(3, name=f"output{level}")(top, of_level)
        out["p6"] = out["p5"][:, ::2, ::2]
        return {name: out[name] for name in sorted(out)}
