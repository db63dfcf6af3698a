"""Which grid cells an object is trained in, in numpy: for reports and pictures.

Training computes the same on the device, in `targets.py`; a test compares both.
Source: AdelaiDet adet/modeling/solov2/solov2.py, get_ground_truth_single.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class GridAssignment:
    """The cells of n objects of one image on L levels, both ends included."""

    hit: np.ndarray  # bool [L, n], the object belongs to the level
    top: np.ndarray  # int [L, n]
    down: np.ndarray
    left: np.ndarray
    right: np.ndarray


def assign_grid(
    boxes: np.ndarray,
    centers: np.ndarray,
    padded: tuple[int, int],
    *,
    num_grids: Sequence[int],
    scale_ranges: Sequence[tuple[int | float, int | float]],
    sigma: float,
) -> GridAssignment:
    """Returns the cells of every object.

    Args:
      boxes: (x0, y0, x1, y1) [n, 4], input pixels.
      centers: (x, y) mass centres [n, 2], input pixels.
      padded: (height, width) of the padded input.
    """
    boxes, centers = np.asarray(boxes, np.float32), np.asarray(centers, np.float32)
    extent = boxes[:, 2:] - boxes[:, :2]
    side = np.sqrt(extent[:, 0] * extent[:, 1])
    low, high = np.array(scale_ranges, np.float32).T[..., None]
    half = np.float32(0.5 * sigma) * extent
    left, right = _range(centers[:, 0], half[:, 0], padded[1], num_grids)
    top, down = _range(centers[:, 1], half[:, 1], padded[0], num_grids)
    return GridAssignment((side >= low) & (side <= high), top, down, left, right)


def _range(
    center: np.ndarray, half: np.ndarray, size: int, num_grids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and last cell per level [L, n], within one of the centre's."""
    first, last = [], []
    for grid in num_grids:
        # Exact multiples of the float32 that the reference divides by.
        starts = np.arange(1, grid) * np.float64(np.float32(1 / grid))
        middle, low, high = (
            np.searchsorted(starts, (x / np.float32(size)).astype(float), "right")
            for x in (center, center - half, center + half)
        )
        first.append(np.maximum(low, middle - 1))
        last.append(np.minimum(high, middle + 1))
    return np.array(first), np.array(last)


@dataclasses.dataclass(frozen=True)
class Collisions:
    """How the objects of one image get on with each other's cells."""

    owner: tuple[np.ndarray, ...]  # int [g, g] per level: last object, -1 none
    count: tuple[np.ndarray, ...]  # int [g, g] per level: objects in the cell
    shared: np.ndarray  # bool [L, n]: a cell of the object is another's too
    owns: np.ndarray  # bool [L, n]: a cell's class is the object's


def count_collisions(cells: GridAssignment, num_grids: Sequence[int]) -> Collisions:
    """Returns who is in which cell; the last object of a cell gives it its class."""
    number = cells.hit.shape[1]
    owners, counts = [], []
    shared, owns = np.zeros_like(cells.hit), np.zeros_like(cells.hit)
    for level, grid in enumerate(num_grids):
        owner, count = np.full((grid, grid), -1), np.zeros((grid, grid), int)
        row, column, index = _members(cells, level)
        np.maximum.at(owner, (row, column), index)
        np.add.at(count, (row, column), 1)
        many = np.bincount(index, count[row, column] > 1, number)
        mine = np.bincount(index, owner[row, column] == index, number)
        shared[level], owns[level] = many > 0, mine > 0
        owners.append(owner)
        counts.append(count)
    return Collisions(tuple(owners), tuple(counts), shared, owns)


def _members(cells: GridAssignment, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, column and object of every (cell, object) pair of a level."""
    step = np.arange(3)
    top, left = cells.top[level][:, None, None], cells.left[level][:, None, None]
    row, column = np.broadcast_arrays(top + step[:, None], left + step)
    inside = cells.hit[level][:, None, None]
    inside = inside & (row <= cells.down[level][:, None, None])
    inside = inside & (column <= cells.right[level][:, None, None])
    index = np.broadcast_to(np.arange(len(row))[:, None, None], row.shape)
    return row[inside], column[inside], index[inside]
