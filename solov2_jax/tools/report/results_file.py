"""Scores files of predictions, whoever made them, with only the annotations."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import write_metrics
from solov2_jax.evaluation.ground_truth import GroundTruth, read_ground_truth, read_results
from solov2_jax.io import InputError
from solov2_jax.tools.report.diagnosis import diagnose
from solov2_jax.tools.report.expected_results import ExpectedResult, check_names
from solov2_jax.tools.report.outcomes import require_hotcoco
from solov2_jax.tools.report.report_data import ReportData, make_report_data

log = logging.getLogger(__name__)


def evaluate_files(
    annotations: str,
    predictions: str,
    *,
    against: str = "",
    out_dir: str = "",
    images: str = "",
    report: bool = False,
    expectations: Sequence[ExpectedResult] = (),
    backend: str = "fast",
    max_detections: int = 100,
) -> dict[str, float]:
    """Returns COCO's metrics of a results file over every image of the annotations.

    Args:
      against: another results file to compare with; the comparison is logged.
      out_dir: folder for `metrics.json`, the report and the comparison's tables.
      images: folder of the images, for the report's pictures.
      expectations: their names are checked before anything is computed.
      max_detections: as the config's eval.max_detections.
    """
    if report and not out_dir:
        raise InputError("--report with --predictions needs --output, a folder for it")
    if images and not os.path.isdir(images):
        raise InputError(f"{images}: no such folder of images")
    if report or against:
        require_hotcoco()
    truth = read_ground_truth(annotations, images)
    ids = sorted(truth.categories)
    names = [truth.categories[i] for i in ids]

    def evaluator_of(path: str) -> CocoEvaluator:
        evaluator = CocoEvaluator(truth, ids, names, backend=backend, max_detections=max_detections)
        check_names(expectations, evaluator.metric_names())
        evaluator.add_results(read_results(path, truth))
        return evaluator

    evaluator = evaluator_of(predictions)
    other = evaluator_of(against) if against else None
    metrics = evaluator.evaluate()
    for line in diagnose(evaluator, metrics):
        log.info("%s", line)
    out = Path(out_dir) if out_dir else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_metrics(evaluator, metrics, out)
    if out and report:
        from solov2_jax.tools.report.page import write_report

        data = _report_data(evaluator, metrics, predictions)
        paths = {i: os.path.join(images, str(r["file_name"])) for i, r in truth.images.items()}
        write_report(out / "report", data, evaluator, paths if images else None)
    if other:
        data = _report_data(evaluator, metrics, predictions)
        other_data = _report_data(other, other.evaluate(), against)
        _compare(data, other_data, (predictions, against), truth, out)
    return metrics


def _compare(
    data: ReportData,
    other: ReportData,
    paths: tuple[str, str],
    truth: GroundTruth,
    out: Path | None,
) -> None:
    """Logs what differs between two results files, and writes it into a folder."""
    from solov2_jax.tools.report.compare import compare, comparison_lines, write_comparison

    changes = compare(data, other)
    files = {i: str(r.get("file_name") or i) for i, r in truth.images.items()}
    for line in comparison_lines(changes, paths[0], paths[1], files):
        log.info("%s", line)
    if out:
        write_comparison(changes, out, files)
        log.info("written: %s and comparison_images.csv", out / "comparison.csv")


def _report_data(evaluator: CocoEvaluator, metrics: dict[str, float], path: str) -> ReportData:
    facts = {"annotations": os.path.basename(evaluator.source)}
    return make_report_data(evaluator, metrics, os.path.basename(path), facts)
