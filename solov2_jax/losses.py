"""(Outputs, Targets) -> one scalar and its parts.

Sums are over the global batch and divided once, so padding, the number of devices and
how images are spread over them change nothing; the reference's means are per process.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from solov2_jax import ops
from solov2_jax.platforms import PlatformOp, Tuning
from solov2_jax.structs import Outputs, Targets

EPSILON = 2e-3  # in the dice denominator


class Normalizers(NamedTuple):
    """What the losses' sums are divided by: counts of the whole batch."""

    pairs: Float[Array, ""]  # of objects with a mask
    cells: Int[Array, ""]  # positive ones
    box_pairs: Float[Array, ""] | float = 0.0  # of objects that have a box only
    images: int = 1


def normalizers_of(targets: Targets, has_mask: Bool[Array, "B G"] | None = None) -> Normalizers:
    """Returns the counts of a batch, of which `solov2_loss` may see a microbatch.

    Args:
      has_mask: see `Batch`.
    """
    masks, boxes = pair_weights(targets, has_mask)
    images = len(targets.num_cells)
    return Normalizers(jnp.sum(masks), jnp.sum(targets.num_cells), jnp.sum(boxes), images)


def pair_weights(
    targets: Targets, has_mask: Bool[Array, "B G"] | None
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns the weights of the pairs whose object has a mask, and of those with a box only."""
    weight = targets.pair_weight
    if has_mask is None:
        return weight, jnp.zeros_like(weight)
    known = jnp.take_along_axis(has_mask, targets.pair_instance, axis=1)
    return jnp.where(known, weight, 0.0), jnp.where(known, 0.0, weight)


def solov2_loss(
    outputs: Outputs,
    targets: Targets,
    masks: UInt8[Array, "B G h4 w4"],
    *,
    focal_alpha: float,
    focal_gamma: float,
    focal_weight: float,
    dice_weight: float,
    normalizers: Normalizers | None = None,
    has_mask: Bool[Array, "B G"] | None = None,
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the total loss and the metrics, all float32 scalars.

    With the `normalizers` of a larger batch, the results of its microbatches add up to its
    own. Pairs without a mask (`has_mask` of `Batch`) teach the classes only, and are not in
    `mean_iou`. Pixels that are not `inside` (see `pair_dice`) do not count.

    Metrics: `loss_ins`, `loss_cate` (weighted, they add up to the total); `num_pairs`,
    of which `pairs_dropped` for want of slots; `num_cells`, positive ones; `mean_iou`
    of the predicted masks at 0.5 with their pair's, 0 without pairs; `positive_images`,
    those with at least one pair.

    Source: AdelaiDet adet/modeling/solov2/solov2.py, SOLOv2.loss: dice averages over
    pairs, focal is a sum over (positive cells + 1). A batch without pairs is no error.
    """
    normalizers = normalizers or normalizers_of(targets, has_mask)
    weight, _ = pair_weights(targets, has_mask)
    kernels = jnp.take_along_axis(outputs.kernel, targets.pair_cell[..., None], axis=1)
    slots = jnp.arange(1, weight.shape[1] + 1)[None]
    num_slots = jnp.max(jnp.where(weight > 0, slots, 0))
    dice, iou = pair_dice(
        kernels, outputs.mask_feat, masks, targets.pair_instance, num_slots, inside
    )
    num_pairs = jnp.maximum(normalizers.pairs, 1.0)
    loss_ins = dice_weight * jnp.sum(weight * (1.0 - dice)) / num_pairs

    focal = focal_loss(outputs.cate, targets.cate, focal_alpha, focal_gamma)
    loss_cate = focal_weight * focal / (normalizers.cells + 1)

    kept = jnp.sum(targets.pair_weight > 0, axis=1, dtype=jnp.int32)
    metrics = {
        "loss_ins": loss_ins,
        "loss_cate": loss_cate,
        "num_pairs": jnp.sum(targets.num_pairs),
        "pairs_dropped": jnp.sum(targets.num_pairs - kept),
        "num_cells": jnp.sum(targets.num_cells),
        "positive_images": jnp.sum(targets.num_pairs > 0),
        "mean_iou": jnp.sum(weight * iou) / num_pairs,
    }
    metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    return loss_ins + loss_cate, metrics


@jax.named_scope("focal")
def focal_loss(
    logits: Float[Array, "*n K"],
    labels: Int[Array, "*n"],
    alpha: float,
    gamma: float,
    weight: Array | None = None,
) -> Float[Array, ""]:
    """Returns the sum of the sigmoid focal loss; the label K is background.

    Args:
      weight: factor on each label's terms, [*n].

    Source: fvcore sigmoid_focal_loss, written with logarithms: no power of a rounded 0,
    and finite gradients at any logit and gamma.
    """
    classes = jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    positive = labels[..., None] == classes
    logits = logits.astype(jnp.float32)
    towards = jnp.where(positive, logits, -logits)
    log_right, log_wrong = jax.nn.log_sigmoid(towards), jax.nn.log_sigmoid(-towards)
    balance = jnp.where(positive, alpha, 1.0 - alpha)
    loss = balance * jnp.exp(gamma * log_wrong) * log_right
    return -jnp.sum(loss if weight is None else loss * weight[..., None])


@jax.custom_vjp
def pair_dice(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    pair_instance: Int[Array, "B P"],
    num_slots: Int[Array, ""],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns each pair's dice coefficient, and its mask IoU at 0.5 (no gradient).

    The soft masks of all slots are the largest thing in training, so they are computed
    in tiles of image rows and never kept: the backward pass computes them again.

    Args:
      num_slots: slots from here on are skipped where that saves time; 0 stands there
        or a value that the caller must give no weight.
      inside: the pixels that exist; None: all.

    Source: AdelaiDet adet/modeling/solov2/loss.py, dice_loss: denominator of squares,
    over the whole padded map.
    """
    return _pair_dice_fwd(kernels, mask_feat, masks, pair_instance, num_slots, inside)[0]


class _DiceResiduals(NamedTuple):
    """What the backward pass of `pair_dice` needs."""

    kernels: Float[Array, "B P E"]
    mask_feat: Float[Array, "B h4 w4 E"]
    masks: UInt8[Array, "B G h4 w4"]
    pair_instance: Int[Array, "B P"]
    num_slots: Int[Array, ""]
    inside: Bool[Array, "B h4 w4"] | None
    dice: Float[Array, "B P"]
    denominator: Float[Array, "B P"]


@jax.named_scope("dice")
def _pair_dice_fwd(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    pair_instance: Int[Array, "B P"],
    num_slots: Int[Array, ""],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[tuple[Float[Array, "B P"], Float[Array, "B P"]], _DiceResiduals]:
    size = jnp.sum(masks, axis=(2, 3), dtype=jnp.int32).astype(jnp.float32)
    size = jnp.take_along_axis(size, pair_instance, axis=1)

    sums = _dice_sums(kernels, mask_feat, masks, pair_instance, num_slots, inside)
    overlap, squares, hits, area = jnp.moveaxis(sums, -1, 0)
    denominator = squares + size + EPSILON
    dice = 2.0 * overlap / denominator
    iou = hits / jnp.maximum(area + size - hits, 1.0)
    residuals = _DiceResiduals(
        kernels=kernels,
        mask_feat=mask_feat,
        masks=masks,
        pair_instance=pair_instance,
        num_slots=num_slots,
        inside=inside,
        dice=dice,
        denominator=denominator,
    )
    return (dice, iou), residuals


@jax.named_scope("dice")
def _pair_dice_bwd(
    residuals: _DiceResiduals, cotangents: tuple[Float[Array, "B P"], Float[Array, "B P"]]
) -> tuple[Float[Array, "B P E"], Float[Array, "B h4 w4 E"], None, None, None, None]:
    r = residuals
    slope = 2.0 * cotangents[0] / r.denominator
    grads = _dice_grads(
        r.kernels, r.mask_feat, r.masks, r.pair_instance, r.num_slots, r.inside, r.dice, slope
    )
    return *grads, None, None, None, None


pair_dice.defvjp(_pair_dice_fwd, _pair_dice_bwd)


def _tiled_dice_sums(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    pair_instance: Int[Array, "B P"],
    num_slots: Int[Array, ""],
    inside: Bool[Array, "B h4 w4"] | None,
    *,
    tuning: Tuning,
) -> Float[Array, "B P 4"]:
    """Returns each pair's sums: soft x target, soft squared, hard x target, hard."""

    def sums(slots: int) -> Float[Array, "B P 4"]:
        used, instance = kernels[:, :slots], pair_instance[:, :slots]

        def tile(rows, start, total):
            logits = ops.dynamic_conv(used, rows(mask_feat, axis=1))
            logits = ops.logits_inside(logits, None if inside is None else rows(inside, axis=1))
            target = _masks_of_pairs(rows(masks, axis=2), instance)
            soft, hard = jax.nn.sigmoid(logits), (logits > 0).astype(jnp.float32)
            parts = (soft * target, jnp.square(soft), hard * target, hard)
            return total + jnp.stack([jnp.sum(x, axis=(2, 3)) for x in parts], -1)

        total = jnp.zeros((*instance.shape, 4), jnp.float32)
        total = _over_tiles(tile, total, instance, masks, tuning.dice_logits)
        return _pad_slots(total, kernels.shape[1])

    return _switch_slots(sums, num_slots, kernels.shape[1], tuning.slot_parts)


def _tiled_dice_grads(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    pair_instance: Int[Array, "B P"],
    num_slots: Int[Array, ""],
    inside: Bool[Array, "B h4 w4"] | None,
    dice: Float[Array, "B P"],
    slope: Float[Array, "B P"],
    *,
    tuning: Tuning,
) -> tuple[Float[Array, "B P E"], Float[Array, "B h4 w4 E"]]:
    """Returns the gradients of kernels and features.

    Args:
      slope: twice the gradient of the dice, over its denominator.
    """

    def grads(slots: int) -> tuple[Array, Array]:
        used, instance = kernels[:, :slots], pair_instance[:, :slots]
        d, s = (x[:, :slots, None, None] for x in (dice, slope))
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        put_rows = jax.lax.dynamic_update_slice_in_dim

        def tile(rows, start, total):
            feat = rows(mask_feat, axis=1)
            logits = ops.dynamic_conv(used, feat)
            logits = ops.logits_inside(logits, None if inside is None else rows(inside, axis=1))
            soft = jax.nn.sigmoid(logits)
            target = _masks_of_pairs(rows(masks, axis=2), instance)
            grad = s * (target - d * soft) * soft * (1.0 - soft)
            grad = grad.astype(feat.dtype)
            grad_kernels = total[0] + einsum("bphw,bhwe->bpe", grad, feat)
            grad_feat = einsum("bphw,bpe->bhwe", grad, used).astype(feat.dtype)
            grad_feat = put_rows(total[1], grad_feat, start, axis=1)
            return grad_kernels, grad_feat

        total = jnp.zeros(used.shape, jnp.float32), jnp.zeros_like(mask_feat)
        grad_kernels, grad_feat = _over_tiles(tile, total, instance, masks, tuning.dice_logits)
        grad_kernels = grad_kernels.astype(kernels.dtype)
        return _pad_slots(grad_kernels, kernels.shape[1]), grad_feat

    return _switch_slots(grads, num_slots, kernels.shape[1], tuning.slot_parts)


# The images are those of one device: training calls this within `jax.shard_map`.
_dice_sums = PlatformOp.tuned("dice_sums", _tiled_dice_sums)
_dice_grads = PlatformOp.tuned("dice_grads", _tiled_dice_grads)


def _masks_of_pairs(
    masks: UInt8[Array, "B G rows w4"], instance: Int[Array, "B P"]
) -> Float[Array, "B P rows w4"]:
    target = jnp.take_along_axis(masks, instance[:, :, None, None], axis=1)
    return target.astype(jnp.float32)


def _over_tiles(tile: Callable, total, instance: Array, masks: Array, most_logits: int):
    """Returns `total` after `tile(rows, start, total)` for every tile of image rows.

    A tile has at most so many logits, if it can.
    `rows(x, axis)` cuts the tile's rows out of x; `start` is the first of them.
    """
    h4, w4 = masks.shape[2:]
    divisors = [r for r in range(1, h4 + 1) if h4 % r == 0]
    size = max((r for r in divisors if instance.size * r * w4 <= most_logits), default=1)

    def body(i, total):
        def rows(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        return tile(rows, i * size, total)

    return jax.lax.fori_loop(0, h4 // size, body, total) if size < h4 else body(0, total)


def _switch_slots(
    of_slots: Callable, num_slots: Array, max_slots: int, slot_parts: Sequence[float]
):
    """Returns `of_slots(n)` for the smallest n, a part of `max_slots`, that suffices."""
    steps = [math.ceil(part * max_slots) for part in slot_parts]
    if len(steps) == 1:
        return of_slots(max_slots)
    index = jnp.sum(num_slots > np.array(steps[:-1], np.int32), dtype=jnp.int32)
    return jax.lax.switch(index, [functools.partial(of_slots, n) for n in steps])


def _pad_slots(x: Array, max_slots: int) -> Array:
    """Returns [B, P, _] with zeros in the slots that were skipped."""
    return jnp.pad(x, ((0, 0), (0, max_slots - x.shape[1]), (0, 0)))
