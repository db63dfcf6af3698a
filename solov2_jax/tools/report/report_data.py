"""Everything that the report shows of one evaluation, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.tools.report import analysis
from solov2_jax.tools.report.diagnosis import diagnose
from solov2_jax.tools.report.outcomes import outcomes


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
    curve: analysis.Curve  # of all classes together
    class_curves: list[analysis.Curve]
    errors: analysis.ErrorSplit
    shown_errors: dict[str, int]  # their numbers from the threshold on
    confusion: np.ndarray  # int64 [K + 1, K + 1], at the threshold
    sizes: list[analysis.SizeRow]
    calibration: analysis.Calibration
    images: list[analysis.ImageRow]
    notes: list[str]  # why metrics are undefined, limited or 0
    milliseconds: Mapping[str, float]  # per image, by part; empty: not measured

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
    whole, each = analysis.curves(outcome, num_classes)
    predictions = np.bincount(outcome.detections.label, minlength=num_classes).tolist()
    classes = []
    for name, curve, count in zip(names, each, predictions, strict=True):
        precision, recall, f1 = curve.at(curve.threshold)
        row = ClassRow(
            name=name,
            ap=metrics[f"segm/AP/{name}"],
            objects=curve.positives,
            predictions=count,
            threshold=curve.threshold,
            precision=precision,
            recall=recall,
            f1=f1,
        )
        classes.append(row)
    threshold = whole.threshold
    counts = {
        "images": str(len(evaluator.image_ids)),
        "predictions": str(len(evaluator.results)),
    }
    return ReportData(
        title=title,
        facts={**facts, **counts},
        metrics=metrics,
        classes=classes,
        curve=whole,
        class_curves=each,
        errors=analysis.error_split(outcome),
        shown_errors=analysis.errors_from(outcome, threshold),
        confusion=analysis.confusion_matrix(outcome, threshold, num_classes),
        sizes=analysis.by_size(outcome, threshold),
        calibration=analysis.calibration(outcome),
        images=analysis.by_image(outcome, threshold, evaluator.image_ids),
        notes=evaluator.notes(metrics) + diagnose(evaluator, metrics),
        milliseconds=dict(milliseconds or {}),
    )
