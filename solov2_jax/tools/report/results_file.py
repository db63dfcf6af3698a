"""Scores files of predictions, whoever made them, with only the annotations."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from solov2_jax.data.annotations import Fields, describe, read_box, whole_number
from solov2_jax.data.outlines import are_numbers, as_json, is_polygon, read_outline, rle_areas
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import GroundTruth, read_ground_truth
from solov2_jax.evaluation.evaluate import write_metrics
from solov2_jax.io import InputError, read_json
from solov2_jax.rle import polygons_to_rle
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


_FORMAT = (
    "COCO's results format is a json list of objects with image_id, category_id, score "
    "and segmentation"
)


def read_results(path: str, truth: GroundTruth) -> list[dict[str, Any]]:
    """Returns the results of a file, masks as RLE, missing boxes taken from masks.

    Raises:
      InputError: naming the file, the entry and the field, also where ids of images or
        categories are not the annotations'.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file of predictions")
    content = read_json(path, "json", _FORMAT)
    if not isinstance(content, list):
        instances = isinstance(content, dict) and "annotations" in content
        kind = "an instances json" if instances else "something else"
        raise InputError(f"{path}: is {kind}, not a list of results; {_FORMAT}")
    for i, record in enumerate(content):
        if not isinstance(record, dict):
            raise InputError(f"{path}: entry {i} is {as_json(record)}, not an object; {_FORMAT}")
    field = Fields(content, path, lambda i: f"entry {i}")
    images = _ids(field, "image_id", truth.images, truth.source)
    categories = _ids(field, "category_id", truth.categories, truth.source)
    field = Fields(content, path, lambda i: f"entry {i} (image {images[i]})")
    scores = field("score", lambda v: float(v) if are_numbers([v]) else None, "a finite number")
    boxes = field("bbox", read_box, "four numbers (x, y, width, height)", default=())
    outlines = field("segmentation", lambda v: v, "polygons or run lengths")
    sizes = [(truth.images[i]["height"], truth.images[i]["width"]) for i in images]
    results = [
        {
            "image_id": images[i],
            "category_id": categories[i],
            "bbox": boxes[i],
            "score": scores[i],
            "segmentation": _mask(outline, size, field.name(i)),
        }
        for i, (outline, size) in enumerate(zip(outlines, sizes, strict=True))
    ]
    rle_areas(
        [r["segmentation"]["counts"] for r in results],
        [height * width for height, width in sizes],
        field.name,
    )
    for result in results:  # only now: run lengths are known to be sound
        if not result["bbox"]:
            result["bbox"] = coco_mask.toBbox(result["segmentation"]).tolist()  # pyright: ignore
    return results


_FIXES = {
    "image_id": "are these predictions of other images?",
    "category_id": "write the ids of the annotations' `categories`, not places in a list of "
    "classes",
}


def _ids(field: Fields, key: str, known: Mapping[int, Any], source: str) -> list[int]:
    """Returns the image or category ids of all results."""
    ids = field(key, whole_number, "a whole number")
    if wrong := [i for i in ids if i not in known]:
        raise InputError(
            f"{field.source}: {len(wrong)} of {len(ids)} entries have a `{key}` that {source} has "
            f"not: {describe(wrong)} (there are {describe(sorted(known))}); {_FIXES[key]}"
        )
    return ids


def _mask(segmentation: Any, size: tuple[int, int], name: str) -> dict[str, Any]:
    """Returns the RLE of a result."""
    polygons, counts = read_outline(segmentation, size, lambda: name)
    if counts:
        return {"size": list(size), "counts": counts}
    usable = [p for p in polygons if is_polygon(p)]
    if not usable:
        raise InputError(f"{name}: `segmentation` has no polygon of 3 points or more")
    return polygons_to_rle(usable, size)
