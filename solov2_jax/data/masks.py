"""Masks of single objects: outline -> pixels -> mass centre and quarter-size target.

Every function works on the object's own rectangle, not on the whole image; the values
are those of the whole image.
"""

import dataclasses
from functools import lru_cache

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.annotations import Segmentations


@dataclasses.dataclass(frozen=True)
class Crop:
    """A mask's rectangle within an image; beyond it the mask is zero."""

    pixels: np.ndarray  # uint8 [h, w], 0 or 1
    top: int
    left: int


def rasterize(
    segmentations: Segmentations,
    index: int,
    old_size: tuple[int, int],
    new_size: tuple[int, int],
    flip: bool,
) -> Crop | None:
    """Returns the mask of an object in the resized, maybe flipped image; None if empty.

    Polygons are scaled, flipped and then drawn at the new size; run lengths are drawn
    at the old size and resized by nearest neighbour.
    Source: detectron2 data/detection_utils.py, transform_instance_annotations.

    Args:
      index: of the object.
      old_size, new_size: (height, width) of the image before and after the resize.
    """
    polygons = segmentations.polygons(index)
    if not polygons:
        crop = decode_runs(parse_runs(segmentations.run_lengths(index)), old_size)
        crop = crop and resize_nearest(crop, old_size, new_size)
        return flip_crop(crop, new_size[1]) if crop and flip else crop
    height, width = new_size
    scaled = []
    for polygon in polygons:
        x = polygon[0::2] * (width / old_size[1])
        y = polygon[1::2] * (height / old_size[0])
        scaled.append(np.stack([width - x if flip else x, y], axis=-1).ravel())
    parts = coco_mask.frPyObjects(scaled, height, width)
    merged = parts[0] if len(parts) == 1 else coco_mask.merge(parts)
    return decode_runs(parse_runs(merged["counts"]), new_size)  # pyright: ignore


def parse_runs(counts: bytes) -> np.ndarray:
    """Returns the run lengths of COCO's compressed string, int64 [n].

    Five bits and a continuation flag per character, sign-extended; from the fourth run
    on, a run is stored as the difference to the one two before it.
    Source: pycocotools maskApi.c, rleFrString.
    """
    code = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(code):
        return np.zeros(0, np.int64)
    last = (code & 0x20) == 0
    ends = np.flatnonzero(last)
    first = np.concatenate([[0], ends + 1])
    place = np.arange(len(code)) - np.repeat(first, np.diff(first, append=len(code)))
    first = first[: len(ends)]
    if not last[-1] or place.max() > 7 or code.min() < 0 or code.max() > 63:
        raise ValueError("run lengths are damaged: not COCO's compressed string")
    values = np.add.reduceat((code & 0x1F) << (5 * place), first)
    negative = (code[ends] & 0x10) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode_runs(runs: np.ndarray, size: tuple[int, int]) -> Crop | None:
    """Returns the mask of run lengths (column by column, zeros first); None if empty.

    Args:
      size: (height, width) of the image.
    """
    height = size[0]
    ends = np.cumsum(runs)
    if np.any(runs < 0) or not len(ends) or ends[-1] != height * size[1]:
        raise ValueError(
            f"run lengths are damaged: they do not cover {height} x {size[1]} pixels"
        )
    start, stop = ends[0::2][: len(ends) // 2], ends[1::2]
    full = stop > start
    start, stop = start[full], stop[full]
    if not len(start):
        return None
    left, right = start[0] // height, (stop[-1] - 1) // height + 1
    top, last = start % height, (stop - 1) % height
    if np.any(start // height != (stop - 1) // height):
        y0, y1 = 0, height
    else:
        y0, y1 = int(top.min()), int(last.max()) + 1
    steps = np.zeros((right - left) * height + 1, np.int8)
    steps[start - left * height] += 1
    steps[stop - left * height] -= 1
    columns = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
    pixels = columns.reshape(right - left, height)[:, y0:y1].T
    return Crop(np.ascontiguousarray(pixels), y0, int(left))


@lru_cache(maxsize=256)
def _nearest_table(old: int, new: int) -> np.ndarray:
    """Returns the source index of each target pixel, int64 [new].

    Source: PIL's Geometry.c, ImagingScaleAffine, which adds up the step; so do we.
    """
    step = old / new
    position = np.full(new, step)
    position[0] = step * 0.5
    return np.minimum(np.cumsum(position).astype(np.int64), old - 1)


def resize_nearest(
    crop: Crop, old_size: tuple[int, int], new_size: tuple[int, int]
) -> Crop | None:
    """Returns the mask after PIL's nearest resize of the image; None if empty."""
    if old_size == new_size:
        return crop
    h, w = crop.pixels.shape
    rows = _nearest_table(old_size[0], new_size[0]) - crop.top
    columns = _nearest_table(old_size[1], new_size[1]) - crop.left
    y = np.flatnonzero((rows >= 0) & (rows < h))
    x = np.flatnonzero((columns >= 0) & (columns < w))
    if not len(y) or not len(x):
        return None
    pixels = crop.pixels[rows[y]][:, columns[x]]
    return Crop(pixels, int(y[0]), int(x[0])) if pixels.any() else None


def flip_crop(crop: Crop, width: int) -> Crop:
    """Returns the mask in the horizontally flipped image of this width."""
    left = width - crop.left - crop.pixels.shape[1]
    return Crop(np.ascontiguousarray(crop.pixels[:, ::-1]), crop.top, left)


def mass_center(crop: Crop) -> np.ndarray:
    """Returns the mean (x, y) of the mask's pixel indices, float32 [2].

    Source: AdelaiDet adet/modeling/solov2/utils.py, center_of_mass. The sums are exact
    here, float32 there, so large masks can differ in the last digit.
    """
    h, w = crop.pixels.shape
    rows = crop.pixels.sum(axis=1, dtype=np.int64)
    columns = crop.pixels.sum(axis=0, dtype=np.int64)
    area = rows.sum()
    x = columns @ np.arange(crop.left, crop.left + w)
    y = rows @ np.arange(crop.top, crop.top + h)
    return np.array([x, y], np.float32) / np.float32(area)


@lru_cache(maxsize=256)
def _quarter_table(size: int, clamp_weight: bool) -> tuple[np.ndarray, ...]:
    """Returns the two source indices and fixed-point weights per target pixel.

    Source: OpenCV resize.cpp, 8-bit INTER_LINEAR: weights in 1/2048, and only
    horizontally is the weight reset where the position leaves the image.
    """
    new = int(size * 0.25 + 0.5)
    position = ((np.arange(new) + 0.5) * (size / max(new, 1)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    part = position - low.astype(np.float32)
    if clamp_weight:
        part[(low < 0) | (low >= size - 1)] = 0
    first = np.rint((np.float32(1) - part) * np.float32(2048)).astype(np.int32)
    second = np.rint(part * np.float32(2048)).astype(np.int32)
    return np.clip(low, 0, size - 1), np.clip(low + 1, 0, size - 1), first, second


def _span(
    table: tuple[np.ndarray, ...], start: int, length: int
) -> tuple[int, tuple[np.ndarray, ...]]:
    """Returns the first target pixel that touches [start, start + length), and the
    table from there to the last, its indices into the piece padded by one zero."""
    a = int(np.searchsorted(table[1], start))
    b = max(int(np.searchsorted(table[0], start + length)), a)
    # The two sources are neighbours, so neither leaves the zeros around the piece.
    shift = 1 - start
    first, second = table[0][a:b] + shift, table[1][a:b] + shift
    return a, (first, second, table[2][a:b], table[3][a:b])


def quarter(crop: Crop, size: tuple[int, int]) -> Crop:
    """Returns the mask of the image scaled to a quarter, sides int(side / 4 + 0.5).

    Equal, bit for bit, to OpenCV's bilinear resize of the whole image's uint8 mask.
    Source: AdelaiDet adet/modeling/solov2/utils.py, imrescale.

    Args:
      size: (height, width) of the image.
    """
    h, w = crop.pixels.shape
    top, (y0, y1, wy0, wy1) = _span(_quarter_table(size[0], False), crop.top, h)
    left, (x0, x1, wx0, wx1) = _span(_quarter_table(size[1], True), crop.left, w)
    padded = np.zeros((h + 2, w + 2), np.uint8)  # np.pad takes ten times as long
    padded[1:-1, 1:-1] = crop.pixels
    if size[0] % 4 == 0 and size[1] % 4 == 0:
        # Equal weights: at least two of the four pixels in the middle.
        rows = padded[y0] + padded[y1]
        pixels = (rows[:, x0] + rows[:, x1] >= 2).astype(np.uint8)
        return Crop(pixels, top, left)

    def horizontal(rows: np.ndarray) -> np.ndarray:
        return (rows[:, x0] * wx0 + rows[:, x1] * wx1) >> 4

    upper = (horizontal(padded[y0]) * wy0[:, None]) >> 16
    lower = (horizontal(padded[y1]) * wy1[:, None]) >> 16
    return Crop(((upper + lower + 2) >> 2).astype(np.uint8), top, left)
