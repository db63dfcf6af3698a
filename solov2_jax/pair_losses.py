"""Sums over pairs of terms of their masks, with gradients, a few masks at a time.

All masks of a batch are the largest thing in training. Here the masks of a few pairs are
made, compared and forgotten, and their gradient is taken with them: nothing is computed twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from solov2_jax import ops
from solov2_jax.platforms import PlatformOp, Tuning

PyTree = Any
# (logits [B, n, h4, w4], what belongs to these n pairs of each image, what belongs to the
# images, which pixels count [B, h4, w4] or None) -> T terms, each [B, n].
Terms = Callable[[Array, PyTree, PyTree, Array | None], Sequence[Array]]
MAPS = 5  # of a mask's size that a term holds at the same time, about


def _pair_loss(
    terms: Terms,
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    of_pairs: PyTree,
    of_images: PyTree,
    weight: Float[Array, "B P"],
    factors: Float[Array, "T"],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "T"]]:
    """Returns the sum over pairs of their weights times each term, times its factor and added,
    and each term's sum without its factor (no gradient).

    The gradient is that of kernels and features alone.

    Args:
      terms: a function of a module, which is compiled once.
      of_pairs: arrays [B, P, ...].
      of_images: arrays [B, ...].
      weight: of the pairs; 0 of those that are not looked at.
      inside: the pixels that exist; None: all.
    """
    return _forward(terms, kernels, mask_feat, of_pairs, of_images, weight, factors, inside)[0]


def _forward(
    terms: Terms,
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    of_pairs: PyTree,
    of_images: PyTree,
    weight: Float[Array, "B P"],
    factors: Float[Array, "T"],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[tuple[Float[Array, ""], Float[Array, "T"]], Sequence[Array]]:
    loss, sums, grad_kernels, grad_feat = _pair_sums(
        kernels, mask_feat, of_pairs, of_images, weight, factors, inside, terms=terms
    )
    return (loss, sums), (grad_kernels, grad_feat)


def _backward(
    terms: Terms,
    residuals: Sequence[Array],
    cotangents: tuple[Float[Array, ""], Float[Array, "T"]],
) -> tuple[Array, Array, None, None, None, None, None]:
    del terms
    grad_kernels, grad_feat = (g * cotangents[0].astype(g.dtype) for g in residuals)
    return grad_kernels, grad_feat, None, None, None, None, None


pair_loss = jax.custom_vjp(_pair_loss, nondiff_argnums=(0,))
pair_loss.defvjp(_forward, _backward)


@jax.named_scope("pair_loss")
def _sums_in_chunks(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    of_pairs: PyTree,
    of_images: PyTree,
    weight: Float[Array, "B P"],
    factors: Float[Array, "T"],
    inside: Bool[Array, "B h4 w4"] | None,
    *,
    terms: Terms,
    tuning: Tuning,
) -> tuple[Float[Array, ""], Float[Array, "T"], Float[Array, "B P E"], Float[Array, "B h4 w4 E"]]:
    """Returns `pair_loss`'s two results, and the gradients of kernels and features."""
    b, num_pairs, _ = kernels.shape
    pixels = b * mask_feat.shape[1] * mask_feat.shape[2] * MAPS
    size = max(1, min(num_pairs, tuning.dice_logits // pixels))
    num_slots = num_pairs + -num_pairs % size
    # The pairs that count first: the chunks of the others are left out where that saves time.
    order = jnp.argsort(weight <= 0, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, num_slots - num_pairs)))
    real = jnp.arange(num_slots)[None] < num_pairs

    def sort(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    weight, kernels, of_pairs = sort(weight) * real, sort(kernels), jax.tree.map(sort, of_pairs)

    def chunk_loss(kernels: Array, feat: Array, weight: Array, of_pairs: PyTree):
        logits = ops.logits_inside(ops.dynamic_conv(kernels, feat), inside)
        sums = jnp.stack([jnp.sum(weight * t) for t in terms(logits, of_pairs, of_images, inside)])
        return jnp.sum(factors * sums), sums

    gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

    def body(i, carry):
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

        loss, sums, grad_kernels, grad_feat = carry
        (value, more), grads = gradient(
            cut(kernels), mask_feat, cut(weight), jax.tree.map(cut, of_pairs)
        )
        put = jax.lax.dynamic_update_slice_in_dim
        grad_kernels = put(grad_kernels, grads[0].astype(jnp.float32), i * size, axis=1)
        return loss + value, sums + more, grad_kernels, grad_feat + grads[1]

    zeros = jnp.zeros(kernels.shape, jnp.float32), jnp.zeros(mask_feat.shape, jnp.float32)
    carry = jnp.float32(0), jnp.zeros(factors.shape, jnp.float32), *zeros
    last = num_slots // size
    if len(tuning.slot_parts) > 1:  # the host may wait for the number
        last = (jnp.max(jnp.sum(weight > 0, axis=1)) + size - 1) // size
    all_at_once = num_slots == size and len(tuning.slot_parts) == 1
    carry = body(0, carry) if all_at_once else jax.lax.fori_loop(0, last, body, carry)
    loss, sums, sorted_grads, grad_feat = carry
    grad_kernels = jnp.zeros((b, num_pairs, kernels.shape[2]), jnp.float32)
    rows = jnp.arange(b)[:, None]
    grad_kernels = grad_kernels.at[rows, order].add(sorted_grads * real[..., None])
    return loss, sums, grad_kernels.astype(kernels.dtype), grad_feat.astype(mask_feat.dtype)


_pair_sums = PlatformOp.tuned("pair_sums", _sums_in_chunks)
