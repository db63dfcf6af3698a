"""Two sets of predictions of the same images, metric by metric and image by image."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from solov2_jax.evaluation.coco import format_metric, is_defined
from solov2_jax.tools.report.analysis import ImageRow
from solov2_jax.tools.report.report_data import ReportData

SHOWN = 10  # classes and images in the log


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
class ImageChange:
    """One image by both, each from its own best threshold on."""

    a: ImageRow
    b: ImageRow

    @property
    def difference(self) -> float:
        """Returns the difference of F1, a - b."""
        return self.a.f1 - self.b.f1


@dataclass(frozen=True)
class Comparison:
    """What changes from b to a; classes and images by the size of the change."""

    metrics: list[MetricChange]
    classes: list[MetricChange]
    images: list[ImageChange]


def compare(a: ReportData, b: ReportData) -> Comparison:
    """Returns the comparison of two reports on the same ground truth."""
    per_class = [f"segm/AP/{name}" for name in a.names]
    names = [name for name in a.metrics if name not in per_class]
    classes = [MetricChange(x.name, x.ap, y.ap) for x, y in zip(a.classes, b.classes, strict=True)]
    images = [ImageChange(x, y) for x, y in zip(a.images, b.images, strict=True)]
    return Comparison(
        [MetricChange(name, a.metrics[name], b.metrics[name]) for name in names],
        sorted(classes, key=lambda c: -abs(c.difference)),
        sorted(images, key=lambda c: (-abs(c.difference), c.a.image_id)),
    )


def comparison_lines(changes: Comparison, a: str, b: str, files: Mapping[int, str]) -> list[str]:
    """Returns the lines of a table.

    Args:
      a, b: what to call the two.
      files: image id -> name.
    """
    lines = [f"a: {a}", f"b: {b}", *_table("metric", changes.metrics)]
    classes = [c for c in changes.classes if c.difference]
    lines.append(f"{len(classes)} of {len(changes.classes)} classes differ in mask AP")
    lines += _table("class", classes[:SHOWN]) if classes else []
    images = [c for c in changes.images if c.difference]
    lines.append(
        f"{len(images)} of {len(changes.images)} images differ in F1 (IoU 0.5, each from "
        "its own best score on)"
    )
    if images:
        lines.append(f"{'F1 a':>7} {'b':>7} {'a - b':>8}  found, false a and b; image")
    for c in images[:SHOWN]:
        counts = f"{c.a.right}, {c.a.false} and {c.b.right}, {c.b.false}"
        lines.append(
            f"{c.a.f1:7.3f} {c.b.f1:7.3f} {c.difference:+8.3f}  {counts} of "
            f"{c.a.objects}; {files[c.a.image_id]}"
        )
    return lines


def _table(kind: str, changes: Sequence[MetricChange]) -> list[str]:
    width = max(len(kind), *(len(c.name) for c in changes))
    lines = [f"{kind:{width}} {'a':>7} {'b':>7} {'a - b':>8}"]
    for c in changes:
        both = is_defined(c.a) and is_defined(c.b)
        difference = f"{c.difference:+.4f}" if both else "-"
        values = f"{format_metric(c.a):>7} {format_metric(c.b):>7}"
        lines.append(f"{c.name:{width}} {values} {difference:>8}")
    return lines


def write_comparison(changes: Comparison, folder: Path, files: Mapping[int, str]) -> None:
    """Writes every change as csv, also those that the log leaves out."""
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric or class", "a", "b", "a - b"])
        for c in (*changes.metrics, *changes.classes):
            values = [value if is_defined(value) else "" for value in (c.a, c.b)]
            writer.writerow([c.name, *values, c.difference])
    with (folder / "comparison_images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = "f1 right false missed".split()
        writer.writerow(["image_id", "file", *(f"{key} {side}" for side in "ab" for key in keys)])
        for c in changes.images:
            values = [getattr(row, key) for row in (c.a, c.b) for key in keys]
            writer.writerow([c.a.image_id, files[c.a.image_id], *values])
