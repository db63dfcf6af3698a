"""Padded ground truth -> which cell learns which mask, on device, with fixed shapes.

Shapes: the legend of `structs.py`, and L levels.
Source: AdelaiDet adet/modeling/solov2/solov2.py, get_ground_truth_single. Differences:
no loop over instances; an image or a batch without objects is an ordinary case; more
pairs than `max_pairs` are thinned out at random instead of growing the memory.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from solov2_jax.ops import STRIDE
from solov2_jax.structs import Batch, Targets

MAX_CELLS_PER_SIDE = 3  # an object covers at most 3 x 3 cells of a level


@jax.named_scope("targets")
def assign_targets(
    batch: Batch,
    *,
    num_grids: Sequence[int],
    scale_ranges: Sequence[tuple[int | float, int | float]],
    sigma: float,
    num_classes: int,
    max_pairs: int,
    key: Key[Array, ""],
) -> Targets:
    """Returns the targets of every image; needs at least one (padded) object.

    Args:
      num_grids: cells per side on each level, finest level first.
      scale_ranges: sqrt(box area) that a level takes, input pixels, ends included.
      sigma: size of the centre region over the size of the box.
      max_pairs: slots per image. Beyond it a uniformly random subset keeps its place,
        with weights that leave the expectation of the mean unchanged.
      key: only drawn from for images with more than `max_pairs` pairs.

    Source: solov2.py, get_ground_truth. Pairs come in its order: level, annotation,
    row-major cell. A cell that several objects hit is in one pair with each of them,
    and its class is the last one's.
    """
    if len(num_grids) != len(scale_ranges):
        raise ValueError(
            f"num_grids has {len(num_grids)} levels but scale_ranges has "
            f"{len(scale_ranges)}: give one range per level"
        )
    b, _, h4, w4 = batch.masks.shape
    # Cells divide the padded batch, not the image, as in the reference.
    edges = _edges_of(batch.extent, (4 * h4, 4 * w4), tuple(num_grids))
    axis = None if batch.extent is None else 0
    bounds = _area_bounds(np.array(scale_ranges, np.float32))

    def assign_image(boxes, labels, centers, valid, key, y_edges, x_edges) -> dict[str, Array]:
        extent = boxes[:, 2:] - boxes[:, :2]
        area = extent[None, :, 0] * extent[None, :, 1]
        on_level = (area >= bounds[:, :1]) & (area < bounds[:, 1:]) & valid[None]
        half = _rounded(0.5 * sigma * extent)
        left, right = _cell_range(centers[:, 0], half[:, 0], x_edges)
        top, down = _cell_range(centers[:, 1], half[:, 1], y_edges)
        region = _Region(on_level=on_level, top=top, down=down, left=left, right=right)
        owner = _last_owner(region, num_grids)
        positive = owner >= 0
        cate = jnp.where(positive, labels[jnp.maximum(owner, 0)], num_classes)
        cell, instance, weight, num_pairs = _pairs(region, num_grids, max_pairs, key)
        return {
            "cate": cate.astype(jnp.int32),
            "pair_cell": cell,
            "pair_instance": instance,
            "pair_weight": weight,
            "num_pairs": num_pairs,
            "num_cells": jnp.sum(positive, dtype=jnp.int32),
        }

    keys = jax.random.split(key, b)
    boxes, centers = (x.astype(jnp.float32) for x in (batch.boxes, batch.centers))
    assign = jax.vmap(assign_image, in_axes=(0, 0, 0, 0, 0, axis, axis))
    return Targets(**assign(boxes, batch.labels, centers, batch.valid, keys, edges[0], edges[1]))


@struct.dataclass
class _Region:
    """The cells that each object covers on each level, both ends included."""

    on_level: Bool[Array, "L G"]  # whether the object belongs to the level
    top: Int[Array, "L G"]
    down: Int[Array, "L G"]
    left: Int[Array, "L G"]
    right: Int[Array, "L G"]


def _cell_range(
    center: Float[Array, "G"], half: Float[Array, "G"], edges: Float[Array | np.ndarray, "L k"]
) -> tuple[Int[Array, "L G"], Int[Array, "L G"]]:
    """Returns the first and last cell of center -+ half, within one of the center's."""
    cell = partial(_find_cell, edges=edges)
    middle = cell(center)
    first = jnp.maximum(cell(center - half), middle - 1)
    last = jnp.minimum(cell(center + half), middle + 1)
    return first, last


def _find_cell(x: Float[Array, "G"], edges: Float[Array | np.ndarray, "L k"]) -> Int[Array, "L G"]:
    """Returns the cell that holds a coordinate, clipped to the grid."""
    return jnp.sum(x[None, :, None] >= edges[:, None], axis=-1, dtype=jnp.int32)


def _last_owner(region: _Region, num_grids: Sequence[int]) -> Int[Array, "S"]:
    """Returns the last object that covers each cell, -1 where there is none."""
    level = np.repeat(np.arange(len(num_grids)), [g * g for g in num_grids])
    row = np.concatenate([np.repeat(np.arange(g), g) for g in num_grids])[:, None]
    column = np.concatenate([np.tile(np.arange(g), g) for g in num_grids])[:, None]
    of_cell = jax.tree.map(lambda x: x[level], region)  # [S, G]
    covered = of_cell.on_level & (of_cell.top <= row) & (row <= of_cell.down)
    covered &= (of_cell.left <= column) & (column <= of_cell.right)
    instance = jnp.arange(covered.shape[1], dtype=jnp.int32)[None]
    return jnp.max(jnp.where(covered, instance, -1), axis=1)


def _pairs(
    region: _Region, num_grids: Sequence[int], max_pairs: int, key: Key[Array, ""]
) -> tuple[Int[Array, "P"], Int[Array, "P"], Float[Array, "P"], Int[Array, ""]]:
    """Returns cell, object and weight of each slot, and the number of pairs."""
    step = np.arange(MAX_CELLS_PER_SIDE, dtype=np.int32)[None, None]
    row, column = region.top[..., None] + step, region.left[..., None] + step
    has_row, has_column = row <= region.down[..., None], column <= region.right[..., None]
    valid = region.on_level[..., None, None] & has_row[..., None] & has_column[..., None, :]
    side = np.array(num_grids, np.int32)
    start = np.cumsum(side**2, dtype=np.int32) - side**2
    side, start = side[:, None, None, None], start[:, None, None, None]
    cell = start + row[..., None] * side + column[..., None, :]  # [L, G, 3, 3]
    num_objects, valid, cell = region.on_level.shape[1], valid.ravel(), cell.ravel()

    # Valid pairs rank above the rest, in random order; when they fit, all are taken.
    rank = jax.random.bits(key, valid.shape, jnp.uint32) >> 1
    rank = jnp.where(valid, rank.astype(jnp.int32), -1)
    _, pair = jax.lax.top_k(rank, min(max_pairs, valid.size))
    pair = jnp.sort(jnp.where(valid[pair], pair, valid.size))  # back in order
    missing = max(max_pairs - valid.size, 0)
    pair = jnp.pad(pair, (0, missing), constant_values=valid.size)
    kept = pair < valid.size
    pair = jnp.where(kept, pair, 0)

    num_pairs = jnp.sum(valid, dtype=jnp.int32)
    scale = num_pairs / jnp.clip(num_pairs, 1, max_pairs)
    weight = jnp.where(kept, scale, 0.0).astype(jnp.float32)
    instance = jnp.where(kept, pair // MAX_CELLS_PER_SIDE**2 % num_objects, 0)
    return jnp.where(kept, cell[pair], 0), instance, weight, num_pairs


def _level_edges(size: int, num_grids: Sequence[int]) -> Float[np.ndarray, "L k"]:
    """Returns `cell_edges` per level, filled up with infinity."""
    edges = np.full((len(num_grids), max(num_grids) - 1), np.inf, np.float32)
    for i, num_grid in enumerate(num_grids):
        edges[i, : num_grid - 1] = cell_edges(size, num_grid)
    return edges


def _edges_of(
    extent: Int[Array, "B 2"] | None, sides: tuple[int, int], num_grids: tuple[int, ...]
) -> list[Float[Array, "*B L k"]]:
    """Returns `_level_edges` of the rows and of the columns, of each image if it has an extent.

    Args:
      sides: (height, width) of the arrays, which no extent exceeds.
    """
    if extent is None:
        return [jnp.asarray(_level_edges(side, num_grids)) for side in sides]
    row = extent // STRIDE - 1
    tables = (_edges_within(side, num_grids) for side in sides)
    return [jnp.asarray(table)[row[:, i]] for i, table in enumerate(tables)]


@cache
def _edges_within(size: int, num_grids: tuple[int, ...]) -> Float[np.ndarray, "n L k"]:
    """Returns `_level_edges` of the sizes 32, 64, ... up to `size`."""
    sizes = range(STRIDE, size + 1, STRIDE)
    return np.stack([_level_edges(side, num_grids) for side in sizes])


def cell_edges(size: int, num_grid: int) -> Float[np.ndarray, "k"]:
    """Returns the smallest float32 coordinate that lies in cells 1 .. num_grid - 1.

    The reference computes `int((x / size) // (1.0 / num_grid))` in float32, which puts
    some x on a border into the cell before. Found here once, on the host: on a device
    the compiler may turn a division into a product, and `floor_divide` differs.

    Source: solov2.py, get_ground_truth_single, `coord_w`.
    """
    # Floor-division is the floor of the exact quotient: compare with exact multiples.
    starts = np.arange(1, num_grid) * np.float64(np.float32(1 / num_grid))
    return _first_float(lambda x: x / np.float32(size) >= starts, starts * size)


def _area_bounds(ranges: Float[np.ndarray, "L 2"]) -> Float[np.ndarray, "L 2"]:
    """Returns the areas whose float32 root is in each range, the second excluded."""
    low, high = ranges.T
    first = _first_float(lambda x: np.sqrt(x) >= low, np.square(low))
    after = _first_float(lambda x: np.sqrt(x) > high, np.square(high))
    return np.stack([first, after], axis=1)


def _first_float(
    holds: Callable[[np.ndarray], np.ndarray], near: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """Returns the smallest float32 within 8 steps of `near` for which `holds` is true.

    `holds` must be monotone, and `near` not negative.
    """
    bits = near.astype(np.float32).view(np.int32)
    steps = np.arange(-8, 9, dtype=np.int32)[:, None]
    x = np.maximum(bits[None] + steps, 0).view(np.float32)
    true = holds(x)
    assert true[-1].all(), "the search starts too far below"
    return np.take_along_axis(x, np.argmax(true, axis=0)[None], axis=0)[0]


def _rounded(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns x, kept from being part of a fused multiply-add, which rounds otherwise.

    Compilers fuse `a - b * c` on their own, also across an optimization barrier, but
    not through a minimum.
    """
    return jnp.minimum(x, np.float32(2**24))
