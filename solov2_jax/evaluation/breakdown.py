"""An evaluation by size of the object, by score and by image; pure functions."""

from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.analysis import SIDES, Outcome
from solov2_jax.evaluation.tables import Detections, Objects


@dataclass(frozen=True)
class SizeRow:
    """Objects whose area is that of squares with sides in [low, high), pixels."""

    low: float
    high: float
    objects: int
    found: int  # with IoU 0.5 and at least the threshold's score
    mean_iou: float  # of those found; 0 without any


def by_size(
    objects: Objects, found: Detections, outcome: Outcome, threshold: float
) -> list[SizeRow]:
    """Returns a row for each range of `SIDES`, crowds left out."""
    use = outcome.right & (found.score >= threshold)
    iou = np.zeros(len(objects))
    iou[outcome.object[use]] = outcome.iou[use]
    side = np.sqrt(objects.area)
    rows = []
    for low, high in zip(SIDES[:-1], SIDES[1:], strict=True):
        inside = (side >= low) & (side < high) & ~objects.crowd
        hit = inside & (iou > 0)
        mean = float(iou[hit].mean()) if hit.any() else 0.0
        rows.append(SizeRow(low, high, int(inside.sum()), int(hit.sum()), mean))
    return rows


@dataclass(frozen=True)
class Calibration:
    """Does a score of 0.7 mean that 7 of 10 are right? By bins of the score."""

    edges: np.ndarray  # float64 [bins + 1]
    count: np.ndarray  # int64 [bins]
    score: np.ndarray  # float64 [bins], mean; 0 in an empty bin
    right: np.ndarray  # float64 [bins], share of right detections
    error: float  # mean of |score - right|, weighted by count


def calibration(found: Detections, outcome: Outcome, bins: int = 10) -> Calibration:
    """Returns how the share of right detections follows their scores."""
    use = ~outcome.ignored
    score, right = np.clip(found.score[use], 0, 1), outcome.right[use]
    edges = np.linspace(0, 1, bins + 1)
    place = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    per = np.maximum(count, 1)
    mean = np.bincount(place, score, minlength=bins) / per
    share = np.bincount(place, right, minlength=bins) / per
    error = float((count * np.abs(mean - share)).sum() / max(count.sum(), 1))
    return Calibration(edges, count, mean, share, error)


@dataclass(frozen=True)
class ImageRow:
    """One image's detections from a score on."""

    image_id: int
    objects: int
    right: int
    false: int

    @property
    def missed(self) -> int:
        """Returns the number of objects that were not found."""
        return self.objects - self.right

    @property
    def f1(self) -> float:
        """Returns F1; 1 where there is nothing and nothing was found."""
        total = self.objects + self.right + self.false
        return 2 * self.right / total if total else 1.0


def by_image(
    objects: Objects,
    found: Detections,
    outcome: Outcome,
    threshold: float,
    image_ids: list[int],
) -> list[ImageRow]:
    """Returns a row for every image, in the order of `image_ids`."""
    use = (found.score >= threshold) & ~outcome.ignored
    n = len(image_ids)

    def count(images: np.ndarray) -> list[int]:
        return np.bincount(images, minlength=n).tolist()

    columns = (
        count(objects.image[~objects.crowd]),
        count(found.image[use & outcome.right]),
        count(found.image[use & ~outcome.right]),
    )
    return [ImageRow(i, *row) for i, *row in zip(image_ids, *columns, strict=True)]


def worst_first(rows: list[ImageRow]) -> list[ImageRow]:
    """Returns the images that were got wrong, lowest F1 first, then most errors."""
    wrong = [r for r in rows if r.missed + r.false]
    return sorted(wrong, key=lambda r: (r.f1, -(r.missed + r.false), r.image_id))
