"""Settings that suit a data set, each with the reason."""

import dataclasses

import numpy as np

from solov2_jax.data.coco import CocoDataset
from solov2_jax.tools.doctor.grids import GridCollisions, Layout, best_layout
from solov2_jax.tools.doctor.measure import MeasuredObjects

SHORT_SIDES = (320, 448, 512, 640, 800, 1024, 1280)
# At the input size that is suggested, nine of ten objects cover at least this, which
# is 4 x 4 pixels of the mask.
WANTED_SIDE = 16.0
# The reference's: 16 images per step at a rate of 0.01, about 12 to 36 epochs.
BATCH, RATE, EPOCHS = 16, 0.01, 36


@dataclasses.dataclass(frozen=True)
class Advice:
    """Suggested values of config keys, with what they rest on."""

    short: int
    max_size: int
    layout: Layout
    collisions: GridCollisions
    tried: list[tuple[Layout, GridCollisions]]
    batch_size: int
    learning_rate: float
    steps: int
    reasons: tuple[str, ...]

    @property
    def milestones(self) -> tuple[int, int]:
        """Steps at which the rate falls, as far along as in the reference."""
        return round(self.steps * 7 / 9), round(self.steps * 25 / 27)

    def overrides(self) -> list[str]:
        """Returns the flags that set what is suggested, for train.py."""
        layout = self.layout
        return [
            f"--config.input.min_sizes_train='({self.short},)'",
            f"--config.input.max_size_train={self.max_size}",
            f"--config.input.min_size_test={self.short}",
            f"--config.input.max_size_test={self.max_size}",
            f"--config.model.ins_head.num_grids='{compact(layout.num_grids)}'",
            f"--config.targets.scale_ranges='{compact(layout.scale_ranges)}'",
            f"--config.train.batch_size={self.batch_size}",
            f"--config.optim.learning_rate={self.learning_rate:g}",
            f"--config.train.steps={self.steps}",
            f"--config.optim.milestones='{compact(self.milestones)}'",
            f"--config.optim.warmup_steps={min(1000, self.steps // 5)}",
        ]


def compact(value: object) -> str:
    """Returns a tuple as text without spaces."""
    return str(value).replace(" ", "")


def advise(dataset: CocoDataset, objects: MeasuredObjects, base: Layout, short: int) -> Advice:
    """Returns what would suit the training data.

    Args:
      base: the config's grids and ranges.
      short: the shorter side that the objects were measured at, pixels.
    """
    sides = np.sqrt(np.maximum(objects.area[objects.area > 0], 1))
    original = np.minimum(dataset.heights, dataset.widths)
    limit = 2 * float(np.median(original))
    small = float(np.percentile(sides, 10)) if len(sides) else WANTED_SIDE
    fit = [s for s in SHORT_SIDES if s <= limit] or [SHORT_SIDES[0]]
    good = [s for s in fit if small * s / short >= WANTED_SIDE]
    chosen = good[0] if good else fit[-1]
    reasons = [
        f"at a short side of {chosen} pixels nine of ten objects are at least "
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
    layout, collisions, tried = best_layout(objects, scaled, boxes)
    reasons.append(
        f"with these grids and ranges {100 * collisions.untrained_share:.2f} % of the objects "
        "have no cell"
    )
    longer = np.maximum(dataset.heights, dataset.widths) * (chosen / original)
    max_size = int(np.ceil(min(float(np.percentile(longer, 95)), 2.0 * chosen) / 32) * 32)
    batch = 1 << int(np.log2(np.clip(len(dataset) / 40, 2, BATCH)))
    steps = max(500, round(EPOCHS * len(dataset) / batch / 100) * 100)
    reasons.append(
        f"{batch} images per step at a rate of {RATE:g} x {batch} / {BATCH} (SGD): if "
        "memory allows fewer, lower both together"
    )
    reasons.append(
        f"{steps} steps are {steps * batch / len(dataset):.0f} passes over the training data"
    )
    return Advice(
        short=chosen,
        max_size=max(max_size, chosen),
        layout=layout,
        collisions=collisions,
        tried=tried,
        batch_size=batch,
        learning_rate=RATE * batch / BATCH,
        steps=steps,
        reasons=tuple(reasons),
    )
