"""The charts of the report and the doctor, by matplotlib, without a window or global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solov2_jax.io import write_bytes
from solov2_jax.tools.html import PagePicture, data_url

INK, GREY, GRID = "#24292f", "#c8ccd1", "#eceef0"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d97a26", "#3d8f5f", "#b0413e"
# Of single classes among curves; further ones are grey.
COLORS = (BLUE, ORANGE, GREEN, RED, "#7d5ba6", "#8a6d3b", "#c25a94")
Values = Sequence[float] | Sequence[int] | np.ndarray
MAX_BARS = 40  # rows of one bar chart
MAX_COUNTED = 15  # classes up to which a matrix shows numbers
DPI = 150


def panels(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of these inches with a row of empty charts."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors=INK, labelsize=9, length=0)
        ax.set_axisbelow(True)
    return figure, axes


def write_charts(figures: Mapping[str, Figure], folder: Path) -> dict[str, PagePicture]:
    """Returns the figures for a page, written to `<folder>/<name>.png` too."""
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        write_bytes(buffer.getvalue(), folder / f"{name}.png")
        url = data_url(buffer.getvalue(), "png")
        pictures[name] = PagePicture(url, round(96 * figure.get_figwidth()))
    return pictures


def label(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Sets the title and the axes' names."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=9)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def horizontal_bars(
    ax: Axes, names: Sequence[str], series: Sequence[tuple[str, str, Values, Sequence[str]]]
) -> None:
    """Draws a group of bars for each name, the first one on top.

    Args:
      series: (name, colour, values, texts behind the bars), side by side in a group.
    """
    places = np.arange(len(names))[::-1]
    height = 0.7 / len(series)
    for i, (name, color, values, texts) in enumerate(series):
        y = places + 0.35 - height * (i + 0.5)
        bars = ax.barh(y, values, height, color=color, label=name)
        ax.bar_label(bars, list(texts), padding=4, fontsize=8.5, color=INK)
    ax.set_yticks(places, list(names))
    ax.set_xticks([])
    ax.set_ylim(-0.6, max(len(names), 1) - 0.4)
    ax.spines["bottom"].set_visible(False)
    ax.margins(x=0.16)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=9, loc="lower right")


def columns(ax: Axes, names: Sequence[str], series: Sequence[tuple[str, str, Values]]) -> None:
    """Draws columns in front of each other: (name, colour, values), the largest first."""
    x = np.arange(len(names))
    for name, color, values in series:
        ax.bar(x, values, 0.7, color=color, label=name)
    ax.set_xticks(x, list(names))
    if len(series) > 1:
        ax.margins(y=0.3)  # room for the legend
        ax.legend(frameon=False, fontsize=8.5)


def above_columns(ax: Axes, heights: Values, texts: Sequence[str]) -> None:
    """Writes texts above columns."""
    for x, (height, text) in enumerate(zip(heights, texts, strict=True)):
        ax.annotate(
            text,
            (x, height),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
        )
    ax.margins(y=0.14)


def histograms(
    ax: Axes, series: Mapping[str, np.ndarray], edges: Values, ticks: Values = ()
) -> None:
    """Draws the outlines of histograms in per cent, by name; with ticks on a log scale."""
    for color, (name, values) in zip(COLORS, series.items(), strict=False):
        weights = np.full(len(values), 100 / max(len(values), 1))
        style = {"histtype": "step", "linewidth": 1.8, "color": color, "label": name}
        ax.hist(values, list(edges), weights=weights, **style)
    if len(ticks):
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(list(ticks), [f"{t:g}" for t in ticks])


def lines(
    ax: Axes, curves: Sequence[tuple[str, np.ndarray, np.ndarray]], whole: tuple[np.ndarray, ...]
) -> None:
    """Draws curves between 0 and 1: `whole` in bold, the others coloured, then grey.

    Args:
      curves: (name, x, y), the most important ones first.
    """
    for i in reversed(range(len(curves))):
        name, x, y = curves[i]
        if i < len(COLORS):
            ax.plot(x, y, color=COLORS[i], linewidth=1.3, label=name)
        else:
            ax.plot(x, y, color=GREY, linewidth=0.8)
    ax.plot(*whole, color=INK, linewidth=2.4, label="all classes")
    ax.set(xlim=(0, 1.01), ylim=(0, 1.05))
    ax.grid(color=GRID)


def mark(ax: Axes, x: float, y: float, text: str) -> None:
    """Draws a point between 0 and 1 with a text beside it."""
    ax.plot([x], [y], "o", color=ORANGE, markersize=7, zorder=5)
    side, shift = ("left", 8) if x < 0.6 else ("right", -8)
    ax.annotate(
        text,
        (x, y),
        (shift, 9),
        textcoords="offset points",
        ha=side,
        fontsize=9,
        color=ORANGE,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=6,
    )


def matrix(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Returns a matrix of counts, shaded by the share of each row."""
    k = len(counts) - 1
    size = min(8.8, 1.9 + 0.5 * k)
    figure, (ax,) = panels(size + 1.2, size)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    small = 9 if k <= MAX_COUNTED else 6
    ax.set_yticks(np.arange(k + 1), list(rows), fontsize=small)
    ax.set_xticks(np.arange(k + 1), list(columns), fontsize=small, rotation=90 if k > 6 else 0)
    if k <= MAX_COUNTED:
        for (i, j), n in np.ndenumerate(counts):
            color = "white" if share[i, j] > 0.55 else INK
            text = str(n) if n or i == j < k else ""
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    ax.axhline(k - 0.5, color="white", linewidth=3)
    ax.axvline(k - 0.5, color="white", linewidth=3)
    ax.spines[:].set_visible(False)
    return figure
