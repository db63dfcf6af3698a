"""Outlines of objects as annotation files hold them: polygons and run lengths."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.io import InputError
from solov2_jax.rle import (
    InvalidRLE,
    check_cover,
    offsets,
    polygons_to_rle,
    ranks,
    rle_from_strings,
    rle_to_strings,
)

# Shortest side of a box that still counts, in pixels.
# Source: detectron2 data/detection_utils.py, filter_empty_instances.
MIN_BOX_SIDE = 1e-5
# A polygon is walked pixel by pixel, so a wild coordinate would hang the reader.
MAX_COORDINATE = 1e6
NUMBERS = {int, float}  # json's booleans are no numbers, though Python's are
_CHUNK = 4096  # masks that are decoded at once


@dataclasses.dataclass(frozen=True)
class Segmentations:
    """Outlines of A objects: polygons, or run lengths, or neither.

    Object a has the polygons `part_start[a]:part_start[a + 1]`; polygon p has the
    values `points[point_start[p]:point_start[p + 1]]`. An object without polygons has
    the compressed run lengths `runs[run_start[a]:run_start[a + 1]]`.
    """

    points: np.ndarray  # float64 [V], x, y, x, y, ... in pixels of the original image
    point_start: np.ndarray  # int64 [P + 1]
    part_start: np.ndarray  # int64 [A + 1]
    runs: np.ndarray  # uint8 [R], COCO's compressed string, at the original size
    run_start: np.ndarray  # int64 [A + 1]

    def polygons(self, index: int) -> list[np.ndarray]:
        """Returns the polygons of an object, each float64 [2 * points]."""
        first, last = self.part_start[index], self.part_start[index + 1]
        edges = self.point_start[first : last + 1]
        return [self.points[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]

    def run_lengths(self, index: int) -> bytes:
        """Returns COCO's compressed run lengths, empty if the object has polygons."""
        return self.runs[self.run_start[index] : self.run_start[index + 1]].tobytes()

    def rle(self, index: int, size: tuple[int, int]) -> dict[str, Any] | None:
        """Returns an object's mask as pycocotools' RLE, None without an outline.

        Args:
          size: (height, width) of its image.
        """
        if counts := self.run_lengths(index):
            return {"size": list(size), "counts": counts}
        polygons = self.polygons(index)
        return polygons_to_rle(polygons, size) if polygons else None

    def extents(self, rows: np.ndarray) -> np.ndarray:
        """Returns (x0, y0, x1, y1) of increasing objects with polygons, float64 [n, 4]."""
        outlines = self.take(rows)
        if not len(rows):
            return np.zeros((0, 4))
        first = outlines.point_start[outlines.part_start[:-1]] // 2
        xy = outlines.points.reshape(-1, 2)
        low, high = (f.reduceat(xy, first, axis=0) for f in (np.minimum, np.maximum))
        return np.concatenate([low, high], axis=1)

    def take(self, rows: np.ndarray) -> "Segmentations":
        """Returns the outlines of some objects, int [n], in that order."""
        parts, part_start = _gather(self.part_start, rows)
        values, point_start = _gather(self.point_start, parts)
        letters, run_start = _gather(self.run_start, rows)
        return Segmentations(
            self.points[values], point_start, part_start, self.runs[letters], run_start
        )


def rectangles(boxes: np.ndarray, sizes: np.ndarray) -> Segmentations:
    """Returns boxes (x0, y0, x1, y1) [n, 4] as outlines in images of (height, width) [n, 2]."""
    n, boxes = len(boxes), np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2))
    return Segmentations(
        points=boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64).ravel(),
        point_start=8 * np.arange(n + 1),
        part_start=np.arange(n + 1),
        runs=np.zeros(0, np.uint8),
        run_start=np.zeros(n + 1, np.int64),
    )


def join_segmentations(first: Segmentations, second: Segmentations) -> Segmentations:
    """Returns the outlines of both, those of `second` after the others."""

    def ends(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, a[-1] + b[1:]])

    return Segmentations(
        points=np.concatenate([first.points, second.points]),
        point_start=ends(first.point_start, second.point_start),
        part_start=ends(first.part_start, second.part_start),
        runs=np.concatenate([first.runs, second.runs]),
        run_start=ends(first.run_start, second.run_start),
    )


def _gather(start: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the elements of these pieces, and the pieces' new starts."""
    lengths = np.diff(start)[rows]
    first = offsets(lengths)
    return ranks(lengths) + np.repeat(start[rows], lengths), first


def make_segmentations(
    outlines: Sequence[tuple[Sequence[np.ndarray], bytes]],
) -> Segmentations:
    """Returns outlines, each of polygons and run lengths, as columns."""
    points = [p for polygons, _ in outlines for p in polygons]
    return Segmentations(
        points=np.concatenate(points) if points else np.zeros(0),
        point_start=offsets([len(p) for p in points]),
        part_start=offsets([len(polygons) for polygons, _ in outlines]),
        runs=np.frombuffer(b"".join(counts for _, counts in outlines), np.uint8),
        run_start=offsets([len(counts) for _, counts in outlines]),
    )


def are_numbers(values: Any) -> bool:
    """Returns whether a json value is a list of finite numbers, no booleans or text."""
    return (
        isinstance(values, list | tuple)
        and set(map(type, values)) <= NUMBERS
        and all(-1e300 < v < 1e300 for v in values)
    )


def as_json(value: Any) -> str:
    """Returns a value as it stands in a file, text in quotes, at most 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_outline(
    segmentation: Any, size: Sequence[int], name: Callable[[], str]
) -> tuple[list[np.ndarray], bytes]:
    """Returns a segmentation's polygons, float64 [2 * points] each, or its run lengths.

    Unusable polygons are among them; the run lengths are COCO's compressed string, which
    `rle_areas` checks.

    Args:
      size: (height, width) of the image.
      name: of the place in messages.
    """
    if isinstance(segmentation, Mapping):
        return [], _run_lengths(segmentation, size, name)
    if not isinstance(segmentation, list | tuple):
        raise InputError(
            f"{name()}: `segmentation` is a {type(segmentation).__name__}; give polygons (a "
            "list of lists) or run lengths (size and counts)."
        )
    flat = _flat_outlines(segmentation)
    lone = flat is not None and len(flat) == 1 and flat[0] is segmentation
    if flat is None or (lone and segmentation and not is_polygon(segmentation)):
        raise InputError(
            f"{name()}: `segmentation` must be a list of polygons, each a flat list of "
            "numbers [x0, y0, x1, y1, ...]; rewrite it."
        )
    try:
        polygons = [np.array(p, np.float64) for p in flat]
    except OverflowError:
        polygons = [np.full(6, np.inf)]
    if not all(np.abs(p).max() < MAX_COORDINATE for p in polygons if is_polygon(p)):
        raise InputError(
            f"{name()}: `segmentation` has a coordinate that is no number or beyond "
            f"{MAX_COORDINATE:.0f} pixels; correct it."
        )
    return polygons, b""


def is_polygon(outline: Any) -> bool:
    """Returns whether a flat outline has 3 points or more."""
    return len(outline) >= 6 and len(outline) % 2 == 0


def _flat_outlines(value: Any, depth: int = 0) -> list[Any] | None:
    """Returns the flat lists of numbers in nested ones; None if there is anything else.

    A list of pairs is one outline; lists around an outline mean nothing.
    """
    types = set(map(type, value))
    if types <= NUMBERS:
        return [value]
    if not types <= {list, tuple} or depth > 8:
        return None
    if len(value) > 2 and all(len(p) == 2 and set(map(type, p)) <= NUMBERS for p in value):
        return [[v for pair in value for v in pair]]
    outlines = []
    for part in value:
        inner = _flat_outlines(part, depth + 1)
        if inner is None:
            return None
        outlines += inner
    return outlines


def _run_lengths(
    segmentation: Mapping[str, Any], size: Sequence[int], name: Callable[[], str]
) -> bytes:
    """Returns compressed run lengths of the image's size."""
    counts, stated, pixels = segmentation.get("counts"), segmentation.get("size"), size[0] * size[1]
    if not are_numbers(stated) or list(stated or ()) != list(size):
        why = f"has size {as_json(stated)}, but its image is {list(size)} (height, width)"
    elif isinstance(counts, str | bytes) and counts:
        return counts if isinstance(counts, bytes) else counts.encode()
    elif not isinstance(counts, list) or set(map(type, counts)) != {int} or min(counts) < 0:
        why = "needs `counts`, a list of run lengths or COCO's compressed string"
    elif sum(counts) != pixels:
        why = f"has `counts` that add up to {sum(counts)}, not to {size[0]} x {size[1]} = {pixels}"
    else:
        return rle_to_strings([np.array(counts)])[0].encode()
    raise InputError(f"{name()}: `segmentation` {why}; encode the mask again.")


def rle_areas(
    counts: Sequence[bytes], pixels: Sequence[int], name: Callable[[int], str]
) -> np.ndarray:
    """Returns the number of pixels of each mask, int64 [n].

    Args:
      counts: COCO's compressed run lengths.
      pixels: of each mask's image.
      name: of a mask, in messages.

    Raises:
      InputError: naming the first mask whose run lengths do not cover its image.
    """
    areas = [np.zeros(0, np.int64)]
    for first in range(0, len(counts), _CHUNK):
        try:
            runs, lengths = rle_from_strings(counts[first : first + _CHUNK])
            check_cover(runs, lengths, pixels[first : first + _CHUNK])
        except InvalidRLE as error:
            raise InputError(
                f"{name(first + error.position)}: `segmentation` has {error}; encode the mask "
                "again."
            ) from None
        areas.append(np.diff(offsets(runs * (ranks(lengths) & 1))[offsets(lengths)]))
    return np.concatenate(areas)


def covers(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns which boxes have an extent inside of their image, bool [A].

    Args:
      boxes: (x0, y0, x1, y1) [A, 4].
      sizes: (height, width) [A, 2].
    """
    limit = sizes[:, ::-1]
    side = np.clip(boxes[:, 2:], 0, limit) - np.clip(boxes[:, :2], 0, limit)
    return np.asarray((side > MIN_BOX_SIDE).all(axis=-1))
