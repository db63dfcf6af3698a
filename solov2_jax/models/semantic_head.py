"""The auxiliary head that training alone reads: each pixel's classes, on p2 .. p5."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.layers import ConvTower, SharedConv, prior_bias

LEVELS = ("p2", "p3", "p4", "p5")


class SemanticHead(nn.Module):
    """3x3 convolution, GroupNorm, ReLU, 1x1 convolution; all levels share the weights.

    Source: AdelaiDet adet/modeling/condinst/mask_branch.py, SEMANTIC_LOSS_ON, which looks at
    p3 alone, with two 3x3 convolutions.
    """

    num_classes: int
    channels: int = 128
    prior_prob: float = 0.01
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Mapping[str, jax.Array], extent: Int[Array, "B 2"] | None = None
    ) -> list[Float[Array, "B _ _ K"]]:
        """Returns float32 class logits at strides 4, 8, 16 and 32; `extent`, see `ops`, is the
        image's."""
        tower = ConvTower(self.channels, 1, self.dtype, name="tower")
        scaled = (ops.at_stride(extent, 4 * 2**i) for i in range(len(LEVELS)))
        extents = [of_level for of_level in scaled if of_level is not None]
        levels = tower([features[name] for name in LEVELS], extents)
        logits = SharedConv(
            self.num_classes,
            1,
            bias_init=prior_bias(self.prior_prob),
            dtype=jnp.float32,
            name="logits",
        )
        return logits(levels)
