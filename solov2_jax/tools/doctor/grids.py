"""How objects fit grids and scale ranges, and which settings would suit them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.data.coco import CocoDataset
from solov2_jax.tools.doctor.findings import WARNING, Finding, counted
from solov2_jax.tools.doctor.measure import MeasuredObjects
from solov2_jax.tools.grid_assignment import assign_grid, count_collisions

STRIDE = 32
SHORT_SIDES = (320, 448, 512, 640, 800, 1024, 1280)
# At the suggested input size nine of ten objects cover this: 4 x 4 pixels of the mask.
WANTED_SIDE = 16.0
# The reference's: 16 images per step at a rate of 0.01, about 12 to 36 epochs.
BATCH, RATE, EPOCHS = 16, 0.01, 36
RECIPE = {"optim.learning_rate", "optim.milestones", "optim.warmup_steps", "train.steps"}
FEW_LOST = 0.005  # share of lost objects up to which no denser grid is looked for
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
    alone = "objects have no grid cell of their own: others take all of theirs"
    outside = "objects are in no level's scale range and are not trained"
    for rows, text in ((collisions.without_cell, alone), (collisions.out_of_range, outside)):
        images = objects.image[rows]
        # Fullest images first: those are worth a look.
        order = np.argsort(-np.bincount(images)[images], kind="stable")
        shown = images[order].tolist()
        findings += counted(WARNING, len(rows), text, images=shown, of=collisions.total)
    return findings


def fitted_ranges(sides: np.ndarray, levels: int) -> Ranges:
    """Returns ranges that overlap by half and share the objects out evenly."""
    inner = np.quantile(sides, np.arange(1, levels) / levels) if len(sides) else [32] * 4
    edges = [1.0, *np.maximum.accumulate(np.maximum(inner, 8)).tolist(), 2048.0]
    low = [1, *(max(1, round(e / 1.4)) for e in edges[1:-1])]
    high = [*(round(e * 1.4) for e in edges[1:-1]), 2048]
    return tuple(zip(low, high, strict=True))


def best_layout(
    objects: MeasuredObjects, base: Layout, sides: np.ndarray
) -> tuple[Layout, GridCollisions]:
    """Returns the sparsest layout that loses few objects.

    Tried are denser grids, and ranges that follow the objects.

    Args:
      sides: of the objects' boxes at the layout's scale, pixels.
    """
    tried: list[tuple[Layout, GridCollisions]] = []
    for factor in (1.0, 1.5, 2.0):
        grids = tuple(round(g * factor) for g in base.num_grids)
        for ranges in (base.scale_ranges, fitted_ranges(sides, len(grids))):
            layout = dataclasses.replace(base, num_grids=grids, scale_ranges=ranges)
            tried.append((layout, grid_collisions(objects, layout)))
            if tried[-1][1].untrained_share <= FEW_LOST:
                return tried[-1]
    return min(tried, key=lambda pair: pair[1].untrained_share)


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


# --- Suggested settings --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Advice:
    """Suggested values of config keys, with what they rest on."""

    short: int
    max_size: int
    layout: Layout
    collisions: GridCollisions
    batch_size: int
    learning_rate: float
    steps: int
    reasons: tuple[str, ...]
    unused: frozenset[str] = frozenset()  # keys by which the config does not train

    @property
    def milestones(self) -> tuple[int, int]:
        """Steps at which the rate falls, as far along as in the reference."""
        return round(self.steps * 7 / 9), round(self.steps * 25 / 27)

    def overrides(self) -> list[str]:
        """Returns the flags that set what is suggested, for train.py with the same config."""
        values = {
            "input.min_sizes_train": f"'({self.short},)'",
            "input.max_size_train": self.max_size,
            "input.min_size_test": self.short,
            "input.max_size_test": self.max_size,
            "model.ins_head.num_grids": f"'{compact(self.layout.num_grids)}'",
            "targets.scale_ranges": f"'{compact(self.layout.scale_ranges)}'",
            "train.batch_size": self.batch_size,
            "optim.learning_rate": f"{self.learning_rate:g}",
            "train.steps": self.steps,
            "optim.milestones": f"'{compact(self.milestones)}'",
            "optim.warmup_steps": min(1000, self.steps // 5),
        }
        return [f"--config.{k}={v}" for k, v in values.items() if k not in self.unused]


def compact(value: object) -> str:
    """Returns a tuple as text without spaces."""
    return str(value).replace(" ", "")


def advise(
    dataset: CocoDataset,
    objects: MeasuredObjects,
    base: Layout,
    short: int,
    *,
    choices: Sequence[int] = SHORT_SIDES,
    wide: float = 0.9,
    unused: frozenset[str] = frozenset(),
) -> Advice:
    """Returns what would suit the training data.

    Args:
      base: the config's grids and ranges.
      short: the shorter side that the objects were measured at, pixels.
      choices: shorter sides to choose from, increasing.
      wide: the share of the objects that are to be `WANTED_SIDE` wide.
    """
    sides = np.sqrt(np.maximum(objects.area[objects.area > 0], 1))
    original = np.minimum(dataset.heights, dataset.widths)
    limit = 2 * float(np.median(original))
    small = float(np.quantile(sides, 1 - wide)) if len(sides) else WANTED_SIDE
    fit = [s for s in choices if s <= limit] or [choices[0]]
    good = [s for s in fit if round(small * s / short) >= WANTED_SIDE]
    chosen = good[0] if good else fit[-1]
    reasons = [
        f"at a short side of {chosen} pixels {10 * wide:.0f} of 10 objects are at least "
        f"{small * chosen / short:.0f} pixels wide (square root of the area)"
    ]
    if not good:
        reasons.append(
            f"that is under {WANTED_SIDE:.0f}: objects are small for their images; cut "
            "the images into tiles for more"
        )
    scale = chosen / short
    box = objects.box[:, 2:] - objects.box[:, :2]
    boxes = np.sqrt(np.maximum(box.prod(axis=1), 0)) * scale
    scaled = dataclasses.replace(base, scale=scale)
    layout, collisions = best_layout(objects, scaled, boxes)
    reasons.append(
        f"with these grids and ranges {100 * collisions.untrained_share:.2f} % of the objects "
        "have no cell"
    )
    longer = np.maximum(dataset.heights, dataset.widths) * (chosen / original)
    max_size = int(np.ceil(min(float(np.percentile(longer, 95)), 2.0 * chosen) / 32) * 32)
    batch = 1 << int(np.log2(np.clip(len(dataset) / 40, 2, BATCH)))
    steps = max(500, round(EPOCHS * len(dataset) / batch / 100) * 100)
    if not unused & RECIPE:
        reasons += [
            f"{batch} images per step at a rate of {RATE:g} x {batch} / {BATCH} (SGD): if "
            "memory allows fewer, lower both together",
            f"{steps} steps are {steps * batch / len(dataset):.0f} passes over the training data",
        ]
    return Advice(
        short=chosen,
        max_size=max(max_size, chosen),
        layout=layout,
        collisions=collisions,
        batch_size=batch,
        learning_rate=RATE * batch / BATCH,
        steps=steps,
        reasons=tuple(reasons),
        unused=unused,
    )
