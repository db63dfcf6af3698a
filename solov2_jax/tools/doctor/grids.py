"""How objects fit grids and scale ranges, and which would suit them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.tools.doctor.findings import WARNING, Finding, one_finding, share
from solov2_jax.tools.doctor.measure import MeasuredObjects
from solov2_jax.tools.grid_assignment import assign_grid, count_collisions

STRIDE = 32
Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Grids and scale ranges, finest level first, and the image's scale.

    `scale` is relative to the size that the objects were measured at.
    """

    num_grids: tuple[int, ...]
    scale_ranges: Ranges
    sigma: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class GridCollisions:
    """How many objects of a layout get in each other's way."""

    objects: np.ndarray  # int [L], objects on each level
    shared: np.ndarray  # int [L], of these, in a cell that another one is in too
    most: np.ndarray  # int [L], objects in the fullest cell
    pairs: np.ndarray  # int, (cell, object) pairs of each image with objects
    total: int  # objects with a mask
    without_cell: np.ndarray  # int, rows of objects that own no cell on any level
    out_of_range: np.ndarray  # int, rows of objects in no level's scale range

    @property
    def untrained_share(self) -> float:
        """Objects that no cell stands for, of all."""
        return (len(self.without_cell) + len(self.out_of_range)) / max(self.total, 1)


def grid_collisions(objects: MeasuredObjects, layout: Layout) -> GridCollisions:
    """Returns who shares cells, each image padded alone to multiples of 32."""
    levels = len(layout.num_grids)
    count, shared = np.zeros(levels, int), np.zeros(levels, int)
    most, pairs, total = np.zeros(levels, int), [], 0
    without_cell: list[np.ndarray] = [np.zeros(0, int)]
    out_of_range: list[np.ndarray] = [np.zeros(0, int)]
    for image in objects.images.tolist():
        rows = objects.of(image)
        if not len(rows):
            continue
        total += len(rows)
        size = np.ceil(objects.sizes[image] * layout.scale / STRIDE).astype(int) * STRIDE
        assigned = assign_grid(
            objects.box[rows] * layout.scale,
            objects.center[rows] * layout.scale,
            (int(size[0]), int(size[1])),
            num_grids=layout.num_grids,
            scale_ranges=layout.scale_ranges,
            sigma=layout.sigma,
        )
        collisions = count_collisions(assigned, layout.num_grids)
        count += assigned.hit.sum(axis=1)
        shared += (assigned.hit & collisions.shared).sum(axis=1)
        most = np.maximum(most, [int(cells.max()) for cells in collisions.count])
        pairs.append(sum(int(cells.sum()) for cells in collisions.count))
        in_range = assigned.hit.any(axis=0)
        out_of_range.append(rows[~in_range])
        without_cell.append(rows[in_range & ~collisions.owns.any(axis=0)])
    return GridCollisions(
        objects=count,
        shared=shared,
        most=most,
        pairs=np.array(pairs, int),
        total=total,
        without_cell=np.concatenate(without_cell),
        out_of_range=np.concatenate(out_of_range),
    )


def grid_findings(objects: MeasuredObjects, collisions: GridCollisions) -> list[Finding]:
    """Returns objects that no cell stands for."""
    findings = []
    for rows, text in (
        (
            collisions.without_cell,
            "objects have no grid cell of their own: others take all of theirs",
        ),
        (collisions.out_of_range, "objects are in no level's scale range and are not trained"),
    ):
        if len(rows):
            images = objects.image[rows]
            # Fullest images first: those are worth a look.
            order = np.argsort(-np.bincount(images)[images], kind="stable")
            text = f"{share(len(rows), collisions.total)} {text}"
            findings += one_finding(WARNING, text, images=images[order].tolist())
    return findings


def layouts(base: Layout, sides: np.ndarray) -> list[Layout]:
    """Returns layouts to try: denser grids, and ranges that follow the objects.

    Args:
      sides: of the objects' boxes at the layout's scale, pixels.
    """
    result = []
    for factor in (1.0, 1.5, 2.0):
        grids = tuple(round(g * factor) for g in base.num_grids)
        for ranges in (base.scale_ranges, fitted_ranges(sides, len(grids))):
            result.append(dataclasses.replace(base, num_grids=grids, scale_ranges=ranges))
    return result


def fitted_ranges(sides: np.ndarray, levels: int) -> Ranges:
    """Returns ranges that overlap by half and share the objects out evenly."""
    inner = np.quantile(sides, np.arange(1, levels) / levels) if len(sides) else [32] * 4
    edges = [1.0, *np.maximum.accumulate(np.maximum(inner, 8)).tolist(), 2048.0]
    low = [1, *(max(1, round(e / 1.4)) for e in edges[1:-1])]
    high = [*(round(e * 1.4) for e in edges[1:-1]), 2048]
    return tuple(zip(low, high, strict=True))


def best_layout(
    objects: MeasuredObjects, base: Layout, sides: np.ndarray, enough: float = 0.005
) -> tuple[Layout, GridCollisions, list[tuple[Layout, GridCollisions]]]:
    """Returns the sparsest layout that loses few objects, and all that were tried.

    Args:
      enough: share of lost objects from which on a denser grid is not looked for.
    """
    tried: list[tuple[Layout, GridCollisions]] = []
    for layout in layouts(base, sides):
        tried.append((layout, grid_collisions(objects, layout)))
        if tried[-1][1].untrained_share <= enough:
            return *tried[-1], tried
    best = min(tried, key=lambda t: t[1].untrained_share)
    return *best, tried


def table(layout: Layout, collisions: GridCollisions) -> list[Sequence[str]]:
    """Returns a head and a row per level, as text."""
    rows: list[Sequence[str]] = [
        ("level", "grid", "box side", "objects", "share a cell", "most in a cell")
    ]
    for i, (grid, (low, high)) in enumerate(
        zip(layout.num_grids, layout.scale_ranges, strict=True)
    ):
        number, shared = int(collisions.objects[i]), int(collisions.shared[i])
        part = f"{shared} ({100 * shared / number:.1f} %)" if number else "0"
        cells = (f"{grid} x {grid}", f"{low} to {high} px", str(number), part)
        rows.append((str(i + 1), *cells, str(int(collisions.most[i]))))
    return rows
