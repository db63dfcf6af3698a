"""Masks -> polygons that people correct by hand and that draw the mask again.

Coordinates are those of annotations: (0, 0) is the image's upper left corner, and the
middle of the first pixel lies at (0.5, 0.5).
"""

from collections.abc import Sequence

import contourpy
import numpy as np
from scipy.spatial import KDTree

# Pixels by which a simplified outline may leave the mask's, and the share of the
# object's size (square root of its area) where that is more.
TOLERANCE, TOLERANCE_SHARE = 0.4, 1 / 200

Ring = np.ndarray  # float64 [n, 2], x y, n >= 3, not closed


def mask_polygons(
    mask: np.ndarray, left: int = 0, top: int = 0, tolerance: float | None = None
) -> list[list[Ring]]:
    """Returns the parts of a mask, largest first, each as its outline and its holes.

    The outline runs halfway between pixels inside and outside.

    Args:
      mask: bool [h, w].
      left, top: where it lies in the image.
      tolerance: see `simplify`; 0 keeps every corner. None: by the object's size.
    """
    if tolerance is None:
        size = float(np.sqrt(np.count_nonzero(mask)))
        tolerance = max(TOLERANCE, TOLERANCE_SHARE * size)
    padded = np.pad(mask, 1).astype(np.float32)
    generator = contourpy.contour_generator(
        z=padded, name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    parts = []
    for points, offsets in zip(*generator.filled(0.5, 2.0), strict=True):
        # From the middles of padded pixels to the image's corners.
        moved = points + (left - 0.5, top - 0.5)
        rings = [
            simplify(moved[a : b - 1], tolerance)  # the last point repeats the first
            for a, b in zip(offsets[:-1], offsets[1:], strict=True)
        ]
        parts.append([rings[0], *(r for r in rings[1:] if len(r) >= 3)])
    return sorted(parts, key=lambda rings: -ring_area(rings[0]))


def ring_area(ring: Ring) -> float:
    x, y = (ring - ring[:1]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def simplify(ring: Ring, tolerance: float) -> Ring:
    """Returns the ring with fewer corners, none of the others farther than `tolerance`.

    Source: Douglas and Peucker (1973), between the two corners farthest apart.
    """
    if len(ring) <= 4 or tolerance <= 0:
        return ring
    start = int(np.argmax(np.sum((ring - ring[0]) ** 2, axis=1)))
    ring = np.roll(ring, -start, axis=0)
    far = int(np.argmax(np.sum((ring - ring[0]) ** 2, axis=1)))
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far]] = True
    pending = [(0, far), (far, len(closed) - 1)]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        distance = _distances(closed[first + 1 : last], closed[first], closed[last])
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            pending += [(first, middle), (middle, last)]
    simple = ring[keep[:-1]]
    return simple if len(simple) >= 3 else ring


def _distances(points: Ring, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the distance of each point from the segment a b."""
    along = b - a
    length = float(along @ along)
    share = np.clip((points - a) @ along / length, 0, 1) if length else 0.0
    feet = a + np.outer(share, along) if length else a
    return np.hypot(*(points - feet).T)


def join_rings(rings: Sequence[Ring]) -> Ring:
    """Returns one ring that draws them all, for formats with one polygon an object.

    Each next ring, a hole or another part, is reached and left by the same shortest
    way, which has no width.
    """
    joined = rings[0]
    rest = list(rings[1:])
    while rest:
        ways = [_shortest_way(joined, ring) for ring in rest]
        chosen = int(np.argmin([length for length, _, _ in ways]))
        _, i, j = ways[chosen]
        ring = np.roll(rest.pop(chosen), -j, axis=0)
        joined = np.concatenate([joined[: i + 1], ring, ring[:1], joined[i:]])
    return joined


def _shortest_way(a: Ring, b: Ring) -> tuple[float, int, int]:
    """Returns (length, corner of a, corner of b) of the shortest way."""
    lengths, corners = (np.asarray(values) for values in KDTree(b).query(a))
    i = int(np.argmin(lengths))
    return float(lengths[i]), i, int(corners[i])
