"""Key points in SOLOv2's idiom: each cell's dynamic kernel gives J heatmaps too.

FCPose's are the targets (gaussians of a sigma in pixels of the map) and that a dynamic
kernel makes the heatmaps; ours are the features and the kernel in SOLOv2's heads, the
gaussian around the exact place, the focal loss and the parts of a pixel.

Shapes: the legend of `structs.py`; J key points, F + 1 numbers of a kernel, R pairs that
are looked at. Places are x, y in pixels of the padded input, 0.5 the middle of the first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from solov2_jax import ops
from solov2_jax.heatmaps import draw_exact_gaussians
from solov2_jax.structs import Batch, Targets

STRIDE = 4  # of the heatmaps
# Heatmaps begin nearly empty: a logit of -log(99) everywhere.
PRIOR = -math.log(99.0)
# A logit where no point may be; no curve of a maximum in logarithms is as steep as one there.
NOWHERE, STEEP = -1e9, 50.0


def keypoint_logits(
    kernels: Float[Array, "*n J F1"], features: Float[Array, "h4 w4 F"]
) -> Float[Array, "*n J h4 w4"]:
    """Returns the heatmaps' logits: the dynamic 1x1 convolution, with a bias."""
    weights, bias = kernels[..., :-1], kernels[..., -1]
    logits = jnp.einsum("...f,hwf->...hw", weights, features, preferred_element_type=jnp.float32)
    return logits + (bias + PRIOR).astype(jnp.float32)[..., None, None]


def keypoint_pairs(
    batch: Batch, targets: Targets, limit: int
) -> tuple[dict[str, Array], Float[Array, ""]]:
    """Returns the pairs whose heatmaps are compared, at most `limit` of an image, and how
    many annotated points they have in the whole batch.

    The rows: `cell` [B, R]; `points` [B, R, J, 3], flag 0 where there is none; and, of a batch
    with an extent, which pixels of the heatmaps are `inside`, [B, h4, w4]. Of more pairs a
    subset is taken that depends on their places alone.
    """
    assert batch.keypoints is not None
    instance = targets.pair_instance
    points = jnp.take_along_axis(batch.keypoints, instance[:, :, None, None], axis=1)
    usable = (targets.pair_weight > 0) & jnp.any(points[..., 2] > 0, axis=-1)
    slots = np.arange(instance.shape[1], dtype=np.uint32)
    scattered = (slots * np.uint32(2654435761) >> np.uint32(1)).astype(np.int32)
    rank = jnp.where(usable, scattered[None], -1)
    best, chosen = lax.top_k(rank, min(limit, instance.shape[1]))
    points = jnp.take_along_axis(points, chosen[:, :, None, None], axis=1)
    points = points.at[..., 2].multiply(best[:, :, None] >= 0)
    rows = {"cell": jnp.take_along_axis(targets.pair_cell, chosen, axis=1), "points": points}
    if batch.extent is not None:
        rows["inside"] = ops.inside(batch.extent // STRIDE, *batch.masks.shape[2:])
    return rows, jnp.sum(points[..., 2] > 0, dtype=jnp.float32)


@jax.named_scope("keypoints")
def keypoint_loss(
    kernels: Float[Array, "B S J F1"],
    features: Float[Array, "B h4 w4 F"],
    rows: dict[str, Array],
    count: Float[Array, ""],
    *,
    sigma: float,
    gamma: float,
) -> Float[Array, ""]:
    """Returns the focal loss of the heatmaps per annotated point and gaussian's mass.

    A pixel's term is |y - p|^gamma times the cross entropy of p with y, the gaussian's value:
    least where p = y, unlike a loss with one positive pixel. One image's heatmaps exist at a
    time; the backward pass makes them again.

    Source: Li et al., "Generalized Focal Loss", 2020, equation 1.
    """

    @jax.checkpoint
    def of_image(image: tuple[Array, Array, dict[str, Array]]) -> Array:
        kernel, feat, own = image
        cell, points = own["cell"], own["points"]
        logits = keypoint_logits(kernel[cell], feat)
        size = (STRIDE * feat.shape[0], STRIDE * feat.shape[1])
        target = draw_exact_gaussians(points, size, STRIDE, sigma)
        p = jax.nn.sigmoid(logits)
        cross = -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))
        # A power of 0 has no gradient: a number far below what matters.
        loss = jnp.power(jnp.abs(target - p) + 1e-6, gamma) * cross
        counts = points[..., 2, None, None] > 0
        if "inside" in own:
            counts = counts & own["inside"][None, None]
        return jnp.sum(jnp.where(counts, loss, 0.0))

    losses = lax.map(of_image, (kernels, features, rows))
    mass = 2 * math.pi * sigma**2
    return jnp.sum(losses) / (jnp.maximum(count, 1.0) * mass)


@jax.named_scope("keypoints")
def decode_keypoints(
    kernels: Float[Array, "D J F1"],
    features: Float[Array, "h4 w4 F"],
    inside: Bool[Array, "h4 w4"] | None = None,
) -> Float[Array, "D J 3"]:
    """Returns each detection's points: x, y and the heatmap's value there, its maximum.

    Between pixels by the parabola through the logarithms of the maximum and its neighbours,
    which is exact for a gaussian. One detection's heatmaps exist at a time.

    Args:
      inside: where a point may be.
    """
    h, w = features.shape[:2]

    def of_detection(kernel: Array) -> Array:
        logits = keypoint_logits(kernel, features)
        if inside is not None:
            logits = jnp.where(inside[None], logits, NOWHERE)
        number, flat = len(logits), logits.reshape(-1)
        best = jnp.argmax(logits.reshape(number, h * w), axis=1).astype(jnp.int32)
        row, column = lax.div(best, w), lax.rem(best, w)
        first = jnp.arange(number, dtype=jnp.int32) * (h * w)

        def value(step: int) -> Array:
            return jax.nn.sigmoid(flat[first + jnp.clip(best + step, 0, h * w - 1)])

        def between(place: Array, length: int, step: int) -> Array:
            before, top, after = (jnp.log(value(s) + 1e-30) for s in (-step, 0, step))
            curve = 2 * top - before - after
            whole = (place > 0) & (place < length - 1) & (curve > 1e-6) & (curve < STEEP)
            shift = (after - before) / (2 * jnp.where(whole, curve, 1.0))
            return place + jnp.where(whole, jnp.clip(shift, -0.5, 0.5), 0.0)

        x = STRIDE * (between(column, w, 1) + 0.5)
        y = STRIDE * (between(row, h, w) + 0.5)
        return jnp.stack([x, y, value(0)], axis=-1)

    return lax.map(of_detection, kernels.astype(jnp.float32))
