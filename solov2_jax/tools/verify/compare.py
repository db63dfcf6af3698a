"""The differences between two programs' tensors and detections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from solov2_jax.tools.verify.ours import Computed, Detected

# What a float32 sum in another order explains.
MAX_OF_SPREAD, MAX_SCORE = 1e-4, 2e-4
MIN_IOU = 0.99


@dataclass(frozen=True)
class Difference:
    """Of one tensor: the largest absolute difference, and in units of its deviation."""

    name: str
    shape: tuple[int, ...]
    largest: float
    of_spread: float


@dataclass(frozen=True)
class Pair:
    """Two detections of one rank: label and score here, there, and their masks' IoU."""

    labels: tuple[int, int]
    scores: tuple[float, float]
    iou: float


@dataclass(frozen=True)
class Differences:
    """All differences, and which of them are more than rounding."""

    tensors: tuple[Difference, ...]
    pairs: tuple[Pair, ...] = ()
    numbers: tuple[int, int] = (0, 0)  # of detections

    def wrong(self) -> list[str]:
        """Returns what differs by more than rounding explains."""
        wrong = [
            f"{d.name} by {d.of_spread:.1e} of its spread"
            for d in self.tensors
            if not d.of_spread <= MAX_OF_SPREAD
        ]
        if self.numbers[0] != self.numbers[1]:
            wrong.append(f"{self.numbers[0]} detections here, {self.numbers[1]} there")
        if any(pair.labels[0] != pair.labels[1] for pair in self.pairs):
            wrong.append("the detections' classes or their order")
        if self.pairs and max(abs(p.scores[0] - p.scores[1]) for p in self.pairs) > MAX_SCORE:
            wrong.append(f"scores by more than {MAX_SCORE}")
        if self.pairs and min(pair.iou for pair in self.pairs) < MIN_IOU:
            wrong.append(f"masks: an IoU below {MIN_IOU}")
        return wrong

    def figures(self) -> dict[str, Any]:
        """Returns the figures as plain JSON data."""
        return {
            "tensors": {d.name: d.of_spread for d in self.tensors},
            "detections": list(self.numbers),
            "same_classes": all(p.labels[0] == p.labels[1] for p in self.pairs),
            "largest_score_difference": max(
                (abs(p.scores[0] - p.scores[1]) for p in self.pairs), default=0.0
            ),
            "least_mask_iou": min((p.iou for p in self.pairs), default=1.0),
            "wrong": self.wrong(),
        }


def compare(ours: Computed, theirs: Computed) -> Differences:
    """Returns the differences of what both programs computed.

    Raises:
      ValueError: if a tensor has two shapes, or the other program lacks it.
    """
    by_tensor = []
    for name, x in ours.tensors.items():
        y = theirs.tensors.get(name)
        if y is None or y.shape != x.shape:
            raise ValueError(f"{name} is {x.shape} here and {None if y is None else y.shape} there")
        largest = float(np.abs(x - y).max())
        by_tensor.append(Difference(name, x.shape, largest, largest / max(float(y.std()), 1e-30)))
    if ours.detected is None or theirs.detected is None:
        return Differences(tuple(by_tensor))
    a, b = ours.detected, theirs.detected
    numbers = (len(a.scores), len(b.scores))
    return Differences(tuple(by_tensor), _pairs(a, b), numbers)


def _pairs(a: Detected, b: Detected) -> tuple[Pair, ...]:
    pairs = []
    for i in range(min(len(a.scores), len(b.scores))):
        union = np.logical_or(a.masks[i], b.masks[i]).sum()
        shared = np.logical_and(a.masks[i], b.masks[i]).sum()
        labels = (int(a.labels[i]), int(b.labels[i]))
        scores = (float(a.scores[i]), float(b.scores[i]))
        pairs.append(Pair(labels, scores, float(shared / max(union, 1))))
    return tuple(pairs)


def describe(differences: Differences, names: Sequence[str] | Mapping[int, str]) -> list[str]:
    """Returns a line for each tensor and for each detection.

    Args:
      names: of the classes.
    """
    lines = [f"{'tensor':<16}{'shape':<22}{'largest difference':>20}{'of the spread':>15}"]
    for d in differences.tensors:
        shape = "x".join(map(str, d.shape))
        lines.append(f"{d.name:<16}{shape:<22}{d.largest:>20.2e}{d.of_spread:>15.1e}")
    if differences.numbers != (0, 0):
        lines.append("{} detections here, {} there".format(*differences.numbers))
        lines.append(f"{'':>4} {'class':<20}{'score':>8}{'difference':>12}{'mask IoU':>10}")
    for i, pair in enumerate(differences.pairs, start=1):
        here, there = pair.labels
        name = names[here] if here == there else f"{names[here]} | {names[there]}"
        difference = abs(pair.scores[0] - pair.scores[1])
        lines.append(f"{i:>4} {name:<20}{pair.scores[0]:>8.4f}{difference:>12.1e}{pair.iou:>10.5f}")
    return lines
