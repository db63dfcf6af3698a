"""A report on disk: one HTML page that needs nothing else, and what it is made of.

report/report.html      charts, tables and pictures inside
report/charts/*.png
report/tables/*.csv
report/gallery/*.jpg    the worst images: annotated left, predicted right
"""

import csv
import functools
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.evaluation.coco import CocoEvaluator, format_metric, is_defined
from solov2_jax.evaluation.evaluate import FinishedEvaluation, Report
from solov2_jax.io import write_text
from solov2_jax.tools import charts, html
from solov2_jax.tools.html import PagePicture
from solov2_jax.tools.report.analysis import (
    ERRORS,
    Curve,
    ReportData,
    make_report_data,
    worst_first,
)
from solov2_jax.tools.report.pictures import Gallery

log = logging.getLogger(__name__)

MAX_CONFUSED = 8  # pairs of classes that are named
MAX_CLASSES = 80  # of the chart of the confusion matrix; the csv has all
MAX_CURVES = 40  # of single classes in a chart, those with the most objects
MAX_PICTURES = 12  # images of the gallery
WIDE = 700  # pixels from which on a picture has a row of its own


def report_writer(title: str) -> Report:
    """Returns a function for an evaluation's `reports` that writes the page."""
    return functools.partial(_write_evaluation, title)


def write_run_report(evaluation: FinishedEvaluation) -> None:
    """Writes the page of a run's last evaluation, for `train.after_training`."""
    workdir, step = evaluation.checkpoint or (evaluation.folder.parent, "unknown")
    _write_evaluation(f"{workdir.name}, step {step}", evaluation)


def _write_evaluation(title: str, evaluation: FinishedEvaluation) -> None:
    dataset, evaluator = evaluation.dataset, evaluation.evaluator
    facts = {"data": os.path.basename(dataset.annotation_file)}
    data = make_report_data(evaluator, evaluation.metrics, title, facts, evaluation.milliseconds)
    ids = (evaluator.truth.image_ids[i] for i in dataset.image_ids.tolist())
    paths = {image_id: dataset.path(n) for n, image_id in enumerate(ids)}
    write_report(evaluation.folder / "report", data, evaluator, paths, dataset.pixels)


def write_report(
    folder: str | os.PathLike[str],
    data: ReportData,
    evaluator: CocoEvaluator,
    paths: Mapping[int, str] | None,
    pixels: PixelFormat = RGB,
) -> Path:
    """Returns the page's path; an older report in `folder` is replaced.

    Args:
      paths: of the images, by id; None draws masks on grey.
    """
    out = Path(folder)
    for name in ("charts", "tables", "gallery"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    drawn = charts.write_charts(draw_charts(data), out / "charts")
    for name, rows in tables(data).items():
        with (out / "tables" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    pictures = _pictures(out / "gallery", data, Gallery(evaluator, paths, pixels))
    path = out / "report.html"
    write_text(_page(data, evaluator, drawn, pictures), path)
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
    evaluator: CocoEvaluator,
    drawn: dict[str, PagePicture],
    pictures: list[PagePicture],
) -> str:
    def row(kind: str, names: Sequence[str]) -> list[str]:
        return [format_metric(data.metrics[f"{kind}/{name}"]) for name in names]

    groups = evaluator.groups()
    first = [name for name in groups[0] if name.startswith("AP")][:6]
    shown = {f"{kind}/{name}" for kind in evaluator.kinds for names in groups for name in names}
    shown |= {f"{m}/{name}" for m in evaluator.per_class for name in data.names}
    others = [name for name in data.metrics if name not in shown]  # key points', a user's own
    words = {"segm": "masks", "bbox": "boxes", "boundary": "borders"}
    return html.render(
        "report.html",
        title=data.title,
        tile_width=440,
        data=data,
        tiles=list(zip(first, row("segm", first), strict=True)),
        metric_tables=[
            (["", *names], [[words[kind], *row(kind, names)] for kind in evaluator.kinds])
            for names in groups
        ]
        + [(["metric", "value"], [[n, format_metric(data.metrics[n])] for n in others])]
        * bool(others),
        kinds=list(ERRORS),
        worst=max(ERRORS, key=lambda kind: data.errors.gains[kind]),
        threshold=f"{data.threshold:.3f}",
        best=data.curve.at(data.threshold),
        confused=_confused(data),
        charts=drawn,
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
    border_keys = ["name", "found", "mask_iou", "border_iou", "fitting"]
    borders = {"borders": [["side", *border_keys[1:]], *attributes(data.borders, border_keys)]}
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
        **(borders if data.borders else {}),
    }


# --- Charts --------------------------------------------------------------------------


def draw_charts(data: ReportData) -> dict[str, Figure]:
    """Returns the charts by name."""
    counts, names = _most_confused(data.confusion, data.names)
    confusion = charts.matrix(counts, [*names, "nothing there"], [*names, "missed"])
    charts.label(confusion.axes[0], "", "predicted", "annotated")
    return {
        "errors": _errors(data),
        "curves": _curves(data),
        "classes": _classes(data),
        "confusion": confusion,
        "sizes": _sizes(data),
        "calibration": _calibration(data),
    }


def _most_confused(confusion: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Returns a matrix of many classes without all but those with the most errors."""
    if len(names) <= MAX_CLASSES:
        return confusion, names
    wrong = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    kept = np.sort(np.argsort(-wrong[:-1], kind="stable")[:MAX_CLASSES])
    rows = [*kept.tolist(), len(names)]
    return confusion[np.ix_(rows, rows)], [names[int(k)] for k in kept]


def _errors(data: ReportData) -> Figure:
    """Returns how many errors there are of each kind and what each kind costs."""
    figure, (left, right) = charts.panels(10.0, 3.1, 2)
    gains = [data.errors.gains[kind] for kind in ERRORS]
    counts = [data.shown_errors[kind] for kind in ERRORS]
    kinds = list(ERRORS)
    gain_texts = [f"{gain:+.3f}" for gain in gains]
    charts.horizontal_bars(left, kinds, [("gain", charts.ORANGE, gains, gain_texts)])
    count_texts = [str(count) for count in counts]
    charts.horizontal_bars(right, kinds, [("count", charts.BLUE, counts, count_texts)])
    charts.label(left, "AP50 that fixing one kind would add")
    charts.label(right, f"Number of errors from score {data.threshold:.3f} on")
    return figure


def _curves(data: ReportData) -> Figure:
    """Returns precision over recall, and F1 over the score threshold."""
    figure, (left, right) = charts.panels(10.0, 4.2, 2)
    pairs = [p for p in zip(data.classes, data.class_curves, strict=True) if p[0].objects]
    pairs.sort(key=lambda p: -p[0].objects)
    pairs = pairs[:MAX_CURVES] if len(data.classes) > 1 else []
    charts.lines(left, [(row.name, *_steps(c)) for row, c in pairs], _steps(data.curve))
    charts.lines(right, [(row.name, *_f1(c)) for row, c in pairs], _f1(data.curve))
    best, f1 = data.threshold, data.curve.at(data.threshold)[2]
    charts.mark(right, best, f1, f"best: {best:.3f}, F1 {f1:.3f}")
    charts.label(left, "Precision over recall, IoU 0.5", "recall", "precision")
    charts.label(right, "F1 over the score threshold", "score threshold", "F1")
    where = "upper right" if best < 0.5 else "upper left"
    right.legend(loc=where, framealpha=0.9, edgecolor="none", fontsize=8.5)
    return figure


def _steps(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns recall and the best precision from there on."""
    if not len(curve.score):
        return np.zeros(1), np.zeros(1)
    best = np.maximum.accumulate(curve.precision[::-1])[::-1]
    recall = np.concatenate([[0], curve.recall, [curve.recall[-1]]])
    return recall, np.concatenate([best[:1], best, [0]])


def _f1(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns thresholds 0..1 and F1."""
    thresholds = np.linspace(0, 1, 201)
    return thresholds, np.array([curve.at(float(t))[2] for t in thresholds])


def _classes(data: ReportData) -> Figure:
    """Returns mask AP of the classes, best first; of many, the best and the worst."""
    rows = sorted((row for row in data.classes if is_defined(row.ap)), key=lambda row: -row.ap)
    title = "Mask AP of each class, and its number of objects"
    if len(rows) > charts.MAX_BARS:
        half = charts.MAX_BARS // 2
        rows = rows[:half] + rows[-half:]
        title = f"Mask AP and number of objects, best and worst {half} classes"
    figure, (ax,) = charts.panels(10.0, 1.0 + 0.24 * max(len(rows), 2))
    texts = [f"{row.ap:.3f}   of {row.objects}" for row in rows]
    series = [("AP", charts.BLUE, [row.ap for row in rows], texts)]
    charts.horizontal_bars(ax, [row.name for row in rows], series)
    ax.set_xlim(0, 1.12)
    charts.label(ax, title)
    return figure


def _sizes(data: ReportData) -> Figure:
    """Returns how many objects of each size were found, and how well."""
    figure, (left, right) = charts.panels(10.0, 3.1, 2)
    names = [row.name for row in data.sizes]
    objects, found = [row.objects for row in data.sizes], [row.found for row in data.sizes]
    series = [("annotated", charts.GREY, objects), ("found", charts.BLUE, found)]
    charts.columns(left, names, series)
    shares = [f"{n / of:.0%}" if of else "" for n, of in zip(found, objects, strict=True)]
    charts.above_columns(left, objects, shares)
    iou = [row.mean_iou for row in data.sizes]
    charts.columns(right, names, [("IoU", charts.GREEN, iou)])
    charts.above_columns(right, iou, [f"{value:.2f}" if value else "" for value in iou])
    right.set_ylim(0, 1.08)
    side = "side of a square of the object's area, pixels"
    charts.label(left, "Objects found, by size", side, "objects")
    charts.label(right, "Mean mask IoU of those found", side, "IoU")
    return figure


def _calibration(data: ReportData) -> Figure:
    """Returns the share of right detections by score, and how many there are."""
    figure, (left, right) = charts.panels(10.0, 3.4, 2)
    bins = data.calibration
    full = bins.count > 0
    left.plot([0, 1], [0, 1], color=charts.GREY, linestyle="--", linewidth=1.2)
    left.plot(bins.score[full], bins.right[full], "o-", color=charts.BLUE, markersize=5)
    left.set(xlim=(0, 1), ylim=(0, 1.02))
    left.grid(color=charts.GRID)
    middle = (bins.edges[:-1] + bins.edges[1:]) / 2
    right.bar(middle, bins.count, width=0.085, color=charts.BLUE)
    right.set_xlim(0, 1)
    charts.label(left, "Right detections over their score", "mean score", "share that is right")
    charts.label(right, "Detections by score", "score", "detections")
    return figure
