"""Everything that the report shows of one evaluation, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_match import image_overlaps
from solov2_jax.tools.report import analysis


@dataclass(frozen=True)
class ClassRow:
    """One class; precision, recall and F1 from its own best threshold on."""

    name: str
    ap: float  # -1: nothing annotated
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
    curve: analysis.Curve  # of all classes together
    class_curves: list[analysis.Curve]
    errors: analysis.ErrorSplit
    shown_errors: dict[str, int]  # their numbers from the threshold on
    confusion: np.ndarray  # int64 [K + 1, K + 1], at the threshold
    sizes: list[analysis.SizeRow]
    calibration: analysis.Calibration
    images: list[analysis.ImageRow]
    reasons: list[str]  # of figures that are -1 or 0
    speed: dict[str, float]  # milliseconds an image by part; empty: not measured

    @property
    def threshold(self) -> float:
        """Returns the score from which on F1 of all classes together is largest."""
        return self.curve.threshold

    @property
    def names(self) -> list[str]:
        """Returns the class names."""
        return [row.name for row in self.classes]


def make_study(
    evaluator: CocoEvaluator,
    metrics: Mapping[str, float],
    title: str,
    facts: Mapping[str, str],
    speed: Mapping[str, float] | None = None,
) -> ReportData:
    """Returns the study of what `evaluator` has collected.

    Args:
      metrics: of `evaluator.evaluate`.
    """
    objects, found = evaluator.columns()
    overlaps = list(image_overlaps(objects, found))
    outcome = analysis.outcomes(objects, found, overlaps)
    k = evaluator.num_classes
    whole, each = analysis.curves(objects, found, outcome, k)
    names = evaluator.sorted_names()
    rows = []
    for n, (name, curve) in enumerate(zip(names, each, strict=True)):
        figures = curve.at(curve.threshold)
        number = int((found.label == n).sum())
        ap = metrics[f"segm/AP/{name}"]
        row = ClassRow(name, ap, curve.positives, number, curve.threshold, *figures)
        rows.append(row)
    ids, threshold = evaluator.image_ids, whole.threshold
    return ReportData(
        title,
        dict(facts),
        metrics,
        rows,
        whole,
        each,
        analysis.error_split(objects, found, outcome, k),
        analysis.errors_from(objects, found, outcome, threshold),
        analysis.confusion_matrix(objects, found, overlaps, outcome.ignored, threshold, k),
        analysis.by_size(objects, found, outcome, threshold),
        analysis.calibration(found, outcome),
        analysis.by_image(objects, found, outcome, threshold, ids),
        evaluator.reasons(metrics),
        dict(speed or {}),
    )
