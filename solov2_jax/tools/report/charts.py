"""A study as pictures, by matplotlib, without a window or any global state."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solov2_jax.tools.report.analysis import ERRORS, Curve
from solov2_jax.tools.report.study import ReportData

INK, GREY, BLUE, ORANGE, GREEN = "#24292f", "#c8ccd1", "#2f6db5", "#d97a26", "#3d8f5f"
# Of single classes in the curves; more classes are drawn grey.
COLORS = ("#2f6db5", "#d97a26", "#3d8f5f", "#b0413e", "#7d5ba6", "#8a6d3b", "#c25a94")
MAX_BARS = 40  # classes in one bar chart
MAX_COUNTED = 15  # classes up to which the confusion matrix shows numbers


def charts(study: ReportData) -> dict[str, Figure]:
    """Returns the figures by name."""
    draw: dict[str, Callable[[ReportData], Figure]] = {
        "errors": errors,
        "curves": curves,
        "classes": classes,
        "confusion": confusion,
        "sizes": sizes,
        "calibration": calibration,
    }
    return {name: function(study) for name, function in draw.items()}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors=INK, labelsize=9, length=0)
        ax.set_axisbelow(True)
    return figure, axes


def _title(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    ax.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=9)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def errors(study: ReportData) -> Figure:
    """Returns how many errors there are of each kind and what each kind costs."""
    figure, (left, right) = _figure(10.0, 3.1, 2)
    split, rows = study.errors, np.arange(len(ERRORS))[::-1]
    counts = [study.shown_errors[e] for e in ERRORS]
    gains = [split.gains[e] for e in ERRORS]
    for ax, values, color, form in (
        (left, gains, ORANGE, "{:+.3f}"),
        (right, counts, BLUE, "{:d}"),
    ):
        bars = ax.barh(rows, values, color=color, height=0.62)
        ax.bar_label(bars, [form.format(v) for v in values], padding=4, fontsize=9)
        ax.set_yticks(rows, ERRORS)
        ax.spines["bottom"].set_visible(False)
        ax.set_xticks([])
        ax.margins(x=0.16)
    _title(left, "AP50 that mending one kind would add")
    _title(right, f"Number of errors from score {study.threshold:.3f} on")
    return figure


def curves(study: ReportData) -> Figure:
    """Returns precision over recall, and F1 over the score threshold."""
    figure, (left, right) = _figure(10.0, 4.2, 2)
    most = sorted(study.classes, key=lambda row: -row.objects)[: len(COLORS)]
    colors = dict(zip([row.name for row in most], COLORS, strict=False))
    pairs = list(zip(study.classes, study.class_curves, strict=True))
    pairs = [p for p in pairs if p[0].objects] if len(pairs) > 1 else []
    for row, curve in sorted(pairs, key=lambda p: p[0].name in colors):
        color = colors.get(row.name, GREY)
        label = row.name if row.name in colors else None
        style = {"color": color, "linewidth": 1.3 if label else 0.8, "label": label}
        left.plot(*_steps(curve), **style)
        right.plot(*_f1(curve), **style)
    bold = {"color": INK, "linewidth": 2.4, "label": "all classes"}
    left.plot(*_steps(study.curve), **bold)
    right.plot(*_f1(study.curve), **bold)
    best, f1 = study.threshold, study.curve.at(study.threshold)[2]
    right.plot([best], [f1], "o", color=ORANGE, markersize=7, zorder=5)
    side = ("left", 8) if best < 0.6 else ("right", -8)
    right.annotate(
        f"best: {best:.3f}, F1 {f1:.3f}",
        (best, f1),
        (side[1], 9),
        textcoords="offset points",
        ha=side[0],
        fontsize=9,
        color=ORANGE,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=6,
    )
    for ax in (left, right):
        ax.set(xlim=(0, 1.01), ylim=(0, 1.05))
        ax.grid(color="#eceef0")
    _title(left, "Precision over recall, IoU 0.5", "recall", "precision")
    _title(right, "F1 over the score threshold", "score threshold", "F1")
    where = "upper right" if best < 0.5 else "upper left"
    style = {"framealpha": 0.9, "edgecolor": "none", "fontsize": 8.5}
    right.legend(loc=where, **style)
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


def classes(study: ReportData) -> Figure:
    """Returns mask AP of the classes, best first; of many, the best and the worst."""
    rows = [row for row in study.classes if row.ap >= 0]
    rows.sort(key=lambda row: -row.ap)
    title = "Mask AP of each class, and its number of objects"
    if len(rows) > MAX_BARS:
        rows = rows[: MAX_BARS // 2] + rows[-MAX_BARS // 2 :]
        half = MAX_BARS // 2
        title = f"Mask AP and number of objects, best and worst {half} classes"
    figure, (ax,) = _figure(10.0, 1.0 + 0.24 * max(len(rows), 2))
    places = np.arange(len(rows))[::-1]
    bars = ax.barh(places, [r.ap for r in rows], color=BLUE, height=0.68)
    labels = [f"{r.ap:.3f}   of {r.objects}" for r in rows]
    ax.bar_label(bars, labels, padding=5, fontsize=8.5, color=INK)
    ax.set_yticks(places, [r.name for r in rows])
    ax.set(xlim=(0, 1.12), ylim=(-0.6, max(len(rows), 1) - 0.4), xticks=[])
    ax.spines["bottom"].set_visible(False)
    _title(ax, title)
    return figure


def confusion(study: ReportData) -> Figure:
    """Returns the confusion matrix, shaded by the share of each row."""
    matrix = study.confusion
    k = len(matrix) - 1
    size = min(8.8, 1.9 + 0.5 * k)
    figure, (ax,) = _figure(size + 1.2, size)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    small = 9 if k <= MAX_COUNTED else 6
    rows, columns = [*study.names, "nothing there"], [*study.names, "missed"]
    ax.set_yticks(np.arange(k + 1), rows, fontsize=small)
    ax.set_xticks(np.arange(k + 1), columns, fontsize=small, rotation=90 if k > 6 else 0)
    if k <= MAX_COUNTED:
        for (i, j), n in np.ndenumerate(matrix):
            color = "white" if share[i, j] > 0.55 else INK
            text = str(n) if n or i == j < k else ""
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    for line in (k - 0.5,):
        ax.axhline(line, color="white", linewidth=3)
        ax.axvline(line, color="white", linewidth=3)
    ax.spines[:].set_visible(False)
    _title(ax, "", "predicted", "annotated")
    return figure


def sizes(study: ReportData) -> Figure:
    """Returns how many objects of each size were found, and how well."""
    figure, (left, right) = _figure(10.0, 3.1, 2)
    x = np.arange(len(study.sizes))
    found = np.array([r.found for r in study.sizes])
    objects = np.array([r.objects for r in study.sizes])
    left.bar(x, objects, color=GREY, width=0.7, label="annotated")
    left.bar(x, found, color=BLUE, width=0.7, label="found")
    for i, (n, of) in enumerate(zip(found, objects, strict=True)):
        if of:
            left.annotate(
                f"{n / of:.0%}",
                (i, of),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=INK,
            )
    left.legend(frameon=False, fontsize=8.5)
    left.margins(y=0.14)
    iou = [r.mean_iou for r in study.sizes]
    bars = right.bar(x, iou, color=GREEN, width=0.7)
    labels = [f"{v:.2f}" if v else "" for v in iou]
    right.bar_label(bars, labels, padding=3, fontsize=9)
    right.set_ylim(0, 1.08)
    for ax in (left, right):
        ax.set_xticks(x, [size_name(r.low, r.high) for r in study.sizes])
    side = "side of a square of the object's area, pixels"
    _title(left, "Objects found, by size", side, "objects")
    _title(right, "Mean mask IoU of those found", side, "IoU")
    return figure


def size_name(low: float, high: float) -> str:
    """Returns a range of sides as text."""
    return f"{low:.0f}\u2013{high:.0f}" if np.isfinite(high) else f"\u2265 {low:.0f}"


def calibration(study: ReportData) -> Figure:
    """Returns the share of right detections by score, and how many there are."""
    figure, (left, right) = _figure(10.0, 3.4, 2)
    found = study.calibration
    full = found.count > 0
    left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2)
    left.plot(found.score[full], found.right[full], "o-", color=BLUE, markersize=5)
    left.set(xlim=(0, 1), ylim=(0, 1.02))
    left.grid(color="#eceef0")
    middle = (found.edges[:-1] + found.edges[1:]) / 2
    right.bar(middle, found.count, width=0.085, color=BLUE)
    right.set_xlim(0, 1)
    _title(left, "Right detections over their score", "mean score", "share that is right")
    _title(right, "Detections by score", "score", "detections")
    return figure
