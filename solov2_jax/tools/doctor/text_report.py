"""A data report as text for the console."""

from collections.abc import Sequence

import numpy as np

from solov2_jax.tools.doctor.data_report import VERDICTS, DataReport, Part
from solov2_jax.tools.doctor.findings import class_counts
from solov2_jax.tools.doctor.grids import Advice, table

WIDTH = 32  # of the longest bar
MAX_CLASSES = 30  # most and fewest objects; the others are in the page
# Square root of the mask's area, pixels of the network's input.
SIDES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, np.inf)


def text_report(report: DataReport) -> str:
    """Returns everything but the pictures."""
    blocks = [_part(part, report.short) for part in report.parts]
    if report.parts:
        blocks.append(_grids(report))
    if report.advice:
        blocks.append(_advice(report.advice))
    blocks.append(_findings(report))
    return "\n\n".join(blocks)


def _part(part: Part, short: int) -> str:
    data = part.dataset
    sizes = [f"{int(h)}x{int(w)}" for h, w in zip(data.heights, data.widths, strict=True)]
    common, count = np.unique(sizes, return_counts=True)
    shorter = np.minimum(data.heights, data.widths)
    number = np.percentile(data.objects_per_image, (50, 95, 100))
    sides = np.sqrt(part.objects.area[part.objects.area > 0])
    low, middle, high = np.percentile(sides, (5, 50, 95)) if len(sides) else (0, 0, 0)
    lines = [
        f"{part.name}: {data.annotation_file}",
        f"  {len(data)} images of {len(common)} sizes, most often {common[np.argmax(count)]} "
        f"({count.max()}); shorter side {shorter.min()} to {shorter.max()} pixels",
        f"  {len(data.labels)} objects of {len(data.class_names)} classes; per image: median "
        f"{number[0]:.0f}, 95th percentile {number[1]:.0f}, maximum {number[2]:.0f}",
        f"  object side at an input of {short} pixels: 5th percentile {low:.0f}, median "
        f"{middle:.0f}, 95th percentile {high:.0f}",
        "",
        *_bars(_side_rows(sides)),
        "",
        *_bars(_class_rows(part)),
    ]
    return "\n".join(lines)


def _side_rows(sides: np.ndarray) -> list[tuple[str, int]]:
    count, _ = np.histogram(sides, SIDES)
    names = [
        f"{low:.0f} to {high:.0f} px" if np.isfinite(high) else f"{low:.0f} px and more"
        for low, high in zip(SIDES[:-1], SIDES[1:], strict=True)
    ]
    return list(zip(names, count.tolist(), strict=True))


def _class_rows(part: Part) -> list[tuple[str, int]]:
    number = class_counts(part.dataset)
    order = np.argsort(-number, kind="stable").tolist()
    rows = [(part.dataset.class_names[k], int(number[k])) for k in order]
    if len(rows) <= MAX_CLASSES:
        return rows
    half = MAX_CLASSES // 2
    left = sum(n for _, n in rows[half:-half])
    middle = (f"({len(rows) - MAX_CLASSES} more classes)", left)
    return [*rows[:half], middle, *rows[-half:]]


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    most = max((n for name, n in rows if name[0] != "("), default=1) or 1
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, n in rows:
        bar = "" if name[0] == "(" else "#" * round(WIDTH * n / most)
        lines.append(f"  {name:{width}}  {n:6d}  {bar}".rstrip())
    return lines


def _grids(report: DataReport) -> str:
    lines = ["grid cells with the config's grids and scale ranges"]
    for part in report.parts:
        rows = table(report.layout, part.collisions)
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines.append(f"  {part.name}:")
        for row in rows:
            cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            lines.append("    " + "  ".join(cells).rstrip())
        collisions = part.collisions
        lines.append(
            f"    {len(collisions.without_cell)} objects without a cell of their own, "
            f"{len(collisions.out_of_range)} outside of all ranges"
        )
    return "\n".join(lines)


def _advice(advice: Advice) -> str:
    lines = ["suggested for the training data", *(f"  {r}" for r in advice.reasons)]
    return "\n".join([*lines, *(f"    {flag}" for flag in advice.overrides())])


def _findings(report: DataReport) -> str:
    lines = []
    for part, finding in report.sorted_findings():
        line = finding.line()
        lines.append(line.replace(": ", f": {part}: ", 1) if part else line)
    verdict = VERDICTS[report.verdict]
    return "\n".join([*lines, verdict[0].lower() + verdict[1:]])
