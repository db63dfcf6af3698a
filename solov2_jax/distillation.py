"""What a student network learns from a teacher's outputs on the same images.

Both terms and their gradients are exactly zero where the outputs are equal, and need no layer
between networks of different widths.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from solov2_jax import ops

EPSILON = 1e-6  # in both denominators


def soft_mask_terms(
    logits: Float[Array, "B P h4 w4"],
    teacher_kernels: Float[Array, "B P T"],
    teacher_feat: Float[Array, "B h4 w4 T"],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[Float[Array, "B P"]]:
    """Returns how far each mask is from the teacher's of the same cell, 0..1: `pair_loss`'s
    term.

    It is 1 minus the dice coefficient of the two soft masks, written as squared differences,
    so that equal masks give 0 and not a rounding.

    Args:
      inside: see `pair_loss`, which has made the student's logits beyond it small.
    """
    teacher = ops.dynamic_conv(teacher_kernels, teacher_feat)
    teacher = ops.logits_inside(teacher, inside)
    soft, wanted = jax.nn.sigmoid(logits), jax.nn.sigmoid(teacher)
    squares = jnp.sum(soft * soft, axis=(2, 3)) + jnp.sum(wanted * wanted, axis=(2, 3))
    return (jnp.sum(jnp.square(soft - wanted), axis=(2, 3)) / (squares + EPSILON),)


@jax.named_scope("attention")
def attention_distance(
    features: Float[Array, "B h4 w4 E"], teacher: Float[Array, "B h4 w4 T"]
) -> Float[Array, "B"]:
    """Returns the squared distance, 0..2, of where two networks' features are strong.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention": the sum of
    squares over channels, as a vector of length 1.
    """
    width = max(features.shape[-1], teacher.shape[-1])

    def wide(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

    # One sum for both, in one order; and a minimum that changes nothing, because a difference
    # of products is fused, and equal ones would not give 0 (see `targets`).
    strength = jnp.sum(jnp.square(jnp.stack([wide(features), wide(teacher)])), axis=-1)
    length = jnp.sqrt(jnp.sum(jnp.square(strength), axis=(2, 3), keepdims=True))
    ours, theirs = jnp.minimum(strength / (length + EPSILON), 2.0)
    return jnp.sum(jnp.square(ours - theirs), axis=(1, 2))
