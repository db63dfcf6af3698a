"""How objects get on with grids and scale ranges, and which would suit them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.tools.doctor.findings import WARNING, Finding, found, share
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
class Crowding:
    """How many objects have which trouble with a layout."""

    objects: np.ndarray  # int [L], objects on each level
    shared: np.ndarray  # int [L], of these, in a cell that another one is in too
    most: np.ndarray  # int [L], objects in the fullest cell
    total: int  # objects with a mask
    lost: np.ndarray  # int, rows of objects that own no cell on any level
    homeless: np.ndarray  # int, rows of objects in no level's scale range

    @property
    def lost_share(self) -> float:
        """Objects that no cell stands for, of all."""
        return (len(self.lost) + len(self.homeless)) / max(self.total, 1)


def crowding(objects: MeasuredObjects, layout: Layout) -> Crowding:
    """Returns who shares cells, each image padded alone to multiples of 32."""
    levels = len(layout.num_grids)
    number, shared = np.zeros(levels, int), np.zeros(levels, int)
    most = np.zeros(levels, int)
    lost: list[np.ndarray] = []
    homeless: list[np.ndarray] = []
    total = 0
    for image in objects.images.tolist():
        rows = objects.of(image)
        if not len(rows):
            continue
        total += len(rows)
        size = np.ceil(objects.sizes[image] * layout.scale / STRIDE).astype(int) * STRIDE
        cells = assign_grid(
            objects.box[rows] * layout.scale,
            objects.center[rows] * layout.scale,
            (int(size[0]), int(size[1])),
            num_grids=layout.num_grids,
            scale_ranges=layout.scale_ranges,
            sigma=layout.sigma,
        )
        sharing = count_collisions(cells, layout.num_grids)
        number += cells.hit.sum(axis=1)
        shared += (cells.hit & sharing.shared).sum(axis=1)
        most = np.maximum(most, [int(c.max()) for c in sharing.count])
        somewhere = cells.hit.any(axis=0)
        homeless.append(rows[~somewhere])
        lost.append(rows[somewhere & ~sharing.owns.any(axis=0)])
    none = [np.zeros(0, int)]
    return Crowding(
        *(number, shared, most, total),
        *(np.concatenate(lost or none), np.concatenate(homeless or none)),
    )


def grid_findings(objects: MeasuredObjects, crowd: Crowding) -> list[Finding]:
    """Returns objects that no cell stands for."""
    findings = []
    for rows, text in (
        (
            crowd.lost,
            "objects have no grid cell of their own: others take all of theirs",
        ),
        (crowd.homeless, "objects are in no level's scale range and are not trained"),
    ):
        if len(rows):
            images = objects.image[rows]
            # Fullest images first: those are worth a look.
            order = np.argsort(-np.bincount(images)[images], kind="stable")
            text = f"{share(len(rows), crowd.total)} {text}"
            findings += found(WARNING, text, images=images[order].tolist())
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
) -> tuple[Layout, Crowding, list[tuple[Layout, Crowding]]]:
    """Returns the sparsest layout that loses few objects, and all that were tried.

    Args:
      enough: share of lost objects from which on a denser grid is not looked for.
    """
    tried: list[tuple[Layout, Crowding]] = []
    for layout in layouts(base, sides):
        tried.append((layout, crowding(objects, layout)))
        if tried[-1][1].lost_share <= enough:
            return *tried[-1], tried
    best = min(tried, key=lambda t: t[1].lost_share)
    return *best, tried


def table(layout: Layout, crowd: Crowding) -> list[Sequence[str]]:
    """Returns a head and a row per level, as text."""
    rows: list[Sequence[str]] = [
        ("level", "grid", "box side", "objects", "share a cell", "most in a cell")
    ]
    for i, (grid, (low, high)) in enumerate(
        zip(layout.num_grids, layout.scale_ranges, strict=True)
    ):
        number, shared = int(crowd.objects[i]), int(crowd.shared[i])
        part = f"{shared} ({100 * shared / number:.1f} %)" if number else "0"
        cells = (f"{grid} x {grid}", f"{low} to {high} px", str(number), part)
        rows.append((str(i + 1), *cells, str(int(crowd.most[i]))))
    return rows
