"""Scores files of predictions, whoever made them, with only the annotations."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.ground_truth import GroundTruth, read_ground_truth, read_results
from solov2_jax.io import write_json
from solov2_jax.tools.report.compare import Comparison, compare, comparison_lines
from solov2_jax.tools.report.expected_results import ExpectedResult, check_names
from solov2_jax.tools.report.study import ReportData, make_study

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
) -> dict[str, float]:
    """Returns COCO's figures of a results file over every image of the annotations.

    Args:
      against: another results file to compare with; the comparison is logged.
      out_dir: folder for `metrics.json`, the report and the comparison's tables.
      images: folder of the images, for the report's pictures.
      expectations: their names are checked before anything is computed.
    """
    if report and not out_dir:
        raise ValueError("--report with --predictions needs --output, a folder for it")
    if images and not os.path.isdir(images):
        raise ValueError(f"{images}: no such folder of images")
    truth = read_ground_truth(annotations)
    ids = sorted(truth.categories)
    names = [truth.categories[i] for i in ids]
    evaluator = CocoEvaluator(truth, ids, names, backend)
    check_names(expectations, evaluator.metric_names())
    evaluator.add_results(read_results(predictions, truth))
    metrics = evaluator.evaluate()
    out = Path(out_dir) if out_dir else None
    if out:
        _write_metrics(out, metrics, evaluator)
    if out and report:
        from solov2_jax.tools.report.report import write_report

        study = _study(evaluator, metrics, predictions)
        write_report(out / "report", study, evaluator, images or None)
    if against:
        other = CocoEvaluator(truth, ids, names, backend)
        other.add_results(read_results(against, truth))
        found = compare(
            _study(evaluator, metrics, predictions),
            _study(other, other.evaluate(), against),
        )
        files = _files(truth)
        for line in comparison_lines(found, predictions, against, files):
            log.info("%s", line)
        if out:
            _write_changes(out, found, files)
    return metrics


def _write_metrics(out: Path, metrics: dict[str, float], evaluator: CocoEvaluator) -> None:
    out.mkdir(parents=True, exist_ok=True)
    number = len(evaluator.results)
    counts = {"num_images": len(evaluator.image_ids), "num_predictions": number}
    write_json({**metrics, **counts}, out / "metrics.json")
    log.info("written: %s", out / "metrics.json")


def _study(evaluator: CocoEvaluator, metrics: dict[str, float], path: str) -> ReportData:
    facts = {
        "annotations": os.path.basename(evaluator.source),
        "images": str(len(evaluator.image_ids)),
        "predictions": str(len(evaluator.results)),
    }
    return make_study(evaluator, metrics, os.path.basename(path), facts)


def _files(truth: GroundTruth) -> dict[int, str]:
    return {i: str(r.get("file_name", i)) for i, r in truth.images.items()}


def _write_changes(out: Path, found: Comparison, files: dict[int, str]) -> None:
    """Writes every change, also those that the log leaves out."""
    changes = [*found.figures, *found.classes]
    with (out / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["figure or class", "a", "b", "a - b"])
        writer.writerows([c.name, c.a, c.b, c.difference] for c in changes)
    with (out / "comparison_images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        head = "f1 right false missed".split()
        both = [f"{h} {side}" for side in "ab" for h in head]
        writer.writerow(["image_id", "file", *both])
        for c in found.images:
            rows = [getattr(row, h) for row in (c.a, c.b) for h in head]
            writer.writerow([c.a.image_id, files[c.a.image_id], *rows])
    log.info("written: %s and comparison_images.csv", out / "comparison.csv")
