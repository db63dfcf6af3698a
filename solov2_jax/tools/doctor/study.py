"""All that is found out about the training and the validation data."""

import dataclasses
from typing import Any

import numpy as np

from solov2_jax.data.coco import CocoDataset, missing_files, read_coco
from solov2_jax.tools.doctor.advice import Advice, advise
from solov2_jax.tools.doctor.files import FileFacts, file_findings, leaked, read_files
from solov2_jax.tools.doctor.findings import ERROR, NOTE, Finding, found, worst
from solov2_jax.tools.doctor.grids import Crowding, Layout, crowding, grid_findings
from solov2_jax.tools.doctor.measure import MeasuredObjects, measure
from solov2_jax.tools.doctor.objects import class_findings, empty_findings, object_findings


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the validation data."""

    name: str
    dataset: CocoDataset
    indices: np.ndarray  # int, the images that were looked at
    files: list[FileFacts]  # of `indices`
    objects: MeasuredObjects
    crowd: Crowding
    findings: list[Finding]

    def readable(self) -> np.ndarray:
        """Returns the images whose file agrees with the json, int."""
        size = zip(self.dataset.heights, self.dataset.widths, strict=True)
        stated = dict(enumerate(size))
        pairs = zip(self.indices.tolist(), self.files, strict=True)
        return np.array(
            [i for i, f in pairs if not f.problem and (f.height, f.width) == stated[i]],
            int,
        )


@dataclasses.dataclass(frozen=True)
class DataStudy:
    """What the doctor says."""

    parts: list[Part]
    layout: Layout  # the config's
    short: int  # shorter side that objects are measured at, pixels
    findings: list[Finding]  # about both parts, or instead of them
    advice: Advice | None

    @property
    def verdict(self) -> str:
        """The gravest level of all findings."""
        every = [f for part in self.parts for f in part.findings]
        return worst([*self.findings, *every])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the data is looked at with; sizes in pixels."""

    short: int
    max_size: int
    layout: Layout
    keep_empty: bool
    max_images: int = 0  # looked at in each part, spread evenly; 0: all


def study(train: tuple[str, str], val: tuple[str, str] | None, settings: Settings) -> DataStudy:
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
            findings += found(ERROR, str(error))
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
        sides = (_facts(p) for p in (trained, other))
        (a, b), (x, y) = (trained, other), sides
        findings += leaked(a.dataset, x, b.dataset, y)
    return DataStudy(parts, settings.layout, settings.short, findings, advice)


def _facts(part: Part) -> list[tuple[int, FileFacts]]:
    return list(zip(part.indices.tolist(), part.files, strict=True))


def _part(name: str, dataset: CocoDataset, settings: Settings) -> Part:
    """Returns a part with its own findings."""
    indices = spread(len(dataset), settings.max_images)
    files = read_files(dataset, indices.tolist())
    objects = measure(dataset, indices.tolist(), settings.short, settings.max_size)
    crowd = crowding(objects, settings.layout)
    findings = [
        *file_findings(dataset, indices.tolist(), files),
        *object_findings(dataset, objects),
        *grid_findings(objects, crowd),
    ]
    if name == "training":
        findings += empty_findings(dataset, settings.keep_empty)
    if len(indices) < len(dataset):
        text = f"looked at {len(indices)} of {len(dataset)} images (--max_images)"
        findings += found(NOTE, text)
    return Part(name, dataset, indices, files, objects, crowd, findings)


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
        input_.min_size_test,
        input_.max_size_test,
        layout,
        config.data.keep_empty,
        max_images,
    )
