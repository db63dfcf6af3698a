"""A study on disk: one HTML page that needs nothing else, and what it is made of.

report/report.html      charts, tables and pictures inside
report/charts/*.png
report/tables/*.csv
report/gallery/*.jpg    the worst images: truth left, prediction right
"""

import base64
import csv
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.images import read_image
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.tools.report.analysis import ERRORS, ImageRow, worst_first
from solov2_jax.tools.report.charts import charts, size_name
from solov2_jax.tools.report.page import Chart, GalleryImage, page
from solov2_jax.tools.report.pictures import from_records, side_by_side
from solov2_jax.tools.report.study import ReportData

log = logging.getLogger(__name__)

GALLERY = 12  # images
# Pictures of the gallery are reduced to this width, pixels.
PICTURE_WIDTH = 1400
WIDE = 700  # from here on, a picture has a row of its own
PAPER = 235  # grey on which masks are drawn when there is no image


def write_report(
    folder: str | os.PathLike[str],
    study: ReportData,
    evaluator: CocoEvaluator,
    image_root: str | None,
) -> Path:
    """Returns the page's path; an older report in `folder` is replaced.

    Args:
      image_root: the folder of the images; None draws masks on grey.
    """
    out = Path(folder)
    for name in ("charts", "tables", "gallery"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    images = {}
    for name, figure in charts(study).items():
        path = out / "charts" / f"{name}.png"
        figure.savefig(path, facecolor="white")
        images[name] = Chart(data_url(path), round(96 * figure.get_figwidth()))
    write_tables(out / "tables", study)
    pictures = []
    gallery = Gallery(evaluator, image_root)
    for row in worst_first(study.images)[:GALLERY]:
        path = out / "gallery" / f"{row.image_id}.jpg"
        picture = gallery.draw(row, study.threshold)
        picture.save(path, quality=88)
        wide = picture.width > WIDE
        pictures.append(GalleryImage(row, gallery.file_name(row), data_url(path), wide))
    path = out / "report.html"
    path.write_text(page(study, images, pictures), "utf-8")
    log.info("report: %s", path)
    return path


def data_url(path: Path) -> str:
    """Returns the file as a URL that holds it."""
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    text = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:image/{kind};base64,{text}"


class Gallery:
    """Pictures of images with what is annotated and what was predicted."""

    def __init__(self, evaluator: CocoEvaluator, image_root: str | None):
        self._evaluator, self._root = evaluator, image_root
        self._labels = {c: n for n, c in enumerate(sorted(evaluator.category_ids))}
        self._truth = _by_image(evaluator.truth.annotations)
        self._found = _by_image(evaluator.results)

    def file_name(self, row: ImageRow) -> str:
        """Returns the image's file name, or its id where the file has no names."""
        record = self._evaluator.truth.images[row.image_id]
        return str(record.get("file_name", row.image_id))

    def draw(self, row: ImageRow, threshold: float) -> Image.Image:
        """Returns truth (with crowds left out) beside the predictions from a score."""
        record = self._evaluator.truth.images[row.image_id]
        size = (int(record["height"]), int(record["width"]))
        if self._root is None:
            image = np.full((*size, 3), PAPER, np.uint8)
        else:
            image = read_image(os.path.join(self._root, self.file_name(row)))
            if image.shape[:2] != size:
                raise ValueError(
                    f"{self.file_name(row)} is {image.shape[:2]} (height, width), but "
                    f"{self._evaluator.source} says {size}"
                )
        there = [a for a in self._truth.get(row.image_id, ()) if not a["iscrowd"]]
        sides = [
            from_records(self._known(records), self._labels, row.image_id, size)
            for records in (there, self._found.get(row.image_id, []))
        ]
        names = self._evaluator.sorted_names()
        names = names if len(names) > 1 else []  # one class needs no labels
        picture = Image.fromarray(side_by_side(image, sides[0], sides[1].above(threshold), names))
        picture.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
        return picture

    def _known(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in records if r["category_id"] in self._labels]


def _by_image(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["image_id"], []).append(record)
    return found


@dataclass(frozen=True)
class ReportTable:
    """What becomes a csv file."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


def write_tables(folder: Path, study: ReportData) -> None:
    """Writes every table of the study as <name>.csv."""
    for name, table in tables(study).items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table.head)
            writer.writerows(table.rows)


def tables(study: ReportData) -> dict[str, ReportTable]:
    """Returns the tables by name; -1 marks what does not exist."""
    names, split, bins = study.names, study.errors, study.calibration
    head = "class ap objects predictions threshold precision recall f1".split()
    curves = [("all", study.curve), *zip(names, study.class_curves, strict=True)]
    grid = [round(0.01 * i, 2) for i in range(101)]
    last = [*names, "missed"], [*names, "nothing there"]
    return {
        "figures": ReportTable(["figure", "value"], list(study.metrics.items())),
        "classes": ReportTable(
            head,
            [[getattr(r, h if h != "class" else "name") for h in head] for r in study.classes],
        ),
        "curves": ReportTable(
            ["class", "threshold", "precision", "recall", "f1"],
            [[name, t, *curve.at(t)] for name, curve in curves for t in grid],
        ),
        "errors": ReportTable(
            ["kind", "errors", "ap50_gain"],
            [[e, split.counts[e], split.gains[e]] for e in ERRORS],
        ),
        "confusion": ReportTable(
            ["annotated \\ predicted", *last[0]],
            [[n, *row] for n, row in zip(last[1], study.confusion.tolist(), strict=True)],
        ),
        "sizes": ReportTable(
            ["side", "objects", "found", "mean_iou"],
            [[size_name(r.low, r.high), r.objects, r.found, r.mean_iou] for r in study.sizes],
        ),
        "calibration": ReportTable(
            ["from", "detections", "mean_score", "share_right"],
            list(zip(bins.edges[:-1], bins.count, bins.score, bins.right, strict=True)),
        ),
        "images": ReportTable(
            ["image_id", "objects", "right", "false", "missed", "f1"],
            [[r.image_id, r.objects, r.right, r.false, r.missed, r.f1] for r in study.images],
        ),
    }
