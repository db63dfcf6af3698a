"""The report's charts."""

import numpy as np
from matplotlib.figure import Figure

from solov2_jax.evaluation.coco import is_defined
from solov2_jax.tools import charts
from solov2_jax.tools.report.analysis import ERRORS, Curve
from solov2_jax.tools.report.report_data import ReportData


def draw_charts(data: ReportData) -> dict[str, tuple[bytes, int]]:
    """Returns (PNG file, width in the page in pixels) of each chart, by name."""
    figures = {
        "errors": _errors(data),
        "curves": _curves(data),
        "classes": _classes(data),
        "confusion": charts.matrix(
            data.confusion, [*data.names, "nothing there"], [*data.names, "missed"]
        ),
        "sizes": _sizes(data),
        "calibration": _calibration(data),
    }
    charts.label(figures["confusion"].axes[0], "", "predicted", "annotated")
    return {n: (charts.png(f), round(96 * f.get_figwidth())) for n, f in figures.items()}


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
    pairs = pairs if len(data.classes) > 1 else []
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
