"""COCO's run-length encoding (RLE): masks <-> run lengths <-> compressed strings.

A mask is run through column by column, zeros first. `counts` is COCO's compressed string
of these lengths. Encoding and parsing are equal, character for character, to pycocotools,
but cost what an object's own rectangle costs instead of the whole image. Masks for
training never become pixels of the full size: see `data/rasterize.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Size = tuple[int, int]  # (height, width)


class InvalidRLE(ValueError):
    """Run lengths that are no mask of their image.

    Attributes:
      position: of the object among those decoded together; the caller knows its name.
    """

    def __init__(self, why: str, position: int = 0):
        super().__init__(f"run lengths are damaged: {why}")
        self.position = position


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
        raise InvalidRLE("not COCO's compressed string")
    values = np.add.reduceat((code & 0x1F) << (5 * place), first)
    negative = (code[ends] & 0x10) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    lengths = np.diff(np.searchsorted(ends, stops), prepend=0)
    rank = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    odd = rank & 1 == 1
    for every_second in (np.flatnonzero(odd), np.flatnonzero(~odd & (rank > 0))):
        # Differences become values within each string, whose first of these runs is its
        # second or third.
        sums = np.cumsum(values[every_second])
        begin = np.flatnonzero(rank[every_second] <= 2)
        base = sums[begin] - values[every_second[begin]]
        values[every_second] = sums - np.repeat(base, np.diff(begin, append=len(every_second)))
    return values, lengths


def rle_decode(runs: np.ndarray, size: Size) -> Crop | None:
    """Returns the mask of run lengths (column by column, zeros first); None if empty.

    Args:
      size: (height, width) of the image.
    """
    height = size[0]
    ends = np.cumsum(runs)
    if np.any(runs < 0) or not len(ends) or ends[-1] != height * size[1]:
        raise InvalidRLE(f"they do not cover {height} x {size[1]} pixels")
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


def resize_nearest(crop: Crop, old_size: Size, new_size: Size) -> Crop | None:
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
        lengths = rle_of_crop(mask[y0:y1, x0:x1], y0, x0, size)
        if lengths[1::2].sum() != np.count_nonzero(mask):
            raise ValueError(
                f"detection {i}: its mask has pixels outside of its box {box.tolist()} "
                "(x0, y0, x1, y1); boxes must hold the whole mask"
            )
        runs.append(lengths)
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


def rle_to_strings(runs: Sequence[np.ndarray]) -> list[str]:
    """Returns COCO's compressed string of each list of run lengths."""
    records: Any = [{"size": [1, 1], "counts": lengths.tolist()} for lengths in runs]
    return [coco_mask.frPyObjects(record, 1, 1)["counts"].decode() for record in records]  # pyright: ignore


def polygons_to_rle(polygons: Sequence[np.ndarray], size: Size) -> dict[str, Any]:
    """Returns {"size": [h, w], "counts": bytes} of the union of polygons, at least one,
    each of three points or more."""
    parts: Any = coco_mask.frPyObjects(list(polygons), *size)  # pyright: ignore
    whole: Any = parts[0] if len(parts) == 1 else coco_mask.merge(parts)
    return whole


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Returns {"size": [h, w], "counts": bytes} of a whole mask, bool or uint8 [h, w]."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))  # pyright: ignore
