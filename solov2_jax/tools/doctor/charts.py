"""Histograms of a data set, by matplotlib, without a window or any global state."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solov2_jax.tools.doctor.grids import Crowding, Layout
from solov2_jax.tools.doctor.objects import class_counts
from solov2_jax.tools.doctor.study import DataStudy

INK, GREY = "#24292f", "#c8ccd1"
COLORS = {"training": "#2f6db5", "validation": "#d97a26"}
MAX_BARS = 40


def charts(study: DataStudy) -> dict[str, Figure]:
    """Returns the figures by name."""
    return {
        "classes": classes(study),
        "sizes": sizes(study),
        "images": images(study),
        "grids": grids(study),
    }


def png(figure: Figure) -> bytes:
    """Returns a figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
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


def classes(study: DataStudy) -> Figure:
    """Returns the objects of each class; of many, the most and the fewest."""
    first = study.parts[0].dataset
    order = np.argsort(-class_counts(first), kind="stable")
    title = "Objects of each class"
    if len(order) > MAX_BARS:
        half = MAX_BARS // 2
        title += f", the {half} most and the {half} least frequent"
        order = np.concatenate([order[:half], order[-half:]])
    figure, (ax,) = _figure(10.0, 1.2 + 0.2 * len(order) * (1 + 0.4 * (len(study.parts) - 1)), 1)
    place = np.arange(len(order))[::-1]
    height = 0.8 / len(study.parts)
    for i, part in enumerate(study.parts):
        number = class_counts(part.dataset)[order]
        y = place + 0.4 - height * (i + 0.5)
        bars = ax.barh(y, number, height, color=COLORS[part.name], label=part.name)
        ax.bar_label(bars, number.tolist(), padding=4, fontsize=8)
    ax.set_yticks(place, [first.class_names[k] for k in order.tolist()])
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.margins(x=0.08)
    if len(study.parts) > 1:
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    _title(ax, title)
    return figure


def sizes(study: DataStudy) -> Figure:
    """Returns how large objects are, absolutely and relative to their image."""
    figure, (left, right) = _figure(10.0, 3.2, 2)
    edges = np.geomspace(2, 2048, 41).tolist()
    shares = np.geomspace(1e-5, 1, 41).tolist()
    for part in study.parts:
        rows = np.flatnonzero(part.objects.area > 0)
        area = part.objects.area[rows]
        whole = part.objects.sizes[part.objects.image[rows]].prod(axis=1)
        style = {"histtype": "step", "linewidth": 1.8, "color": COLORS[part.name]}
        weights = np.full(len(area), 100 / max(len(area), 1))
        left.hist(np.sqrt(area), edges, weights=weights, label=part.name, **style)
        right.hist(area / whole, shares, weights=weights, **style)
    left.axvline(16, color=GREY, linestyle="--", linewidth=1)
    absolute, relative = [4, 16, 64, 256, 1024], [1e-4, 1e-3, 0.01, 0.1, 1]
    for ax, ticks in ((left, absolute), (right, relative)):
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.legend(frameon=False, fontsize=9)
    _title(
        left,
        "Size of the objects",
        f"root of the mask's area, pixels at a short side of {study.short}",
        "% of the objects",
    )
    _title(right, "Share of the image", "area over the image's", "% of the objects")
    return figure


def images(study: DataStudy) -> Figure:
    """Returns how many objects images have, and how large images are."""
    figure, (left, right) = _figure(10.0, 3.2, 2)
    most = max(int(p.dataset.objects_per_image.max()) for p in study.parts)
    edges = np.linspace(-0.5, most + 0.5, min(most + 2, 42)).tolist()
    for part in study.parts:
        data, color = part.dataset, COLORS[part.name]
        number = data.objects_per_image
        weights = np.full(len(number), 100 / len(number))
        style = {"histtype": "step", "linewidth": 1.8, "color": color}
        left.hist(number, edges, weights=weights, label=part.name, **style)
        right.plot(data.widths, data.heights, "o", color=color, ms=4, alpha=0.35)
    left.legend(frameon=False, fontsize=9)
    limit = 1.05 * max(*right.get_xlim(), *right.get_ylim())
    right.plot([0, limit], [0, limit], color=GREY, linewidth=1, zorder=0)
    right.set(xlim=(0, limit), ylim=(0, limit))
    _title(left, "Objects in an image", "objects", "% of the images")
    _title(right, "Size of the images", "width, pixels", "height, pixels")
    return figure


def grids(study: DataStudy) -> Figure:
    """Returns the objects per level, and those that share a cell."""
    pairs = [("the config's", study.layout, study.parts[0].crowd)]
    if study.advice:
        pairs.append(("suggested", study.advice.layout, study.advice.crowd))
    figure, axes = _figure(10.0, 3.0, len(pairs))
    for ax, (name, layout, crowd) in zip(axes, pairs, strict=True):
        _levels(ax, name, layout, crowd)
    return figure


def _levels(ax: Axes, name: str, layout: Layout, crowd: Crowding) -> None:
    x = np.arange(len(layout.num_grids))
    ax.bar(x, crowd.objects, 0.7, color=COLORS["training"], label="alone in their cells")
    ax.bar(x, crowd.shared, 0.7, color="#b0413e", label="share a cell")
    names = [
        f"{grid}²\n{low}-{high}"
        for grid, (low, high) in zip(layout.num_grids, layout.scale_ranges, strict=True)
    ]
    ax.set_xticks(x, names, fontsize=8)
    ax.legend(frameon=False, fontsize=8.5)
    text = f"{name} grids: {100 * crowd.lost_share:.1f} % without a cell"
    _title(ax, text[0].upper() + text[1:], "grid, box side in pixels", "objects")
