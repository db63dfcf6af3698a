"""The numbers of a run's `metrics.jsonl` as curves over the steps."""

import io
import os
import pathlib
from typing import Any

from PIL import Image

from solov2_jax.io import InputError
from solov2_jax.training.metric_files import read_metrics

# Title -> names in metrics.jsonl; a chart without any of them is left out.
CHARTS = {
    "losses": ("loss", "loss_ins", "loss_cate", "val/loss"),
    "mean IoU of masks in training": ("mean_iou", "val/mean_iou"),
    "AP of the evaluations": ("segm/AP", "segm/AP50", "bbox/AP"),
    "learning rate": ("learning_rate",),
}


def draw_curves(workdir: str | os.PathLike[str]) -> Image.Image:
    """Returns the curves of a run so far, as a picture that a notebook shows.

    Raises:
      InputError: without a readable line of metrics.
    """
    lines = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    charts = {}
    for title, names in CHARTS.items():
        curves = {name: _points(lines, name) for name in names}
        if nonempty := {name: curve for name, curve in curves.items() if curve[0]}:
            charts[title] = nonempty
    if not charts:
        raise InputError(
            f"{workdir}: metrics.jsonl has no line yet; train for train.log_every steps"
        )
    return _draw(charts)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values; null, a number that is not finite, is left out."""
    pairs = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw(curves_of: dict[str, dict[str, tuple[list[int], list[float]]]]) -> Image.Image:
    from solov2_jax.tools import charts  # matplotlib is slow, and only here

    figure, all_axes = charts.panels(4.2 * len(curves_of), 3.0, len(curves_of))
    for axes, (title, curves) in zip(all_axes, curves_of.items(), strict=True):
        colors = (charts.INK, *charts.COLORS)
        for color, (name, (steps, values)) in zip(colors, curves.items(), strict=False):
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, color=color, label=name, marker=marker, ms=3)
        charts.label(axes, title, "step")
        axes.grid(color=charts.GRID)
        axes.set(xlim=(0, None), ylim=(0, None))
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
