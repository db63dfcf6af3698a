"""Scores and compares files of predictions, whoever made them, with only the annotations."""

import csv
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from solov2_jax.config import suggest
from solov2_jax.data.annotations import Fields, describe, read_box, whole_number
from solov2_jax.data.outlines import are_numbers, as_json, is_polygon, read_outline, rle_areas
from solov2_jax.evaluation.coco import CocoEvaluator, format_metric, is_defined
from solov2_jax.evaluation.coco_score import COCO_LIMIT, GroundTruth, read_ground_truth
from solov2_jax.evaluation.evaluate import write_metrics
from solov2_jax.evaluation.evaluators import make_evaluator
from solov2_jax.io import InputError, make_folder, read_json
from solov2_jax.rle import empty_rle, polygons_to_rle
from solov2_jax.tools.report.analysis import ImageRow, ReportData, make_report_data
from solov2_jax.tools.report.cityscapes_results import read_cityscapes_results
from solov2_jax.tools.report.diagnosis import diagnose
from solov2_jax.tools.report.outcomes import require_hotcoco

log = logging.getLogger(__name__)

SHOWN = 10  # classes and images in the log


# --- Ranges that results must lie in: `segm/AP=0.42+-0.02` ---------------------------
# Source: detectron2 evaluation/testing.py, verify_results (TEST.EXPECTED_RESULTS).

_FORM = re.compile(r"(.+)=([^=+±]+)(?:\+-|±)([^=]+)")


@dataclass(frozen=True)
class ExpectedResult:
    """A metric's value and how far from it the result may be."""

    metric: str
    value: float
    tolerance: float

    def miss(self, metrics: Mapping[str, float]) -> str:
        """Returns how the result leaves the range, "" where it does not."""
        result = metrics[self.metric]
        expected = f"expected {self.value:g} +- {self.tolerance:g}"
        if not is_defined(result):
            return f"{self.metric} is undefined (nothing of that kind is annotated), {expected}"
        # One unit in the last digit of the sums is no difference.
        slack = 1e-9
        if abs(result - self.value) <= self.tolerance + slack:
            return ""
        return f"{self.metric} is {result:.4f}, {expected}"


def parse_expectations(texts: Sequence[str]) -> list[ExpectedResult]:
    """Returns the expectations, or raises InputError for one that cannot be read."""
    expectations = []
    for text in texts:
        form = _FORM.fullmatch(text.strip())
        try:
            if form is None:
                raise ValueError
            value, tolerance = float(form[2]), float(form[3])
            if not math.isfinite(value) or not 0 <= tolerance < math.inf:
                raise ValueError
        except ValueError:
            raise InputError(
                f"--expect={text}: cannot be read; write METRIC=VALUE+-TOLERANCE, "
                "such as --expect=segm/AP=0.42+-0.02"
            ) from None
        expectations.append(ExpectedResult(form[1].strip(), value, tolerance))
    return expectations


def check_names(expectations: Sequence[ExpectedResult], metrics: Sequence[str]) -> None:
    """Raises InputError for an expectation of a metric that does not exist."""
    for expectation in expectations:
        if expectation.metric not in metrics:
            raise InputError(
                f"--expect={expectation.metric}=...: the evaluation has no such "
                f"metric{suggest(expectation.metric, metrics)}"
            )


def misses(expectations: Sequence[ExpectedResult], metrics: Mapping[str, float]) -> list[str]:
    """Returns a line for each result outside of its range."""
    lines = [expectation.miss(metrics) for expectation in expectations]
    return [line for line in lines if line]


# --- A results file ------------------------------------------------------------------


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
    max_detections: int = COCO_LIMIT,
    size_ranges: Sequence[int] = (),
    metric: str = "auto",
) -> dict[str, float]:
    """Returns the metrics of a results file over every image of the annotations.

    Args:
      against: another results file to compare with; the comparison is logged.
      out_dir: folder for `metrics.json`, the report and the comparison's tables.
      images: folder of the images, for the report's pictures.
      expectations: their names are checked before anything is computed.
      max_detections, size_ranges: as the config's eval.max_detections and eval.size_ranges.
      metric: as data.val.metric.
    """
    _check_request(report, out_dir, images, against)
    truth = read_ground_truth(annotations, images)
    ids = sorted(truth.categories)
    names = [truth.categories[i] for i in ids]

    def evaluator_of(path: str) -> CocoEvaluator:
        evaluator = make_evaluator(
            truth,
            ids,
            names,
            metric=metric,
            key="--metric",
            backend=backend,
            max_detections=max_detections,
            size_ranges=size_ranges,
        )
        return _filled(evaluator, path, expectations)

    evaluator = evaluator_of(predictions)
    other = evaluator_of(against) if against else None
    out = make_folder(out_dir) if out_dir else None  # every file is read by now
    metrics = evaluator.evaluate()
    for line in diagnose(evaluator, metrics):
        log.info("%s", line)
    if out:
        write_metrics(evaluator, metrics, out)
    if not (report or against):
        return metrics
    data = _report_data(evaluator, metrics, predictions)
    if out and report:
        _write_page(out, data, evaluator, images)
    if other:
        theirs = _report_data(other, other.evaluate(), against)
        _tell(compare(data, theirs), (predictions, against), truth, out)
    return metrics


def _filled(
    evaluator: CocoEvaluator, path: str, expectations: Sequence[ExpectedResult]
) -> CocoEvaluator:
    """Returns the evaluator with a file's results, whose names were checked before."""
    if evaluator.names_known:
        check_names(expectations, evaluator.metric_names())
    read = read_cityscapes_results if os.path.isdir(path) else read_results
    evaluator.add_results(read(path, evaluator.truth))
    return evaluator


def _check_request(report: bool, out_dir: str, images: str, against: str) -> None:
    if report and not out_dir:
        raise InputError("--report with --predictions needs --output, a folder for it")
    if images and not os.path.isdir(images):
        raise InputError(f"{images}: no such folder of images")
    if report or against:
        require_hotcoco()


def _write_page(out: Path, data: ReportData, evaluator: CocoEvaluator, images: str) -> None:
    """Writes the report, with pictures where there is a folder of images."""
    from solov2_jax.tools.report.page import write_report

    records = evaluator.truth.images.items()
    paths = {i: os.path.join(images, str(r["file_name"])) for i, r in records}
    write_report(out / "report", data, evaluator, paths if images else None)


def _tell(
    compared: "Comparison", names: tuple[str, str], truth: GroundTruth, out: Path | None
) -> None:
    """Logs a comparison of two files, and writes it into a folder."""
    log.info("a: %s", names[0])
    log.info("b: %s", names[1])
    files = {i: str(r.get("file_name") or i) for i, r in truth.images.items()}
    for line in compared.lines(files):
        log.info("%s", line)
    if out:
        compared.write(out, files)
        log.info("written: %s and comparison_images.csv", out / "comparison.csv")


def _report_data(evaluator: CocoEvaluator, metrics: dict[str, float], path: str) -> ReportData:
    facts = {"annotations": os.path.basename(evaluator.source)}
    return make_report_data(evaluator, metrics, os.path.basename(path), facts)


_FORMAT = (
    "COCO's results format is a json list of objects with image_id, category_id, score "
    "and segmentation"
)


def _points(value: Any) -> list[float] | None:
    fits = isinstance(value, list) and value and not len(value) % 3 and are_numbers(value)
    return [float(v) for v in value] if fits else None


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
    points = field("keypoints", _points, "x, y, score of each point, all numbers", default=())
    # Of programs that know no masks, only points.
    none = {"default": ()} if points and all(points) else {}
    outlines = field("segmentation", lambda v: v, "polygons or run lengths", **none)
    sizes = [(truth.images[i]["height"], truth.images[i]["width"]) for i in images]
    results = [
        {
            "image_id": images[i],
            "category_id": categories[i],
            "bbox": boxes[i],
            "score": scores[i],
            "segmentation": _mask(outline, size, field.name(i)),
            **({"keypoints": points[i]} if points[i] else {}),
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
            x, y = (result.get("keypoints", ())[n::3] for n in (0, 1))
            result["bbox"] = (
                [min(x), min(y), max(x) - min(x), max(y) - min(y)]
                if x
                else coco_mask.toBbox(result["segmentation"]).tolist()  # pyright: ignore
            )
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
    """Returns the RLE of a result, that of no pixel where () stands for its outline."""
    if segmentation == ():
        return {"size": list(size), "counts": empty_rle(size)}
    polygons, counts = read_outline(segmentation, size, lambda: name)
    if counts:
        return {"size": list(size), "counts": counts}
    usable = [p for p in polygons if is_polygon(p)]
    if not usable:
        raise InputError(f"{name}: `segmentation` has no polygon of 3 points or more")
    return polygons_to_rle(usable, size)


# --- Two sets of predictions ---------------------------------------------------------


@dataclass(frozen=True)
class MetricChange:
    """A metric of the first predictions (a) and of the second (b); NaN: undefined."""

    name: str
    a: float
    b: float

    @property
    def difference(self) -> float:
        """Returns a - b; 0 where the metric is undefined."""
        return self.a - self.b if is_defined(self.a) and is_defined(self.b) else 0.0


@dataclass(frozen=True)
class Comparison:
    """What changes from b to a; classes and images by the size of the change."""

    metrics: list[MetricChange]
    classes: list[MetricChange]  # mask AP
    images: list[tuple[ImageRow, ImageRow]]  # each from its own best threshold on

    def lines(self, files: Mapping[int, str]) -> list[str]:
        """Returns the lines of a table.

        Args:
          files: image id -> name.
        """
        lines = _table("metric", self.metrics)
        classes = [c for c in self.classes if c.difference]
        lines.append(f"{len(classes)} of {len(self.classes)} classes differ in mask AP")
        lines += _table("class", classes[:SHOWN]) if classes else []
        images = [(a, b) for a, b in self.images if a.f1 != b.f1]
        lines.append(
            f"{len(images)} of {len(self.images)} images differ in F1 (IoU 0.5, each from "
            "its own best score on)"
        )
        if images:
            lines.append(f"{'F1 a':>7} {'b':>7} {'a - b':>8}  found, false a and b; image")
        for a, b in images[:SHOWN]:
            counts = f"{a.right}, {a.false} and {b.right}, {b.false} of {a.objects}"
            change = f"{a.f1:7.3f} {b.f1:7.3f} {a.f1 - b.f1:+8.3f}"
            lines.append(f"{change}  {counts}; {files[a.image_id]}")
        return lines

    def write(self, folder: Path, files: Mapping[int, str]) -> None:
        """Writes every change as csv, also those that the log leaves out."""
        with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["metric or class", "a", "b", "a - b"])
            for c in (*self.metrics, *self.classes):
                values = [value if is_defined(value) else "" for value in (c.a, c.b)]
                writer.writerow([c.name, *values, c.difference])
        with (folder / "comparison_images.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            keys = ("f1", "right", "false", "missed")
            heads = [f"{key} {side}" for side in "ab" for key in keys]
            writer.writerow(["image_id", "file", *heads])
            for rows in self.images:
                values = [getattr(row, key) for row in rows for key in keys]
                writer.writerow([rows[0].image_id, files[rows[0].image_id], *values])


def compare(a: ReportData, b: ReportData) -> Comparison:
    """Returns the comparison of two reports on the same ground truth."""
    per_class = {f"segm/AP/{name}" for name in a.names}
    names = [name for name in a.metrics if name not in per_class]
    classes = [MetricChange(x.name, x.ap, y.ap) for x, y in zip(a.classes, b.classes, strict=True)]
    images = list(zip(a.images, b.images, strict=True))
    return Comparison(
        [MetricChange(name, a.metrics[name], b.metrics[name]) for name in names],
        sorted(classes, key=lambda c: -abs(c.difference)),
        sorted(images, key=lambda rows: (-abs(rows[0].f1 - rows[1].f1), rows[0].image_id)),
    )


def _table(kind: str, changes: Sequence[MetricChange]) -> list[str]:
    width = max(len(kind), *(len(c.name) for c in changes))
    lines = [f"{kind:{width}} {'a':>7} {'b':>7} {'a - b':>8}"]
    for c in changes:
        both = is_defined(c.a) and is_defined(c.b)
        difference = f"{c.difference:+.4f}" if both else "-"
        values = f"{format_metric(c.a):>7} {format_metric(c.b):>7}"
        lines.append(f"{c.name:{width}} {values} {difference:>8}")
    return lines
