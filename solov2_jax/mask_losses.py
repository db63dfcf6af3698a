"""Further terms of a pair's mask beside dice: pixel by pixel, for thin masks, and its border."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from solov2_jax.losses import EPSILON


def further_mask_terms(
    logits: Float[Array, "B P h4 w4"],
    instance: Int[Array, "B P"],
    masks: UInt8[Array, "B G h4 w4"],
    inside: Bool[Array, "B h4 w4"] | None = None,
    *,
    gamma: float,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns `binary_focal` and `border_distance` of each mask: `pair_loss`'s terms.

    Args:
      instance: of each mask, which object's it is.
      inside: see `pair_loss`, which has made the logits beyond it small.
    """
    target = jnp.take_along_axis(masks, instance[:, :, None, None], axis=1).astype(jnp.float32)
    return binary_focal(logits, target, gamma), border_distance(
        jax.nn.sigmoid(logits), target, inside
    )


def binary_focal(
    logits: Float[Array, "B P h4 w4"], target: Float[Array, "B P h4 w4"], gamma: float
) -> Float[Array, "B P"]:
    """Returns the cross entropy of a mask's pixels, easy ones weighted less, over the object's
    number of pixels: a thin object's count as much as a large one's.

    Source: Lin et al. 2017, "Focal Loss", whose division by the positives this is; no alpha.
    """
    towards = jnp.where(target > 0, logits, -logits)
    easy = jnp.exp(gamma * jax.nn.log_sigmoid(-towards)) if gamma else 1.0
    loss = -jnp.sum(easy * jax.nn.log_sigmoid(towards), axis=(2, 3))
    return loss / jnp.maximum(jnp.sum(target, axis=(2, 3)), 1.0)


def border_distance(
    soft: Float[Array, "B P h4 w4"],
    target: Float[Array, "B P h4 w4"],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> Float[Array, "B P"]:
    """Returns 1 minus the dice coefficient of two masks' borders.

    A border is what changes within a pixel to any side: the largest minus the smallest of
    3 x 3, which is two mask-feature pixels, eight input pixels, wide for a sharp mask.
    """
    ours, theirs = _border(soft, inside), _border(target, inside)
    squares = jnp.sum(ours * ours, axis=(2, 3)) + jnp.sum(theirs * theirs, axis=(2, 3))
    return 1.0 - 2.0 * jnp.sum(ours * theirs, axis=(2, 3)) / (squares + EPSILON)


def _border(
    x: Float[Array, "B P h4 w4"], inside: Bool[Array, "B h4 w4"] | None
) -> Float[Array, "B P h4 w4"]:
    if inside is None:
        return _largest_of_9(x) + _largest_of_9(-x)
    # What does not exist is no pixel's neighbour, and has no border.
    exists = inside[:, None]
    least = jnp.finfo(x.dtype).min
    sides = [_largest_of_9(jnp.where(exists, side, least)) for side in (x, -x)]
    return jnp.where(exists, sides[0] + sides[1], 0.0)


def _largest_of_9(x: Float[Array, "B P h4 w4"]) -> Float[Array, "B P h4 w4"]:
    for axis in (2, 3):
        width = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(x, width, mode="edge"), x.shape[axis]
        parts = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x
