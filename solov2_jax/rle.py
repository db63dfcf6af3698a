"""COCO's run-length encoding (RLE): masks <-> run lengths <-> compressed strings.

A mask is run through column by column, zeros first. `counts` is COCO's compressed string
of these lengths. Encoding and parsing are equal, character for character, to pycocotools,
but cost what an object's own rectangle costs instead of the whole image. Masks for
training never become pixels of the full size: see `data/rasterize.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Size = tuple[int, int]  # (height, width)


class InvalidRLE(ValueError):
    """Run lengths that are no mask of their image.

    Attributes:
      position: of the mask among those decoded together; the caller knows its name.
    """

    def __init__(self, why: str, position: int = 0):
        super().__init__(f"damaged run lengths: {why}")
        self.position = position


@dataclasses.dataclass(frozen=True)
class Crop:
    """A mask's rectangle within an image; beyond it the mask is zero."""

    pixels: np.ndarray  # uint8 [h, w], 0 or 1
    top: int
    left: int


@dataclasses.dataclass(frozen=True)
class Spans:
    """The pixels (column, top .. bottom - 1) of objects; no pixel twice.

    Sorted by object. An object without a span has an empty mask.
    """

    owner: np.ndarray  # int64 [s], 0..n-1
    column: np.ndarray  # int64 [s]
    top: np.ndarray  # int64 [s]
    bottom: np.ndarray  # int64 [s], > top

    def take(self, chosen: np.ndarray) -> "Spans":
        """Returns some of the spans."""
        return Spans(self.owner[chosen], self.column[chosen], self.top[chosen], self.bottom[chosen])


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where each of the consecutive pieces starts, and the end, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ranks(lengths: np.ndarray) -> np.ndarray:
    """Returns each element's place in its own one of the consecutive pieces, int64."""
    stops = np.cumsum(lengths)
    return np.arange(stops[-1] if len(stops) else 0) - np.repeat(stops - lengths, lengths)


# --- Reading --------------------------------------------------------------------------


def rle_from_string(counts: bytes) -> np.ndarray:
    """Returns the run lengths of COCO's compressed string, int64 [n]."""
    return rle_from_strings([counts])[0]


def rle_from_strings(counts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the run lengths of several strings, int64 [n], and how many each has.

    Five bits and a continuation flag per character, sign-extended; from the fourth run
    on, a run is stored as the difference to the one two before it.
    Source: pycocotools maskApi.c, rleFrString.

    Raises:
      InvalidRLE: with the position of the first string that is damaged.
    """
    code = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - 48
    if not len(code):
        return np.zeros(0, np.int64), np.zeros(len(counts), np.int64)
    last = (code & 0x20) == 0
    ends = np.flatnonzero(last)
    stops = np.cumsum([len(text) for text in counts])
    place = ranks(np.diff(ends, prepend=-1, append=len(code) - 1))
    damaged = (place > 7) | (code < 0) | (code > 63)
    final = stops[stops > 0] - 1
    damaged[final] |= ~last[final]
    if damaged.any():
        position = np.searchsorted(stops, damaged.argmax(), side="right")
        raise InvalidRLE("not COCO's compressed string", int(position))
    values = np.add.reduceat((code & 0x1F) << (5 * place), np.flatnonzero(place == 0))
    negative = (code[ends] & 0x10) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    lengths = np.diff(np.searchsorted(ends, stops), prepend=0)
    rank = ranks(lengths)
    odd = rank & 1 == 1
    for every_second in (np.flatnonzero(odd), np.flatnonzero(~odd & (rank > 0))):
        # Differences become values within each string, whose first of these runs is its
        # second or third.
        sums = np.cumsum(values[every_second])
        begin = np.flatnonzero(rank[every_second] <= 2)
        base = sums[begin] - values[every_second[begin]]
        values[every_second] = sums - np.repeat(base, np.diff(begin, append=len(every_second)))
    return values, lengths


def check_cover(runs: np.ndarray, lengths: np.ndarray, pixels: Sequence[int] | np.ndarray) -> None:
    """Raises an InvalidRLE unless the run lengths of each mask cover exactly its image.

    Args:
      lengths: how many of `runs` each mask has.
      pixels: of each mask's image.
    """
    edges = offsets(lengths)
    wrong = np.diff(offsets(runs)[edges]) != pixels
    wrong |= np.diff(offsets(runs < 0)[edges]) > 0
    if wrong.any():
        position = int(wrong.argmax())
        raise InvalidRLE(f"they do not cover the image's {pixels[position]} pixels", position)


def spans_from_rle(counts: Sequence[bytes], size: Size) -> Spans:
    """Returns the spans of COCO's compressed run lengths, one string per object.

    Raises:
      InvalidRLE: they do not cover exactly the image.
    """
    runs, lengths = rle_from_strings(counts)
    return _spans_from_runs(runs, lengths, size)


def _spans_from_runs(runs: np.ndarray, lengths: np.ndarray, size: Size) -> Spans:
    height, width = size
    check_cover(runs, lengths, [height * width] * len(lengths))
    # One image beside the other.
    ones = np.flatnonzero((ranks(lengths) & 1 == 1) & (runs > 0))
    stop = np.cumsum(runs)[ones]
    start = stop - runs[ones]
    first, final = start // height, (stop - 1) // height
    if (first != final).any():
        columns = final - first + 1
        start, stop = np.repeat(start, columns), np.repeat(stop, columns)
        first = np.repeat(first, columns) + ranks(columns)
    top = np.maximum(start - first * height, 0)
    bottom = np.minimum(stop - first * height, height)
    owner, column = np.divmod(first, width)
    return Spans(owner, column, top, bottom)


def spans_to_crop(spans: Spans) -> Crop | None:
    """Returns the pixels of one object's spans; None if there are none."""
    if not len(spans.owner):
        return None
    x0, x1 = int(spans.column.min()), int(spans.column.max()) + 1
    y0, y1 = int(spans.top.min()), int(spans.bottom.max())
    steps = np.zeros((x1 - x0) * (y1 - y0) + 1, np.int8)
    place = (spans.column - x0) * (y1 - y0) - y0
    steps[place + spans.top] += 1
    # Two spans of one column may touch, and a column's end is the next one's start.
    steps[place + spans.bottom] -= 1
    columns = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
    pixels = columns.reshape(x1 - x0, y1 - y0).T
    return Crop(np.ascontiguousarray(pixels), y0, x0)


def rle_decode(runs: np.ndarray, size: Size) -> Crop | None:
    """Returns the mask of run lengths (column by column, zeros first); None if empty.

    Args:
      size: (height, width) of the image.
    """
    return spans_to_crop(_spans_from_runs(runs, np.array([len(runs)]), size))


def crop_of(segmentation: Mapping[str, Any]) -> Crop | None:
    """Returns the mask of {"size": [h, w], "counts": compressed}; None if empty."""
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    runs = rle_from_string(counts.encode() if isinstance(counts, str) else counts)
    return rle_decode(runs, (int(height), int(width)))


# --- Writing --------------------------------------------------------------------------


def spans_from_pixels(mask: np.ndarray, owner: int = 0) -> Spans:
    """Returns the spans of one object's mask, bool or uint8 [h, w]."""
    h, w = mask.shape
    # A row of zeros on both sides ends every column.
    columns = np.zeros((w, h + 2), np.int8)
    columns[:, 1:-1] = mask.T
    flat = columns.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    column, row = np.divmod(edges, h + 2)
    return Spans(np.full(len(edges) // 2, owner), column[::2], row[::2], row[1::2])


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
    height, width = size
    spans = spans_from_pixels(crop)
    column = (left + spans.column) * height + top
    place = np.stack([column + spans.top, column + spans.bottom], axis=1).ravel()
    if len(crop) == height:
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


def polygon_rles(polygons: Sequence[np.ndarray], size: Size) -> list[dict[str, Any]]:
    """Returns {"size": [h, w], "counts": bytes} of each polygon of three points or more."""
    return coco_mask.frPyObjects(list(polygons), *size)  # pyright: ignore


def union_rle(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the union of masks, at least one."""
    return parts[0] if len(parts) == 1 else coco_mask.merge(parts)  # pyright: ignore


def polygons_to_rle(polygons: Sequence[np.ndarray], size: Size) -> dict[str, Any]:
    """Returns the union of polygons, at least one, each of three points or more."""
    return union_rle(polygon_rles(polygons, size))


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Returns {"size": [h, w], "counts": bytes} of a whole mask, bool or uint8 [h, w]."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))  # pyright: ignore


def empty_rle(size: Size) -> bytes:
    """Returns COCO's compressed run lengths of a mask (height, width) without a pixel."""
    return mask_to_rle(np.zeros(size, bool))["counts"]
