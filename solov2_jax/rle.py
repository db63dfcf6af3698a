"""Masks of single objects as pixels of their own rectangle, and COCO's run lengths.

The values are those of the whole image's mask. Masks for training are never made as
pixels of the full size: see `spans.py`.


Masks -> COCO's compressed run lengths, from the pixels inside each object's box.

Equal, character for character, to pycocotools' `encode` of the whole image's mask; an
object that covers a fiftieth of its image costs about a fiftieth of the time. The way
back is in `rle.py`.


A COCO segmentation of any form as one form: compressed run lengths."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclasses.dataclass(frozen=True)
class Crop:
    """A mask's rectangle within an image; beyond it the mask is zero."""

    pixels: np.ndarray  # uint8 [h, w], 0 or 1
    top: int
    left: int


def rle_from_string(counts: bytes) -> np.ndarray:
    """Returns the run lengths of COCO's compressed string, int64 [n]."""
    return rle_from_strings([counts])[0]


def rle_from_strings(counts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the run lengths of several strings, int64 [n], and how many each has.

    Five bits and a continuation flag per character, sign-extended; from the fourth run
    on, a run is stored as the difference to the one two before it.
    Source: pycocotools maskApi.c, rleFrString.
    """
    code = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - 48
    if not len(code):
        return np.zeros(0, np.int64), np.zeros(len(counts), np.int64)
    last = (code & 0x20) == 0
    ends = np.flatnonzero(last)
    stops = np.cumsum([len(text) for text in counts])
    first = np.concatenate([[0], ends + 1])
    place = np.arange(len(code)) - np.repeat(first, np.diff(first, append=len(code)))
    first = first[: len(ends)]
    whole = last[stops[stops > 0] - 1].all()
    if not whole or place.max() > 7 or code.min() < 0 or code.max() > 63:
        raise ValueError("run lengths are damaged: not COCO's compressed string")
    values = np.add.reduceat((code & 0x1F) << (5 * place), first)
    negative = (code[ends] & 0x10) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    lengths = np.diff(np.searchsorted(ends, stops), prepend=0)
    number = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    odd = number & 1 == 1
    _add_up(values, np.flatnonzero(odd), number)
    _add_up(values, np.flatnonzero(~odd & (number > 0)), number)
    return values, lengths


def _add_up(values: np.ndarray, where: np.ndarray, number: np.ndarray) -> None:
    """Turns differences into values, in place, within each string.

    Args:
      where: every second run; the first of a string is its second or third.
      number: of each run in its string.
    """
    sums = np.cumsum(values[where])
    begin = np.flatnonzero(number[where] <= 2)
    base = sums[begin] - values[where[begin]]
    values[where] = sums - np.repeat(base, np.diff(begin, append=len(where)))


def rle_decode(runs: np.ndarray, size: tuple[int, int]) -> Crop | None:
    """Returns the mask of run lengths (column by column, zeros first); None if empty.

    Args:
      size: (height, width) of the image.
    """
    height = size[0]
    ends = np.cumsum(runs)
    if np.any(runs < 0) or not len(ends) or ends[-1] != height * size[1]:
        raise ValueError(f"run lengths are damaged: they do not cover {height} x {size[1]} pixels")
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
def nearest_table(old: int, new: int) -> np.ndarray:
    """Returns the source index of each target pixel, int64 [new].

    Source: PIL's Geometry.c, ImagingScaleAffine, which adds up the step; so do we.
    """
    step = old / new
    position = np.full(new, step)
    position[0] = step * 0.5
    return np.minimum(np.cumsum(position).astype(np.int64), old - 1)


def resize_nearest(crop: Crop, old_size: tuple[int, int], new_size: tuple[int, int]) -> Crop | None:
    """Returns the mask after PIL's nearest resize of the image; None if empty."""
    if old_size == new_size:
        return crop
    h, w = crop.pixels.shape
    rows = nearest_table(old_size[0], new_size[0]) - crop.top
    columns = nearest_table(old_size[1], new_size[1]) - crop.left
    y = np.flatnonzero((rows >= 0) & (rows < h))
    x = np.flatnonzero((columns >= 0) & (columns < w))
    if not len(y) or not len(x):
        return None
    pixels = crop.pixels[rows[y]][:, columns[x]]
    return Crop(pixels, int(y[0]), int(x[0])) if pixels.any() else None


def rle_encode(masks: np.ndarray, boxes: np.ndarray) -> list[str]:
    """Returns the compressed run lengths ("counts") of every mask.

    Args:
      masks: bool [n, H, W].
      boxes: (x0, y0, x1, y1) [n, 4], x1 and y1 exclusive, around all of the mask.
    """
    size = masks.shape[1:]
    runs = []
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        x0, y0 = np.maximum(np.floor(box[:2]), 0).astype(int).tolist()
        x1, y1 = np.ceil(box[2:]).astype(int).tolist()
        found = rle_of_crop(mask[y0:y1, x0:x1], y0, x0, size)
        if found[1::2].sum() != np.count_nonzero(mask):
            raise ValueError(
                f"detection {i}: its mask has pixels outside of its box {box.tolist()} "
                "(x0, y0, x1, y1); boxes must hold the whole mask"
            )
        runs.append(found)
    return rle_to_strings(runs)


def rle_of_crop(crop: np.ndarray, top: int, left: int, size: tuple[int, ...]) -> np.ndarray:
    """Returns the run lengths of a mask, zeros first, column by column, int64 [r].

    Args:
      crop: bool [h, w], the part of the image outside of which the mask is zero.
      top, left: where the part lies in the image.
      size: (height, width) of the image.
    """
    h, w = crop.shape
    height, width = size
    # A row of zeros ends every column, so that no run goes on into the next one.
    columns = np.zeros((w, h + 1), np.int8)
    columns[:, :h] = crop.T
    flat = columns.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        changes = np.concatenate([[0], changes])
    column, row = np.divmod(changes, h + 1)
    place = (left + column) * height + top + row
    if h == height:
        # A run that ends where the next begins goes on from column to column.
        joined = np.flatnonzero(place[1:-1:2] == place[2::2]) * 2 + 1
        place = np.delete(place, np.concatenate([joined, joined + 1]))
    if not len(place) or place[-1] != height * width:
        place = np.append(place, height * width)
    return np.diff(place, prepend=0)


def rle_to_strings(runs: list[np.ndarray]) -> list[str]:
    """Returns COCO's string of each list of run lengths.

    Five bits and a continuation flag per character, lowest bits first, sign-extended;
    from the fourth run on, a run is stored as the difference to the one two before it.
    Source: pycocotools maskApi.c, rleToString.
    """
    if not runs:
        return []
    lengths = np.array([len(r) for r in runs])
    ends = np.cumsum(lengths)
    values = np.concatenate(runs)
    place = np.arange(len(values)) - np.repeat(ends - lengths, lengths)
    later = np.flatnonzero(place > 2)
    stored = values.copy()
    stored[later] -= values[later - 2]
    digits, counts = [], np.ones(len(stored), np.int64)
    rest = stored
    while True:
        digit = rest & 0x1F
        rest = rest >> 5
        more = rest != np.where(digit & 0x10, -1, 0)
        digits.append(digit + np.where(more, 0x20, 0) + 48)
        if not more.any():
            break
        # A finished value's later digits have no `more` either: 0 or 31 all along.
        counts += more
    table = np.stack(digits, axis=1).astype(np.uint8)
    text = table[np.arange(len(digits)) < counts[:, None]].tobytes().decode("ascii")
    stops = np.cumsum(counts)[ends - 1].tolist()
    return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def segmentation_to_rle(segmentation: Any, size: tuple[int, int]) -> str:
    """Returns polygons or run lengths as COCO's string; "" without a usable outline.

    Args:
      size: (height, width) of the image.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return counts
        whole: Any = segmentation
        runs: Any = coco_mask.frPyObjects(whole, *size)
        return runs["counts"].decode()
    polygons: Any = [p for p in segmentation or () if len(p) >= 6 and len(p) % 2 == 0]
    if not polygons:
        return ""
    runs = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return runs["counts"].decode()
