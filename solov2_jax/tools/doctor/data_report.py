"""All that the doctor finds out about the training and the validation data, and as text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2_jax.config import is_used
from solov2_jax.data.coco import CocoDataset, missing_files, read_coco
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.tools.doctor.files import FileFacts, file_findings, leaked, read_files
from solov2_jax.tools.doctor.findings import (
    ERROR,
    NOTE,
    WARNING,
    DataLimits,
    Finding,
    class_counts,
    class_findings,
    empty_findings,
    limit_findings,
    object_findings,
    one_finding,
    training_limit_findings,
    worst,
)
from solov2_jax.tools.doctor.grids import (
    RECIPE,
    Advice,
    GridCollisions,
    Layout,
    advise,
    grid_collisions,
    grid_findings,
    table,
)
from solov2_jax.tools.doctor.measure import MeasuredObjects, measure


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the validation data."""

    name: str
    dataset: CocoDataset
    indices: np.ndarray  # int, the images that were looked at
    files: list[FileFacts]  # of `indices`
    objects: MeasuredObjects
    collisions: GridCollisions
    findings: list[Finding]

    def readable(self) -> np.ndarray:
        """Returns the images whose file agrees with the json, int."""
        heights, widths = self.dataset.heights[self.indices], self.dataset.widths[self.indices]
        agrees = [
            not f.problem and (f.height, f.width) == (height, width)
            for f, height, width in zip(self.files, heights, widths, strict=True)
        ]
        return self.indices[agrees]


WIDTH = 32  # of the longest bar
MAX_CLASSES = 30  # most and fewest objects; the others are in the page
# Square root of the mask's area, pixels of the network's input.
SIDES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, np.inf)
VERDICTS = {
    ERROR: "Training cannot start before the errors are fixed",
    WARNING: "Training may start; look at the warnings",
    NOTE: "Training may start",
}


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What the doctor says."""

    parts: list[Part]
    layout: Layout  # the config's
    short: int  # shorter side that objects are measured at, pixels
    findings: list[Finding]  # about both parts, or instead of them
    advice: Advice | None

    @property
    def verdict(self) -> str:
        """The gravest level of all findings."""
        return worst([finding for _, finding in self.sorted_findings()])

    def sorted_findings(self) -> list[tuple[str, Finding]]:
        """Returns (part or "", finding), the gravest first."""
        groups = [("", self.findings), *((part.name, part.findings) for part in self.parts)]
        every = [(name, finding) for name, findings in groups for finding in findings]
        return sorted(every, key=lambda pair: (ERROR, WARNING, NOTE).index(pair[1].level))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the data is looked at with; sizes in pixels."""

    short: int
    max_size: int
    layout: Layout
    keep_empty: bool
    max_images: int = 0  # looked at in each part, spread evenly; 0: all
    limits: DataLimits = DataLimits()
    pixels: PixelFormat = RGB
    boxes: bool = True  # whether objects with a box only are trained on
    unused: frozenset[str] = frozenset()  # keys that are not suggested


def examine(train: tuple[str, str], val: tuple[str, str] | None, settings: Settings) -> DataReport:
    """Returns what is found about (image folder, instances json) pairs.

    What makes reading impossible is a finding too, and ends the part.
    """
    parts: list[Part] = []
    findings: list[Finding] = []
    categories: dict[int, str] | None = None
    for name, files in (("training", train), ("validation", val)):
        if files is None:
            continue
        try:
            boxes = settings.boxes and name == "training"
            dataset = read_coco(*files, categories=categories, boxes=boxes)
            missing_files(dataset)  # raises without the folder
        except ValueError as error:
            findings += one_finding(ERROR, str(error))
            continue
        parts.append(_part(name, dataset, settings))
        categories = categories or dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    trained = next((p for p in parts if p.name == "training"), None)
    other = next((p for p in parts if p.name == "validation"), None)
    advice = None
    if trained:
        val_data = other.dataset if other else None
        findings += class_findings(trained.dataset, val_data)
        if len(trained.dataset.labels):
            layout, short, unused = settings.layout, settings.short, settings.unused
            advice = advise(trained.dataset, trained.objects, layout, short, unused=unused)
    if trained and other:
        findings += leaked(trained.dataset, _facts(trained), other.dataset, _facts(other))
    return DataReport(parts, settings.layout, settings.short, findings, advice)


def _facts(part: Part) -> list[tuple[int, FileFacts]]:
    return list(zip(part.indices.tolist(), part.files, strict=True))


def _part(name: str, dataset: CocoDataset, settings: Settings) -> Part:
    """Returns a part with its own findings."""
    dataset = dataclasses.replace(dataset, pixels=settings.pixels)
    indices = spread(len(dataset), settings.max_images)
    files = read_files(dataset, indices.tolist())
    training = name == "training"
    objects, collisions, findings = examine_objects(dataset, indices, settings, training=training)
    findings = file_findings(dataset, indices.tolist(), files) + findings
    if len(indices) < len(dataset):
        text = f"looked at {len(indices)} of {len(dataset)} images (--max_images)"
        findings += one_finding(NOTE, text)
    return Part(
        name=name,
        dataset=dataset,
        indices=indices,
        files=files,
        objects=objects,
        collisions=collisions,
        findings=findings,
    )


def examine_objects(
    dataset: CocoDataset, indices: np.ndarray, settings: Settings, *, training: bool
) -> tuple[MeasuredObjects, GridCollisions, list[Finding]]:
    """Returns what the annotations alone tell about some images, int."""
    objects = measure(dataset, indices.tolist(), settings.short, settings.max_size)
    collisions = grid_collisions(objects, settings.layout)
    findings = [
        *object_findings(dataset, objects),
        *grid_findings(objects, collisions),
        *limit_findings(dataset, settings.limits),
    ]
    if training:
        findings += empty_findings(dataset, settings.keep_empty)
        findings += training_limit_findings(dataset, settings.limits, collisions.pairs)
    return objects, collisions, findings


def spread(number: int, limit: int) -> np.ndarray:
    """Returns at most `limit` of 0..number-1, evenly spread, int; 0: all."""
    if not limit or limit >= number:
        return np.arange(number)
    return np.unique(np.linspace(0, number - 1, limit).round().astype(int))


def settings_of(config: Any, max_images: int = 0) -> Settings:
    """Returns the settings that a config describes."""
    from solov2_jax.data.build import pixel_format  # brings grain and JAX; `--help` has neither

    head, targets = config.model.ins_head, config.targets
    ranges = tuple((low, high) for low, high in targets.scale_ranges)
    layout = Layout(tuple(head.num_grids), ranges, targets.sigma)
    input_, keys = config.input, (*RECIPE, "input.min_sizes_train", "input.max_size_train")
    unused = frozenset(key for key in keys if not is_used(config, key))
    if unused & RECIPE or config.optim.name != "sgd" or config.optim.reference_batch_size:
        unused |= RECIPE  # a rate of SGD's, by steps, is no advice for another recipe
    return Settings(
        short=input_.min_size_test,
        max_size=input_.max_size_test,
        layout=layout,
        keep_empty=config.data.keep_empty,
        max_images=max_images,
        pixels=pixel_format(config),
        boxes=config.loss.box_supervised,
        unused=unused,
        limits=DataLimits(
            max_instances=config.data.max_instances,
            max_pairs=targets.max_pairs,
            nms_pre=config.test.nms_pre,
            max_per_image=config.test.max_per_image,
            max_detections=config.eval.max_detections,
        ),
    )


# --- The report as text --------------------------------------------------------------


def text_report(report: DataReport) -> str:
    """Returns everything but the pictures."""
    blocks = [_part_text(part, report.short) for part in report.parts]
    if report.parts:
        blocks.append(_grids(report))
    if report.advice:
        lines = ["suggested for the training data", *(f"  {r}" for r in report.advice.reasons)]
        lines += [f"    {flag}" for flag in report.advice.overrides()]
        blocks.append("\n".join(lines))
    blocks.append(_findings(report))
    return "\n\n".join(blocks)


def _part_text(part: Part, short: int) -> str:
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


def _findings(report: DataReport) -> str:
    lines = []
    for part, finding in report.sorted_findings():
        line = finding.line()
        lines.append(line.replace(": ", f": {part}: ", 1) if part else line)
    verdict = VERDICTS[report.verdict]
    return "\n".join([*lines, verdict[0].lower() + verdict[1:]])
