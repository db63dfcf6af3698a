"""Soft masks at a quarter of the input's size -> masks and boxes at the original size.

Shapes: h4, w4 of the soft masks, H and W of the canvas, a static size that holds the
original image; W8 = W / 8 bytes of 8 pixels.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from solov2_jax.platforms import ACCELERATOR, PlatformOp

# On the CPU a mask is enlarged within the smallest of these parts of the canvas, by
# side, that holds it; elsewhere several whole ones are enlarged together.
WINDOWS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# Sides of the network's input are multiples of it; beyond them a larger array is empty.
PADDING = 32


@jax.named_scope("paste")
def paste_masks(
    soft_masks: Float[Array, "M h4 w4"],
    part: Int[Array, "N"],
    count: Int[Array, ""] | int,
    image_size: Int[Array, "2"],
    original_size: Int[Array, "2"],
    canvas: tuple[int, int],
    threshold: float,
    origin: Int[Array, "2"] | None = None,
) -> tuple[UInt8[Array, "N H W8"], Float[Array, "N 4"]]:
    """Returns masks at the original size, 8 pixels a byte, and their boxes on the canvas.

    Args:
      soft_masks: probabilities at a quarter of the padded input.
      part: which of them.
      count: how many of the part, the first ones; the others' results are 0.
      image_size: (height, width) of the input before padding.
      original_size: (height, width) to resize to; False beyond it.
      canvas: static (H, W); W is a multiple of 8.
      threshold: applied after resizing, at least 0; a pixel is above it.
      origin: (row, column) of the resized image at the canvas's corner; None: (0, 0).

    `np.unpackbits` along the last axis gives the pixels. A box is tight and ends one past
    its last pixel, as a COCO box does; an empty mask's is all 0.

    Source: solov2.py, inference_single_image: bilinear to the input's size, crop, then
    bilinear to the original size. The first factor is always 4; the reference derives
    it from the unpadded height, wrongly for small images. Its boxes are all 0.
    """
    if canvas[1] % 8:
        raise ValueError(f"a canvas of {canvas} does not pack: its width is no multiple of 8")
    w4 = soft_masks.shape[2]
    y, x = (None, None) if origin is None else origin
    # Of the soft mask: the image with the padding that the reference gives it.
    h, w = -(-image_size // PADDING) * (PADDING // 4)
    rows = _taps(h, image_size[0], original_size[0], canvas[0], y)
    columns = _taps(w, image_size[1], original_size[1], canvas[1], x)
    taps = zip(columns.weights, columns.indices, strict=True)
    hot = [w[:, None] * (i[:, None] == jnp.arange(w4)[None]) for w, i in taps]
    across = functools.reduce(jnp.add, hot)
    soft_masks, count = soft_masks.astype(jnp.float32), jnp.asarray(count, jnp.int32)
    return _paste(
        soft_masks, part, count, rows, columns, across, canvas=canvas, threshold=threshold
    )


def _paste_in_windows(soft_masks, part, count, rows, columns, across, *, canvas, threshold):
    def add(i, pasted):
        soft = lax.dynamic_index_in_dim(soft_masks, part[i], keepdims=False)
        mask, box = _paste_within(soft, rows, columns, across, canvas, threshold)
        bits, boxes = pasted
        return bits.at[i].set(mask), boxes.at[i].set(box)

    return lax.fori_loop(0, count, add, _no_masks(part.size, canvas))


def _paste_together(soft_masks, part, count, rows, columns, across, *, canvas, threshold):
    del columns  # `across` holds them
    window = _Window(0, 0, 0, soft_masks.shape[1], *canvas)
    together = min(max(ACCELERATOR.pasted_pixels // (canvas[0] * canvas[1]), 1), part.size)
    none = soft_masks.shape[0]
    part = jnp.where(jnp.arange(part.size) < count, part, none)
    padded = jnp.pad(part, (0, -part.size % together), constant_values=none)
    enlarge = jax.vmap(lambda soft: _enlarge(soft, rows, across, window, canvas, threshold))

    def add(i, pasted):
        indices = lax.dynamic_slice_in_dim(padded, i * together, together)
        chosen = jnp.take(soft_masks, indices, axis=0, mode="fill", fill_value=0)
        new = enlarge(chosen)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * together, axis=0)
        return tuple(put(old, update) for old, update in zip(pasted, new, strict=True))

    pasted = lax.fori_loop(0, -(-count // together), add, _no_masks(padded.size, canvas))
    bits, boxes = (x[: part.size] for x in pasted)
    return bits, boxes


def _no_masks(count: int, canvas: tuple[int, int]):
    height, width = canvas
    return jnp.zeros((count, height, width // 8), jnp.uint8), jnp.zeros((count, 4))


_paste = PlatformOp("paste", _paste_in_windows, _paste_together)


class _Window(NamedTuple):
    """A part of the canvas and the rows of the soft mask that it is made from."""

    source: Int[Array, ""] | int  # its first row of the soft mask
    y: Int[Array, ""] | int
    x: Int[Array, ""] | int
    source_rows: int
    height: int
    width: int


class _Taps(NamedTuple):
    """Of each canvas position along an axis: 4 source indices, ascending, and weights.

    Beyond the original image the weights are 0.
    """

    indices: list[Int[Array, "n"]]
    weights: list[Float[Array, "n"]]

    def reached(self, used: Bool[Array, "m"]) -> Bool[Array, "n"]:
        """Returns which canvas positions take anything from the used source ones."""
        taps = zip(self.indices, self.weights, strict=True)
        return functools.reduce(jnp.logical_or, [used[i] & (w > 0) for i, w in taps])


def _taps(
    size: Int[Array, ""],
    image: Int[Array, ""],
    original: Int[Array, ""],
    canvas: int,
    start: Int[Array, ""] | None,
) -> _Taps:
    """Returns the taps of an axis of `size` for each position of the canvas.

    Two of the enlarged mask's pixels, each between two of the mask's own; the order of
    operations is torch's, so that rounding is too.
    """
    position = jnp.arange(canvas, dtype=jnp.float32)
    if start is not None:
        position += start.astype(jnp.float32)  # exact: whole numbers below 2^24
    scale = image.astype(jnp.float32) / original.astype(jnp.float32)
    inside = (position < original).astype(jnp.float32)
    indices, weights = [], []
    for i, weight in _between(scale * (position + 0.5) - 0.5, image):
        for j, part in _between((i.astype(jnp.float32) + 0.5) * 0.25 - 0.5, size):
            indices.append(j)
            weights.append(weight * part * inside)
    return _Taps(indices, weights)


def _between(x: Float[Array, "n"], size: Int[Array, ""] | int):
    """Returns both neighbours of x as (index, weight), clamped to 0 .. size - 1."""
    x = jnp.maximum(x, 0.0)
    low = jnp.minimum(jnp.floor(x).astype(jnp.int32), size - 1)
    part = x - low.astype(jnp.float32)
    return (low, 1.0 - part), (jnp.minimum(low + 1, size - 1), part)


def _paste_within(
    soft: Float[Array, "h4 w4"],
    rows: _Taps,
    columns: _Taps,
    across: Float[Array, "W w4"],
    canvas: tuple[int, int],
    threshold: float,
) -> tuple[UInt8[Array, "H W8"], Float[Array, "4"]]:
    """Returns mask and box, made within the smallest window that holds the mask."""
    h4, above = soft.shape[0], soft > threshold
    used_rows, used_columns = rows.reached(above.any(1)), columns.reached(above.any(0))
    (top, bottom), (left, right) = _ends(used_rows), _ends(used_columns)
    left = left // 8 * 8  # whole bytes
    first = jnp.min(jnp.where(used_rows, rows.indices[0], h4 - 1))
    last = jnp.max(jnp.where(used_rows, rows.indices[-1], 0))
    # A row that no part of the mask reaches may need source rows beyond the window.
    rows = _Taps(rows.indices, [jnp.where(used_rows, w, 0.0) for w in rows.weights])

    def sizes(part: float) -> tuple[int, int, int]:
        source_rows, height, eights = (
            math.ceil(part * whole) for whole in (h4, canvas[0], canvas[1] // 8)
        )
        return source_rows, height, 8 * eights

    def within(part: float):
        source_rows, height, width = sizes(part)
        window = _Window(
            jnp.clip(first, 0, h4 - source_rows),
            jnp.clip(top, 0, canvas[0] - height),
            jnp.clip(left, 0, canvas[1] - width),
            source_rows,
            height,
            width,
        )
        cut = functools.partial(_cut, start=window.y, size=height)
        source = [cut(i) - window.source for i in rows.indices]
        taps = _Taps(
            [jnp.clip(i, 0, source_rows - 1) for i in source],
            [cut(w) for w in rows.weights],
        )
        part_of_soft = _cut(soft, window.source, source_rows)
        return _enlarge(part_of_soft, taps, across, window, canvas, threshold)

    needed = (last - first + 1, bottom - top, right - left)
    index = jnp.int32(0)
    for part in WINDOWS[:-1]:
        index += jnp.any(jnp.stack(needed) > jnp.array(sizes(part))).astype(jnp.int32)
    return lax.switch(index, [functools.partial(within, part) for part in WINDOWS])


def _enlarge(
    soft: Float[Array, "n w4"],
    rows: _Taps,
    across: Float[Array, "W w4"],
    window: _Window,
    canvas: tuple[int, int],
    threshold: float,
) -> tuple[UInt8[Array, "H W8"], Float[Array, "4"]]:
    """Returns mask and box on the canvas, from a window's rows of the soft mask."""
    # Full precision also where the device's default is less: pixels near the threshold
    # would flip.
    part = _cut(across, window.x, window.width)
    wide = jnp.einsum("hw,Ww->hW", soft, part, precision="highest")
    taps = zip(rows.weights, rows.indices, strict=True)
    tall = functools.reduce(jnp.add, [w[:, None] * wide[i] for w, i in taps])
    # Maxima of floats are several times faster on the CPU than "any" of booleans.
    tall = lax.optimization_barrier(tall)
    has_row, has_column = tall.max(1) > threshold, tall.max(0) > threshold
    (y0, y1), (x0, x1) = _ends(has_row), _ends(has_column)
    box = jnp.stack([window.x + x0, window.y + y0, window.x + x1, window.y + y1])
    bits = jnp.zeros((canvas[0], canvas[1] // 8), jnp.uint8)
    bits = lax.dynamic_update_slice(bits, _pack(tall > threshold), (window.y, window.x // 8))
    return bits, jnp.where(jnp.any(has_row), box.astype(jnp.float32), 0.0)


def _pack(pixels: Bool[Array, "n m"]) -> UInt8[Array, "n m8"]:
    """Returns 8 pixels of a row in each byte, the first in its highest bit.

    `jnp.packbits` is the same and several times slower on the CPU.
    """
    eights = pixels.astype(jnp.uint8).reshape(pixels.shape[0], -1, 8)
    return functools.reduce(jnp.bitwise_or, [eights[..., i] << (7 - i) for i in range(8)])


def _ends(used: Bool[Array, "n"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns the first place that is True, and one past the last; 0, 0 for none."""
    end = used.size - jnp.argmax(used[::-1])
    return jnp.argmax(used), jnp.where(jnp.any(used), end, 0)


def _cut(x: Array, start: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)
