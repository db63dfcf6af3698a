"""All that the doctor finds out about the training and the validation data."""

import dataclasses
from typing import Any

import numpy as np

from solov2_jax.data.coco import CocoDataset, missing_files, read_coco
from solov2_jax.tools.doctor.files import FileFacts, file_findings, leaked, read_files
from solov2_jax.tools.doctor.findings import (
    ERROR,
    NOTE,
    WARNING,
    DataLimits,
    Finding,
    class_findings,
    empty_findings,
    limit_findings,
    object_findings,
    one_finding,
    training_limit_findings,
    worst,
)
from solov2_jax.tools.doctor.grids import (
    Advice,
    GridCollisions,
    Layout,
    advise,
    grid_collisions,
    grid_findings,
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
            dataset = read_coco(*files, categories=categories)
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
            advice = advise(trained.dataset, trained.objects, settings.layout, settings.short)
    if trained and other:
        findings += leaked(trained.dataset, _facts(trained), other.dataset, _facts(other))
    return DataReport(parts, settings.layout, settings.short, findings, advice)


def _facts(part: Part) -> list[tuple[int, FileFacts]]:
    return list(zip(part.indices.tolist(), part.files, strict=True))


def _part(name: str, dataset: CocoDataset, settings: Settings) -> Part:
    """Returns a part with its own findings."""
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
    head, targets = config.model.ins_head, config.targets
    ranges = tuple((low, high) for low, high in targets.scale_ranges)
    layout = Layout(tuple(head.num_grids), ranges, targets.sigma)
    input_ = config.input
    return Settings(
        short=input_.min_size_test,
        max_size=input_.max_size_test,
        layout=layout,
        keep_empty=config.data.keep_empty,
        max_images=max_images,
        limits=DataLimits(
            max_instances=config.data.max_instances,
            max_pairs=targets.max_pairs,
            nms_pre=config.test.nms_pre,
            max_per_image=config.test.max_per_image,
            max_detections=config.eval.max_detections,
        ),
    )
