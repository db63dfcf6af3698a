"""Masks of an image's objects as vertical spans: outlines -> spans -> stride-4 masks.

A span is a piece of a column that an object covers. All objects of an image are kept
in one set of arrays, so that a crowd costs hardly more calls than one object, and
pixels are made only where the loss looks: a stride-4 mask reads a quarter of them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from solov2_jax.data.outlines import Segmentations
from solov2_jax.data.transforms import Affine
from solov2_jax.rle import (
    Crop,
    Size,
    Spans,
    offsets,
    polygon_rles,
    ranks,
    spans_from_pixels,
    spans_from_rle,
    spans_to_crop,
    union_rle,
)


def draw_spans(segmentations: Segmentations, indices: Sequence[int], affine: Affine) -> Spans:
    """Returns the masks of objects in the image that an affine map leads to.

    Points of polygons are moved and then drawn at the new size; run lengths are drawn at
    the old size and moved by nearest neighbour.
    Source: detectron2 data/detection_utils.py, transform_instance_annotations.

    Args:
      indices: of the objects; `owner` counts them.
    """
    polygons: list[np.ndarray] = []
    owners: list[int] = []  # of the polygons
    pieces = []
    for position, index in enumerate(indices):
        outline = segmentations.polygons(index)
        if not outline:
            spans = spans_from_rle([segmentations.run_lengths(index)], affine.original)
            moved = _move_spans(spans, affine)
            pieces.append(dataclasses.replace(moved, owner=np.full(len(moved.owner), position)))
            continue
        parts = [part.reshape(-1, 2) for part in outline]
        if not affine.only_resized:
            parts = [clip_polygon(part, affine.original) for part in parts]
            parts = [part for part in parts if len(part) > 2]
        polygons += parts
        owners += [position] * len(parts)
    if polygons:
        points = affine.points(np.concatenate(polygons)).ravel()
        edges = offsets([2 * len(part) for part in polygons]).tolist()
        parts = [points[a:b] for a, b in itertools.pairwise(edges)]
        drawn: dict[int, list[Any]] = {}
        for owner, part in zip(owners, polygon_rles(parts, affine.size), strict=True):
            drawn.setdefault(owner, []).append(part)
        counts = [union_rle(parts)["counts"] for parts in drawn.values()]
        spans = spans_from_rle(counts, affine.size)
        pieces.append(dataclasses.replace(spans, owner=np.array([*drawn])[spans.owner]))
    return concatenate_spans(pieces)


def _move_spans(spans: Spans, affine: Affine) -> Spans:
    """Returns the mask of one object of the original in the new image."""
    if affine.only_resized:
        moved = resize_spans(spans, affine.original, affine.size)
        if affine.mirrored:
            moved = dataclasses.replace(moved, column=affine.size[1] - 1 - moved.column)
        return moved
    mask = spans_to_masks(spans, 1, affine.original)[0]
    return spans_from_pixels(affine.move_nearest(mask.view(np.uint8)), 0)


def clip_polygon(points: np.ndarray, size: Size) -> np.ndarray:
    """Returns the part of a polygon within the image, float64 [m, 2].

    What annotators drew beyond the border must not come into sight by a rotation.
    Source: Sutherland and Hodgman 1974.
    """
    for axis, limit, sign in ((0, 0, -1.0), (0, size[1], 1.0), (1, 0, -1.0), (1, size[0], 1.0)):
        beyond = sign * (points[:, axis] - limit) > 0
        if not beyond.any():
            continue
        after = np.roll(points, -1, axis=0)
        crossing = beyond != np.roll(beyond, -1)
        run = np.where(crossing, after[:, axis] - points[:, axis], 1)
        share = (limit - points[:, axis]) / run
        met = points + share[:, None] * (after - points)
        met[:, axis] = limit
        both = np.stack([points, met], axis=1).reshape(-1, 2)
        points = both[np.stack([~beyond, crossing], axis=1).ravel()]
        if not len(points):
            break
    return points


def draw_object(
    segmentations: Segmentations, index: int, size: Size, new_size: Size | None = None
) -> Crop | None:
    """Returns one object's mask in its image of this size, which may be resized; None if
    it is empty."""
    affine = Affine(size, size, np.eye(2, 3)).resized(new_size or size)
    return spans_to_crop(draw_spans(segmentations, [index], affine))


def concatenate_spans(pieces: Sequence[Spans]) -> Spans:
    """Returns the spans of several sets, sorted by object."""
    if not pieces:
        return Spans(*[np.zeros(0, np.int64)] * 4)
    if len(pieces) == 1:
        return pieces[0]
    columns = [(piece.owner, piece.column, piece.top, piece.bottom) for piece in pieces]
    joined = Spans(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    return joined.take(np.argsort(joined.owner, kind="stable"))


def select_spans(spans: Spans, chosen: np.ndarray, num_objects: int) -> Spans:
    """Returns the spans of some of the objects, which are counted anew.

    Args:
      chosen: the objects, in order.
      num_objects: before the choice.
    """
    position = np.full(num_objects, -1)
    position[chosen] = np.arange(len(chosen))
    owner = position[spans.owner]
    kept = spans.take(np.flatnonzero(owner >= 0))
    return dataclasses.replace(kept, owner=owner[owner >= 0])


def shift_spans(spans: Spans, top: int, left: int, size: Size) -> Spans:
    """Returns the spans moved, without what leaves an image of this size."""
    column = spans.column + left
    upper, lower = np.maximum(spans.top + top, 0), np.minimum(spans.bottom + top, size[0])
    inside = np.flatnonzero((column >= 0) & (column < size[1]) & (lower > upper))
    return Spans(spans.owner[inside], column[inside], upper[inside], lower[inside])


def subtract_cover(spans: Spans, cover: np.ndarray) -> Spans:
    """Returns the spans without the pixels where `cover`, bool [h, w], is True."""
    length = spans.bottom - spans.top + 1  # a row that is not visible ends every span
    span = np.repeat(np.arange(len(length)), length)
    row = ranks(length) + spans.top[span]
    visible = row < spans.bottom[span]
    visible[visible] = ~cover[row[visible], spans.column[span[visible]]]
    edges = np.flatnonzero(np.diff(visible.view(np.int8), prepend=0))
    begin, end = edges[::2], edges[1::2]
    kept = span[begin]
    return Spans(spans.owner[kept], spans.column[kept], row[begin], row[end])


def bounding_boxes(spans: Spans, num_objects: int) -> np.ndarray:
    """Returns (x0, y0, x1, y1) around each object's pixels, float32 [n, 4]; zeros for
    one that has none."""
    boxes = np.zeros((num_objects, 4), np.float32)
    if len(spans.owner):
        begin = np.flatnonzero(np.diff(spans.owner, prepend=-1))
        boxes[spans.owner[begin]] = np.stack(
            [
                np.minimum.reduceat(spans.column, begin),
                np.minimum.reduceat(spans.top, begin),
                np.maximum.reduceat(spans.column, begin) + 1,
                np.maximum.reduceat(spans.bottom, begin),
            ],
            axis=-1,
        )
    return boxes


@lru_cache(maxsize=256)
def _nearest_edges(old: int, new: int) -> np.ndarray:
    """Returns the first target pixel at or after each source edge, int64 [old + 1].

    Source: PIL's Geometry.c, ImagingScaleAffine, which adds up the step; so do we.
    """
    step = old / new
    position = np.full(new, step)
    position[0] = step * 0.5
    source = np.minimum(np.cumsum(position).astype(np.int64), old - 1)
    return np.searchsorted(source, np.arange(old + 1))


def resize_spans(spans: Spans, old_size: Size, new_size: Size) -> Spans:
    """Returns the masks after PIL's nearest resize of the image."""
    if old_size == new_size:
        return spans
    rows = _nearest_edges(old_size[0], new_size[0])
    columns = _nearest_edges(old_size[1], new_size[1])
    top, bottom = rows[spans.top], rows[spans.bottom]
    left = columns[spans.column]
    copies = np.where(bottom > top, columns[spans.column + 1] - left, 0)
    left = np.repeat(left, copies) + ranks(copies)
    owner, top, bottom = (np.repeat(a, copies) for a in (spans.owner, top, bottom))
    return Spans(owner, left, top, bottom)


def mass_centers(spans: Spans, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean (x, y) of each object's pixel indices, float32 [n, 2], and
    which objects have a pixel, bool [n].

    Source: AdelaiDet adet/modeling/solov2/utils.py, center_of_mass. The sums are exact
    here, float32 there, so large masks can differ in the last digit.
    """
    length = spans.bottom - spans.top
    x = spans.column * length
    y = (spans.top + spans.bottom - 1) * length // 2
    area, x, y = (np.bincount(spans.owner, v, num_objects) for v in (length, x, y))
    sums = np.stack([x, y], axis=-1).astype(np.float32)
    present = area > 0
    return sums / np.where(present, area, 1).astype(np.float32)[:, None], present


def spans_to_masks(spans: Spans, num_objects: int, size: Size) -> np.ndarray:
    """Returns whole masks of the image's size (height, width), bool [n, h, w]."""
    masks = np.zeros((num_objects, *size), bool)
    edges = np.searchsorted(spans.owner, np.arange(num_objects + 1))
    for mask, start, stop in zip(masks, edges[:-1], edges[1:], strict=True):
        if (crop := spans_to_crop(spans.take(np.arange(start, stop)))) is not None:
            h, w = crop.pixels.shape
            mask[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
    return masks


def spans_from_masks(masks: np.ndarray) -> Spans:
    """Returns the spans of whole masks, bool [n, h, w]."""
    pieces = [spans_from_pixels(mask, i) for i, mask in enumerate(masks)]
    return concatenate_spans(pieces)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How one side is scaled by 1/4, by two neighbours per target pixel."""

    rank: np.ndarray  # int64 [side + 1], how many pixels before this one are read
    first: np.ndarray  # int32 [new], the weight of the first neighbour, in 1/2048
    second: np.ndarray  # int32 [new]


@lru_cache(maxsize=512)
def _axis(side: int) -> _Axis:
    """Returns the table of a side.

    Source: OpenCV resize.cpp, 8-bit INTER_LINEAR: weights in 1/2048. At this scale a
    position never leaves the image, and no pixel is read twice.
    """
    new = int(side * 0.25 + 0.5)
    position = ((np.arange(new) + 0.5) * (side / max(new, 1)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    part = position - low.astype(np.float32)
    read = np.zeros(side + 1, np.int64)
    read[low + 1] += 1
    read[low + 2] += 1
    return _Axis(
        np.cumsum(read),
        np.rint((np.float32(1) - part) * np.float32(2048)).astype(np.int32),
        np.rint(part * np.float32(2048)).astype(np.int32),
    )


def stride4_masks(spans: Spans, size: Size) -> Iterator[tuple[int, Crop]]:
    """Yields (object, its mask at a quarter of the size), sides int(side / 4 + 0.5).

    Equal, bit for bit, to OpenCV's bilinear resize of the whole image's uint8 mask. An
    object of which no pixel is read is left out: its small mask is empty.
    Source: AdelaiDet adet/modeling/solov2/utils.py, imrescale.

    Args:
      size: (height, width) of the image.
    """
    rows, columns = _axis(size[0]), _axis(size[1])
    left = columns.rank[spans.column]
    top, bottom = rows.rank[spans.top], rows.rank[spans.bottom]
    read = np.flatnonzero((columns.rank[spans.column + 1] > left) & (bottom > top))
    if not len(read):
        return
    owner, left, top, bottom = (a[read] for a in (spans.owner, left, top, bottom))
    begin = np.flatnonzero(np.diff(owner, prepend=-1))
    # Rectangles of whole target pixels: two columns and two rows read for each.
    x0 = np.minimum.reduceat(left, begin) // 2
    x1 = np.maximum.reduceat(left, begin) // 2 + 1
    y0 = np.minimum.reduceat(top, begin) // 2
    y1 = (np.maximum.reduceat(bottom, begin) + 1) // 2
    tall = 2 * (y1 - y0)
    ends = np.cumsum(tall * 2 * (x1 - x0))
    starts = ends - tall * 2 * (x1 - x0)
    own = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(owner)))
    place = starts[own] + (left - 2 * x0[own]) * tall[own] - 2 * y0[own]
    steps = np.zeros(ends[-1] + 1, np.int8)
    steps[place + top] += 1
    steps[place + bottom] -= 1
    pixels = np.cumsum(steps, dtype=np.int8).view(np.uint8)
    exact = size[0] % 4 == 0 and size[1] % 4 == 0
    boxes = np.stack([owner[begin], starts, ends, tall, x0, x1, y0, y1], axis=-1)
    for index, a, b, height, left, right, upper, lower in boxes.tolist():
        part = pixels[a:b].reshape(-1, height)
        if exact:
            # Equal weights: at least two of the four pixels in the middle.
            pairs = part[0::2] + part[1::2]
            small = pairs[:, 0::2] + pairs[:, 1::2] >= 2
        else:
            x, y = slice(left, right), slice(upper, lower)
            small = _weigh(part, columns, x, rows, y)
        yield index, Crop(small.view(np.uint8).T, upper, left)


def _weigh(part: np.ndarray, columns: _Axis, x: slice, rows: _Axis, y: slice) -> np.ndarray:
    """Returns the weighted pixels, rounded as OpenCV rounds, bool [x, y]."""
    across = part[0::2] * columns.first[x, None] + part[1::2] * columns.second[x, None]
    across >>= 4
    upper = (across[:, 0::2] * rows.first[y]) >> 16
    lower = (across[:, 1::2] * rows.second[y]) >> 16
    return upper + lower >= 2
