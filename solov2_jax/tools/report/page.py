"""A report on disk: one HTML page that needs nothing else, and what it is made of.

report/report.html      charts, tables and pictures inside
report/charts/*.png
report/tables/*.csv
report/gallery/*.jpg    the worst images: annotated left, predicted right
"""

import csv
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.evaluation.coco import CocoEvaluator, format_metric, is_defined
from solov2_jax.evaluation.coco_score import METRICS, extra_metrics
from solov2_jax.evaluation.evaluate import FinishedEvaluation
from solov2_jax.io import write_text
from solov2_jax.tools import html
from solov2_jax.tools.html import PagePicture
from solov2_jax.tools.report.analysis import ERRORS, worst_first
from solov2_jax.tools.report.page_charts import draw_charts
from solov2_jax.tools.report.pictures import Gallery
from solov2_jax.tools.report.report_data import ReportData, make_report_data

log = logging.getLogger(__name__)

MEANINGS = {
    "localisation": "the right class, but the mask fits an object only with IoU 0.1 to 0.5",
    "class": "the mask is an object's (IoU 0.5 or more), the class is not",
    "both": "touches an object (IoU 0.1 or more), and neither class nor mask fit",
    "duplicate": "fits an object that a better scored detection has taken",
    "background": "touches no object (IoU below 0.1)",
    "missed": "an object that no detection is about",
}
PARTS = {
    "data": "waiting for images",
    "compute": "network, NMS and masks at full size",
    "encode": "waiting for the mask encoder, which works beside it",
}
MAX_CONFUSED = 8  # pairs of classes that are named
MAX_PICTURES = 12  # images of the gallery
WIDE = 700  # pixels from which on a picture has a row of its own


def report_writer(title: str):
    """Returns a function for an evaluation's `reports` that writes the page."""

    def write(evaluation: FinishedEvaluation) -> None:
        dataset, evaluator = evaluation.dataset, evaluation.evaluator
        facts = {"data": os.path.basename(dataset.annotation_file)}
        data = make_report_data(
            evaluator, evaluation.metrics, title, facts, evaluation.milliseconds
        )
        ids = (evaluator.truth.image_ids[i] for i in dataset.image_ids.tolist())
        paths = {image_id: dataset.path(n) for n, image_id in enumerate(ids)}
        write_report(evaluation.folder / "report", data, evaluator, paths)

    return write


def write_report(
    folder: str | os.PathLike[str],
    data: ReportData,
    evaluator: CocoEvaluator,
    paths: Mapping[int, str] | None,
) -> Path:
    """Returns the page's path; an older report in `folder` is replaced.

    Args:
      paths: of the images, by id; None draws masks on grey.
    """
    out = Path(folder)
    for name in ("charts", "tables", "gallery"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    charts = {}
    for name, (image, width) in draw_charts(data).items():
        (out / "charts" / f"{name}.png").write_bytes(image)
        charts[name] = PagePicture(html.data_url(image, "png"), width)
    for name, rows in tables(data).items():
        with (out / "tables" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    pictures = _pictures(out / "gallery", data, Gallery(evaluator, paths))
    path = out / "report.html"
    write_text(_page(data, evaluator.max_detections, charts, pictures), path)
    log.info("report: %s", path)
    return path


def _pictures(folder: Path, data: ReportData, gallery: Gallery) -> list[PagePicture]:
    """Returns the worst images, also written into the folder."""
    pictures = []
    for row in worst_first(data.images)[:MAX_PICTURES]:
        path = folder / f"{row.image_id}.jpg"
        picture = gallery.draw(row.image_id, data.threshold)
        picture.save(path, quality=88)
        caption = (
            f"{gallery.file_name(row.image_id)}: {row.objects} objects, {row.right} found, "
            f"{row.missed} missed, {row.false} false; F1 {row.f1:.2f}"
        )
        url = html.data_url(path.read_bytes(), "jpeg")
        pictures.append(PagePicture(url, picture.width, caption, picture.width > WIDE))
    return pictures


def _page(
    data: ReportData,
    max_detections: int,
    charts: dict[str, PagePicture],
    pictures: list[PagePicture],
) -> str:
    def row(kind: str, names: Sequence[str]) -> list[str]:
        return [format_metric(data.metrics[f"{kind}/{name}"]) for name in names]

    groups = [names for names in (METRICS, extra_metrics(max_detections)) if names]
    return html.render(
        "report.html",
        title=data.title,
        tile_width=440,
        data=data,
        tiles=list(zip(METRICS[:6], row("segm", METRICS[:6]), strict=True)),
        metric_tables=[
            (["", *names], [["masks", *row("segm", names)], ["boxes", *row("bbox", names)]])
            for names in groups
        ],
        meanings=MEANINGS,
        worst=max(ERRORS, key=lambda kind: data.errors.gains[kind]),
        threshold=f"{data.threshold:.3f}",
        best=data.curve.at(data.threshold),
        confused=_confused(data),
        times=[(PARTS[part], f"{ms:.1f}") for part, ms in data.milliseconds.items()],
        charts=charts,
        pictures=pictures,
        defined=is_defined,
        text=format_metric,
    )


def _confused(data: ReportData) -> list[tuple[str, str, int]]:
    """Returns (annotated, predicted, times) of the classes most often confused."""
    counts = data.confusion[:-1, :-1].copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MAX_CONFUSED]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [(data.names[i], data.names[j], int(counts[i, j])) for i, j in pairs if counts[i, j]]


def tables(data: ReportData) -> dict[str, list[Sequence[Any]]]:
    """Returns the rows of the csv files, a head first; undefined values are empty."""
    names, split, bins = data.names, data.errors, data.calibration
    curves = [("all", data.curve), *zip(names, data.class_curves, strict=True)]
    thresholds = [round(0.01 * i, 2) for i in range(101)]
    confusion = zip([*names, "nothing there"], data.confusion.tolist(), strict=True)
    class_head = "class ap objects predictions threshold precision recall f1".split()
    class_keys = ["name", "ap", *class_head[2:]]

    def value(number: Any) -> Any:
        return "" if isinstance(number, float) and not is_defined(number) else number

    def attributes(rows: Sequence[Any], keys: Sequence[str]) -> list[Sequence[Any]]:
        return [[value(getattr(row, key)) for key in keys] for row in rows]

    size_keys = ["name", "objects", "found", "mean_iou"]
    image_keys = ["image_id", "objects", "right", "false", "missed", "f1"]
    return {
        "metrics": [("metric", "value"), *((n, value(v)) for n, v in data.metrics.items())],
        "classes": [class_head, *attributes(data.classes, class_keys)],
        "curves": [
            ("class", "threshold", "precision", "recall", "f1"),
            *((name, t, *curve.at(t)) for name, curve in curves for t in thresholds),
        ],
        "errors": [
            ("kind", "errors", "ap50_gain"),
            *((kind, split.counts[kind], split.gains[kind]) for kind in ERRORS),
        ],
        "confusion": [
            ["annotated \\ predicted", *names, "missed"],
            *([name, *row] for name, row in confusion),
        ],
        "sizes": [["side", *size_keys[1:]], *attributes(data.sizes, size_keys)],
        "calibration": [
            ("from", "detections", "mean_score", "share_right"),
            *zip(bins.edges[:-1], bins.count, bins.score, bins.right, strict=True),
        ],
        "images": [image_keys, *attributes(data.images, image_keys)],
    }
