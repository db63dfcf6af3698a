"""The auxiliary loss of `loss.semantic_weight`: which class each pixel shows.

It shapes the FPN's features in training; prediction knows nothing of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from solov2_jax.losses import focal_loss
from solov2_jax.structs import Batch

IGNORED = -1  # a pixel that no term of the loss looks at
IGNORED_IN_FILE = 255  # likewise, in a semantic mask on disk
NUM_LEVELS = 4  # at strides 4, 8, 16, 32


def semantic_labels(batch: Batch, num_classes: int) -> Int[Array, "B h4 w4"]:
    """Returns each pixel's class at stride 4, K on background, `IGNORED` on padding.

    By the batch's semantic mask where there is one; else by the objects' masks, of which the
    smallest counts where several overlap. In the box of an object without a mask it is
    `IGNORED`.

    Source: AdelaiDet adet/modeling/condinst/mask_branch.py (the smallest object);
    adet/data/dataset_mapper.py, DatasetMapperWithBasis (the mask on disk: 0 is background,
    class i is i + 1).
    """
    h4, w4 = batch.masks.shape[2:]
    if batch.basis_sem is not None:
        value = batch.basis_sem[:, 2::4, 2::4].astype(jnp.int32)
        labels = jnp.where(value == 0, num_classes, value - 1)
        labels = jnp.where(value == IGNORED_IN_FILE, IGNORED, labels)
    else:
        area = jnp.sum(batch.masks, axis=(2, 3), dtype=jnp.int32)[:, :, None, None]
        beyond = h4 * w4 + 1
        area = jnp.where((batch.masks > 0) & batch.valid[:, :, None, None], area, beyond)
        smallest = jnp.argmin(area, axis=1)  # [B, h4, w4]; the first of equal ones
        flat = smallest.reshape(smallest.shape[0], -1)
        labels = jnp.take_along_axis(batch.labels, flat, axis=1).reshape(smallest.shape)
        labels = jnp.where(jnp.min(area, axis=1) < beyond, labels, num_classes)
        if batch.has_mask is not None:  # where in its box such an object is, no one knows
            known = jnp.take_along_axis(batch.has_mask, flat, axis=1).reshape(smallest.shape)
            labels = jnp.where(known | (labels == num_classes), labels, IGNORED)
    rows = 4 * jnp.arange(h4)[None] < batch.image_size[:, :1]
    columns = 4 * jnp.arange(w4)[None] < batch.image_size[:, 1:]
    return jnp.where(rows[:, :, None] & columns[:, None], labels, IGNORED).astype(jnp.int32)


def of_level(labels: Int[Array, "B h4 w4"], level: int) -> Int[Array, "B _ _"]:
    """Returns the labels at stride 4 * 2^level: those in the middle of its pixels."""
    stride = 2**level
    return labels[:, stride // 2 :: stride, stride // 2 :: stride]


def foreground_counts(labels: Int[Array, "B h4 w4"], num_classes: int) -> Float[Array, "4"]:
    """Returns how many pixels of a batch show an object, on each level."""

    def count(level: int) -> Array:
        of = of_level(labels, level)
        return jnp.sum((of >= 0) & (of < num_classes), dtype=jnp.float32)

    return jnp.stack([count(level) for level in range(NUM_LEVELS)])


@jax.named_scope("semantic")
def semantic_loss(
    levels: Sequence[Float[Array, "B _ _ K"]],
    labels: Int[Array, "B h4 w4"],
    counts: Float[Array, "4"],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, ""]:
    """Returns the mean over the levels of each one's focal loss per foreground pixel.

    With the `counts` of a larger batch, the results of its microbatches add up to its own.
    """
    total = jnp.zeros((), jnp.float32)
    for level, logits in enumerate(levels):
        target = of_level(labels, level)
        loss = focal_loss(logits, target, alpha, gamma, weight=target != IGNORED)
        total += loss / jnp.maximum(counts[level], 1.0)
    return total / len(levels)
