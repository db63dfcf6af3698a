"""Two sets of predictions of the same images, figure by figure and image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solov2_jax.evaluation.coco import FIGURES, figure
from solov2_jax.tools.report.analysis import ImageRow
from solov2_jax.tools.report.study import ReportData

SHOWN = 10  # classes and images in the log


@dataclass(frozen=True)
class Change:
    """A figure of the first predictions (a) and of the second (b); -1: none."""

    name: str
    a: float
    b: float

    @property
    def difference(self) -> float:
        """Returns a - b; 0 where the figure does not exist."""
        return self.a - self.b if min(self.a, self.b) >= 0 else 0.0


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

    figures: list[Change]
    classes: list[Change]
    images: list[ImageChange]


def compare(a: ReportData, b: ReportData) -> Comparison:
    """Returns the comparison of two studies of the same truth."""
    names = [f"{kind}/{name}" for kind in ("segm", "bbox") for name in FIGURES]
    figures = [Change(n, a.metrics[n], b.metrics[n]) for n in names]
    classes = [Change(x.name, x.ap, y.ap) for x, y in zip(a.classes, b.classes, strict=True)]
    images = [ImageChange(x, y) for x, y in zip(a.images, b.images, strict=True)]
    return Comparison(
        figures,
        sorted(classes, key=lambda c: -abs(c.difference)),
        sorted(images, key=lambda c: (-abs(c.difference), c.a.image_id)),
    )


def comparison_lines(found: Comparison, a: str, b: str, files: Mapping[int, str]) -> list[str]:
    """Returns the lines of a table.

    Args:
      a, b: what to call the two.
      files: image id -> name.
    """
    lines = [f"a: {a}", f"b: {b}"]
    lines += _table("figure", found.figures)
    changed = [c for c in found.classes if c.difference]
    lines.append(f"{len(changed)} of {len(found.classes)} classes differ in mask AP")
    lines += _table("class", changed[:SHOWN]) if changed else []
    images = [c for c in found.images if c.difference]
    lines.append(
        f"{len(images)} of {len(found.images)} images differ in F1 (IoU 0.5, each from "
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


def _table(kind: str, changes: Sequence[Change]) -> list[str]:
    width = max(len(kind), *(len(c.name) for c in changes))
    lines = [f"{kind:{width}} {'a':>7} {'b':>7} {'a - b':>8}"]
    for c in changes:
        there = min(c.a, c.b) >= 0
        difference = f"{c.difference:+8.4f}" if there else f"{'-':>8}"
        lines.append(f"{c.name:{width}} {figure(c.a):>7} {figure(c.b):>7} {difference}")
    return lines
