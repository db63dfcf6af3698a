"""What goes wrong in an evaluation: curves, errors and what they cost, sizes, images.

TIDE's errors and calibration are hotcoco's; `make_report_data` puts all of it together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.boundary import BoundaryEvaluator
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.tools.report.diagnosis import RIGHT_IOU, diagnose
from solov2_jax.tools.report.metric_rules import BorderRow, MetricRules, border_rows, rules_of
from solov2_jax.tools.report.outcomes import Outcome, evaluate_at_half, outcomes

TOUCH_IOU = 0.1  # below, a mask has nothing to do with an object
# The kinds of errors, with their names in TIDE and hotcoco.
# Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors"
# (2020), sections 2 and 3; here on masks.
ERRORS = {
    "localisation": "Loc",
    "class": "Cls",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}

# Sides of squares of an object's area, pixels; COCO's sizes split at 32 and 96.
SIDES = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, float("inf"))


@dataclass(frozen=True)
class Curve:
    """Precision and recall when detections below a score are dropped.

    Shapes: S detections that count, best score first.
    """

    score: np.ndarray  # float64 [S]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    positives: int  # objects to be found

    @property
    def threshold(self) -> float:
        """Returns the score from which on F1 is largest, cut to three digits."""
        if not len(self.f1):
            return 0.0
        return float(np.floor(self.score[self.f1.argmax()] * 1000) / 1000)

    def at(self, score: float) -> tuple[float, float, float]:
        """Returns precision, recall and F1 of the detections from `score` on."""
        n = int((self.score >= score).sum())
        if not n:
            return 0.0, 0.0, 0.0
        return float(self.precision[n - 1]), float(self.recall[n - 1]), float(self.f1[n - 1])


def curve(score: np.ndarray, right: np.ndarray, positives: int) -> Curve:
    """Returns the curve of detections that are right or wrong, in any order."""
    order = np.argsort(-score, kind="stable")
    score, true = score[order], np.cumsum(right[order])
    number = np.arange(1, len(score) + 1)
    # Detections of one score stand or fall together: the last of them counts.
    last = np.searchsorted(-score, -score, side="right") - 1
    true, number = true[last], number[last]
    f1 = 2 * true / np.maximum(number + positives, 1)
    return Curve(score, true / number, true / max(positives, 1), f1, positives)


def curves(outcome: Outcome, num_classes: int) -> tuple[Curve, list[Curve]]:
    """Returns the curve of all classes together and that of each class."""
    objects, detections = outcome.objects, outcome.detections

    def of(detected: np.ndarray, annotated: np.ndarray) -> Curve:
        use = ~outcome.ignored & detected
        positives = int((~objects.crowd & annotated).sum())
        return curve(detections.score[use], outcome.right[use], positives)

    each = [of(detections.label == k, objects.label == k) for k in range(num_classes)]
    return of(detections.label >= 0, objects.label >= 0), each


@dataclass(frozen=True)
class ErrorSplit:
    """How many errors there are of a kind, and what they cost."""

    counts: dict[str, int]  # by ERRORS; `missed` counts objects
    ap50: float  # 0 where it is undefined
    gains: dict[str, float]  # AP50 without the errors of one kind, minus `ap50`


def error_split(outcome: Outcome, threshold: float = 0.0) -> ErrorSplit:
    """Returns the errors by kind, and by how much AP50 rises when one kind is fixed.

    Crowds, and detections that lie in one, are left out: COCO's AP ignores them.

    Args:
      threshold: detections with a lower score are left out.
    """
    use = ~outcome.ignored & (outcome.detections.score >= threshold)
    plain = ~outcome.objects.crowd
    errors = evaluate_at_half(outcome.objects, outcome.detections, plain, use).tide_errors(
        RIGHT_IOU, TOUCH_IOU
    )
    counts = {name: int(errors["counts"][key]) for name, key in ERRORS.items()}
    gains = {name: float(errors["delta_ap"][key]) for name, key in ERRORS.items()}
    return ErrorSplit(counts, max(float(errors["ap_base"]), 0.0), gains)


def errors_from(outcome: Outcome, threshold: float) -> dict[str, int]:
    """Returns how many errors there are from a score on; missed: objects not found."""
    found = outcome.right & (outcome.detections.score >= threshold)
    missed = int((~outcome.objects.crowd).sum() - found.sum())
    return error_split(outcome, threshold).counts | {"missed": missed}


def confusion_matrix(outcome: Outcome, threshold: float, num_classes: int) -> np.ndarray:
    """Returns counts [K + 1, K + 1]: annotated class (rows) by predicted (columns).

    Objects and detections pair up by their overlap, largest first, whatever their
    classes. The last row holds detections of nothing, the last column missed objects.

    Args:
      threshold: detections with a lower score are left out.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    kept = (outcome.detections.score >= threshold) & ~outcome.ignored
    for rows, image_objects, iou in outcome.overlaps:
        plain = ~outcome.objects.crowd[image_objects]
        table = iou[kept[rows]][:, plain]
        predicted = outcome.detections.label[rows[kept[rows]]]
        annotated = outcome.objects.label[image_objects[plain]]
        same = predicted[:, None] == annotated
        d, g = np.nonzero(table >= RIGHT_IOU)
        order = np.lexsort((~same[d, g], -table[d, g]))
        free_d, free_g = np.ones(len(predicted), bool), np.ones(len(annotated), bool)
        for i, j in zip(d[order].tolist(), g[order].tolist(), strict=True):
            if free_d[i] and free_g[j]:
                free_d[i] = free_g[j] = False
                matrix[annotated[j], predicted[i]] += 1
        matrix[:-1, -1] += np.bincount(annotated[free_g], minlength=num_classes)
        matrix[-1, :-1] += np.bincount(predicted[free_d], minlength=num_classes)
    return matrix


@dataclass(frozen=True)
class SizeRow:
    """Objects whose area is that of squares with sides in [low, high), pixels."""

    low: float
    high: float
    objects: int
    found: int  # with IoU 0.5 and at least the threshold's score
    mean_iou: float  # of those found; 0 without any

    @property
    def name(self) -> str:
        """Returns the range of sides as text."""
        if np.isfinite(self.high):
            return f"{self.low:.0f}\u2013{self.high:.0f}"
        return f"\u2265 {self.low:.0f}"


def by_size(outcome: Outcome, threshold: float) -> list[SizeRow]:
    """Returns a row for each range of `SIDES`, crowds left out."""
    objects = outcome.objects
    use = outcome.detections.score >= threshold
    iou = outcome.found_iou(use)
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


def calibration(outcome: Outcome, num_bins: int = 10) -> Calibration:
    """Returns how the share of right detections follows their scores."""
    from hotcoco import metrics

    use = ~outcome.ignored
    score, right = np.clip(outcome.detections.score[use], 0, 1), outcome.right[use]
    bins = metrics.calibration_curve(score, right, num_bins)
    return Calibration(
        np.linspace(0, 1, num_bins + 1),
        np.array([b["count"] for b in bins]),
        np.array([b["avg_confidence"] for b in bins]),
        np.array([b["avg_accuracy"] for b in bins]),
        metrics.calibration_error(score, right, num_bins)[0],
    )


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


def by_image(outcome: Outcome, threshold: float, image_ids: Sequence[int]) -> list[ImageRow]:
    """Returns a row for every image, in the order of `image_ids`."""
    objects, detections = outcome.objects, outcome.detections
    use = (detections.score >= threshold) & ~outcome.ignored

    def count(images: np.ndarray) -> list[int]:
        return np.bincount(images, minlength=len(image_ids)).tolist()

    annotated = count(objects.image[~objects.crowd])
    right = count(detections.image[use & outcome.right])
    false = count(detections.image[use & ~outcome.right])
    return [ImageRow(*row) for row in zip(image_ids, annotated, right, false, strict=True)]


def worst_first(rows: list[ImageRow]) -> list[ImageRow]:
    """Returns the images that were got wrong, lowest F1 first, then most errors."""
    wrong = [r for r in rows if r.missed + r.false]
    return sorted(wrong, key=lambda r: (r.f1, -(r.missed + r.false), r.image_id))


# --- Everything of one evaluation ----------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """One class; precision, recall and F1 from its own best threshold on."""

    name: str
    ap: float  # NaN: undefined
    objects: int
    predictions: int  # with any score
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ReportData:
    """An evaluation, taken apart. Classes are sorted by category id."""

    title: str
    facts: dict[str, str]  # what was evaluated: data, weights ...
    metrics: Mapping[str, float]
    classes: list[ClassRow]
    curve: Curve  # of all classes together
    class_curves: list[Curve]
    errors: ErrorSplit
    shown_errors: dict[str, int]  # their numbers from the threshold on
    confusion: np.ndarray  # int64 [K + 1, K + 1], at the threshold
    sizes: list[SizeRow]
    calibration: Calibration
    images: list[ImageRow]
    notes: list[str]  # why metrics are undefined, limited or 0
    milliseconds: Mapping[str, float]  # per image, by part; empty: not measured
    rules: MetricRules
    borders: list[BorderRow]  # of the metric "boundary" only

    @property
    def threshold(self) -> float:
        """Returns the score from which on F1 of all classes together is largest."""
        return self.curve.threshold

    @property
    def names(self) -> list[str]:
        """Returns the class names."""
        return [row.name for row in self.classes]


def make_report_data(
    evaluator: CocoEvaluator,
    metrics: Mapping[str, float],
    title: str,
    facts: Mapping[str, str],
    milliseconds: Mapping[str, float] | None = None,
) -> ReportData:
    """Returns the report's data of what `evaluator` has collected.

    Args:
      metrics: of `evaluator.evaluate`.
      facts: shown below the title, before the numbers of images and predictions.
    """
    outcome = outcomes(evaluator)
    names, num_classes = evaluator.sorted_names(), len(evaluator.category_ids)
    whole, each = curves(outcome, num_classes)
    predictions = np.bincount(outcome.detections.label, minlength=num_classes).tolist()
    classes = []
    for name, curve, count in zip(names, each, predictions, strict=True):
        ap, best = metrics[f"segm/AP/{name}"], curve.threshold
        classes.append(ClassRow(name, ap, curve.positives, count, best, *curve.at(best)))
    threshold, errors = whole.threshold, error_split(outcome)
    sizes = by_size(outcome, threshold)
    borders: list[BorderRow] = []
    if isinstance(evaluator, BoundaryEvaluator):
        ranges = [(row.name, row.low, row.high) for row in sizes]
        borders = border_rows(outcome, threshold, ranges)
    counts = {"images": str(len(evaluator.image_ids)), "predictions": str(len(evaluator.results))}
    return ReportData(
        title=title,
        facts={**facts, **counts},
        metrics=metrics,
        classes=classes,
        curve=whole,
        class_curves=each,
        errors=errors,
        shown_errors=errors_from(outcome, threshold),
        confusion=confusion_matrix(outcome, threshold, num_classes),
        sizes=sizes,
        calibration=calibration(outcome),
        images=by_image(outcome, threshold, evaluator.image_ids),
        notes=evaluator.notes(metrics) + diagnose(evaluator, metrics),
        milliseconds=dict(milliseconds or {}),
        rules=rules_of(evaluator, outcome, metrics, errors.ap50),
        borders=borders,
    )
