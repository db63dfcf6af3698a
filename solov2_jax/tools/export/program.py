"""What is exported: one function from a padded image to finished detections.

Shapes: the legend of `structs.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from solov2_jax import ops
from solov2_jax.data.buckets import STRIDE
from solov2_jax.inference.preprocess import InputOptions
from solov2_jax.inference.programs import DetectOptions, detect_images
from solov2_jax.structs import Detections

# (image, image_size) -> outputs by name.
Program = Callable[[Any, Any], dict[str, Any]]

# "input": masks of the padded input, 0 or 1, with boxes. "quarter": probabilities at a
# quarter of it, which `Predictor` pastes at the original size.
MASKS = ("input", "quarter")
INPUTS = ("image", "image_size")


def output_names(masks: str, keypoints: bool = False) -> tuple[str, ...]:
    """Returns the outputs, in the order in which formats without names give them.

    Args:
      keypoints: whether the network has learned key points.
    """
    boxes = ("boxes",) if masks == "input" else ()
    return ("count", "scores", "labels", *boxes, "masks", *(["keypoints"] if keypoints else []))


def make_program(
    model: Any,
    variables: Any,
    input_options: InputOptions,
    detect_options: DetectOptions,
    masks: str,
    half_weights: bool = False,
) -> Program:
    """Returns the function that is exported; its weights are constants.

    It takes image uint8 [B, h, w, 3], RGB (or what `input_options.pixels` says: uint8 or
    float32 [B, h, w, C], 0..255), padded at the right and bottom, and image_size int32
    [B, 2], (height, width) before padding. It returns, for the best D detections, best
    first, zeros beyond: count int32 [B]; scores float32 [B, D]; labels int32 [B, D]; and
    with masks="input" boxes float32 [B, D, 4] (x0, y0, x1, y1, in input pixels) and masks
    uint8 [B, D, h, w], with masks="quarter" masks float32 [B, D, h4, w4]; of a network that
    has learned key points also keypoints float32 [B, D, J, 3]: x, y in input pixels and a
    score.

    Args:
      half_weights: large weights are constants of 16 bits; the computation stays.
    """
    weights = jax.tree.map(np.asarray, jax.device_get(variables))
    if half_weights:
        weights = jax.tree.map(_halved, weights)

    def program(image: Any, image_size: Any) -> dict[str, Any]:
        if input_options.channel_order == "BGR" and input_options.pixels.channels == 3:
            image = image[..., ::-1]
        # Staged, not computed: what the file holds are the halved constants.
        full = jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.float32), weights)
        found = detect_images(
            model,
            full,
            image,
            image_size,
            mean=input_options.mean,
            std=input_options.std,
            options=detect_options,
        )
        outputs = {
            "count": jnp.sum(found.valid, axis=1, dtype=jnp.int32),
            "scores": found.scores,
            "labels": jnp.where(found.valid, found.labels, 0).astype(jnp.int32),
        }
        if found.keypoints is not None:
            outputs["keypoints"] = found.keypoints
        if masks == "quarter":
            return outputs | {"masks": found.soft_masks}
        return outputs | _full_masks(found, image_size, detect_options.mask_threshold)

    return program


def _full_masks(found: Detections, image_size: Any, threshold: float) -> dict[str, Any]:
    """Returns the masks of the padded input and their boxes."""

    def enlarge(one: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return _enlarge(*one, threshold)

    # One mask after the other: only the result grows with their number.
    b, d, *quarter = found.soft_masks.shape
    soft = found.soft_masks.reshape(b * d, *quarter)
    sizes = jnp.repeat(image_size, d, axis=0)
    masks, boxes = lax.map(enlarge, (found.valid.reshape(-1), soft, sizes))
    return {"masks": masks.reshape(b, d, *masks.shape[1:]), "boxes": boxes.reshape(b, d, 4)}


def _halved(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.float16) if leaf.ndim == 4 else leaf


def _enlarge(
    valid: Bool[Array, ""], soft: Float[Array, "h4 w4"], image_size: Array, threshold: float
) -> tuple[Array, Array]:
    """Returns a mask at four times the size, uint8, and its box; 0 if invalid."""
    h, w = (4 * n for n in soft.shape)

    def some() -> tuple[Array, Array]:
        extent = -(-image_size // STRIDE) * (STRIDE // 4)
        large = ops.upsample4x_bilinear(soft[None, :, :, None], extent[None])[0, :, :, 0]
        row, column = jnp.arange(h), jnp.arange(w)
        inside = (row[:, None] < image_size[0]) & (column[None] < image_size[1])
        mask = (large > threshold) & inside
        sides = []
        for axis, position in ((0, column), (1, row)):
            used = jnp.any(mask, axis=axis)
            last = jnp.max(jnp.where(used, position, -1)) + 1
            first = jnp.min(jnp.where(used, position, last))
            sides.append((first, last))
        (x0, x1), (y0, y1) = sides
        box = jnp.stack([x0, y0, x1, y1]).astype(jnp.float32)
        return mask.astype(jnp.uint8), box

    def none() -> tuple[Array, Array]:
        return jnp.zeros((h, w), jnp.uint8), jnp.zeros(4, jnp.float32)

    return lax.cond(valid, some, none)
