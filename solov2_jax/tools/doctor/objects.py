"""What is wrong with annotations, from the measured objects."""

from collections.abc import Sequence

import numpy as np

from solov2_jax.data.coco import DROPPED, CocoDataset
from solov2_jax.tools.doctor.findings import ERROR, NOTE, WARNING, Finding, one_finding, share
from solov2_jax.tools.doctor.measure import MeasuredObjects

# A mask with fewer pixels at a quarter of the size hardly teaches anything.
TINY = 4
# An annotated box that disagrees with the mask: its IoU with the mask's own box is
# below this, and a side is off by more pixels (of the network's input) than that.
BOX_IOU, BOX_PIXELS = 0.8, 4.0
# Outlines may leave the image by this share of its longer side before it is told.
BEYOND = 0.01


def object_findings(dataset: CocoDataset, objects: MeasuredObjects) -> list[Finding]:
    """Returns broken outlines, wrong boxes, doubles, vanishing masks."""
    name = _Names(dataset, objects)
    findings = dropped_findings(dataset)
    total = len(objects.image)
    if objects.damaged:
        text = f"{len(objects.damaged)} annotations have damaged run lengths"
        findings += one_finding(ERROR, text, objects.damaged)
    for level, rows, text in (
        (
            WARNING,
            np.flatnonzero(objects.crossing),
            "objects have an outline that crosses itself",
        ),
        (
            NOTE,
            np.flatnonzero(objects.outside > BEYOND * objects.sizes.max()),
            "objects have an outline that leaves the image",
        ),
        (
            WARNING,
            wrong_boxes(objects),
            "objects have a box that disagrees with their mask",
        ),
        (
            WARNING,
            np.flatnonzero(objects.quarter == 0),
            "objects have no pixel left at a quarter of the input's size: their masks "
            "are empty in training",
        ),
        (
            WARNING,
            np.flatnonzero((objects.quarter > 0) & (objects.quarter < TINY)),
            f"objects have fewer than {TINY} pixels at a quarter of the input's size",
        ),
    ):
        if len(rows):
            text = f"{share(len(rows), total)} {text}"
            images = objects.image[rows].tolist()
            findings += one_finding(level, text, name(rows), images)
    if objects.twins:
        rows = np.array(objects.twins)[:, 1]
        text = f"{share(len(rows), total)} objects are annotated twice"
        findings += one_finding(WARNING, text, name(rows), objects.image[rows].tolist())
    return findings


class _Names:
    """Names objects by image and annotation id."""

    def __init__(self, dataset: CocoDataset, objects: MeasuredObjects):
        self.dataset, self.objects = dataset, objects

    def __call__(self, rows: np.ndarray) -> list[str]:
        data, objects = self.dataset, self.objects
        return [
            f"{data.file_names[objects.image[row]]} "
            f"(annotation {data.annotation_ids[objects.index[row]]})"
            for row in rows[:12]
        ]


def dropped_findings(dataset: CocoDataset) -> list[Finding]:
    """Returns what reading the json dropped."""
    findings = []
    for key, text in DROPPED.items():
        number = dataset.counts.get(key, 0)
        level = NOTE if key in ("crowds", "derived_boxes") else WARNING
        if number:
            findings += one_finding(level, f"{number} {text}")
    return findings


def wrong_boxes(objects: MeasuredObjects) -> np.ndarray:
    """Returns the rows whose annotated box does not fit their mask."""
    a, b = objects.box, objects.tight
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    both = np.clip(high - low, 0, None).prod(axis=1)
    area = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    union = area[0] + area[1] - both
    off = np.abs(a - b).max(axis=1, initial=0)
    bad = (both < BOX_IOU * union) & (off > BOX_PIXELS) & (objects.area > 0)
    return np.flatnonzero(bad)


def class_findings(train: CocoDataset, val: CocoDataset | None) -> list[Finding]:
    """Returns classes without objects, and how unequal they are."""
    number = class_counts(train)
    names = np.array(train.class_names)
    findings: list[Finding] = []
    crowds = crowd_warning(train)
    if not number.sum():
        return one_finding(ERROR, f"no object to train on{crowds and ': '}{crowds}")
    if crowds:
        findings += one_finding(WARNING, crowds)
    shared, count = np.unique(names, return_counts=True)
    if (several := shared[count > 1]).size:
        text = f"{len(several)} names stand for several categories"
        findings += one_finding(WARNING, text, several.tolist())
    if (none := names[number == 0]).size:
        text = f"{share(len(none), len(names))} classes have no object to train on"
        findings += one_finding(WARNING, text, none.tolist())
    few = names[(number > 0) & (number < 20)]
    if few.size:
        text = f"{share(len(few), len(names))} classes have fewer than 20 objects"
        findings += one_finding(NOTE, text, few.tolist())
    if val is not None and not len(val.labels):
        crowds = crowd_warning(val)
        text = "the validation data has no object: AP is undefined, so no checkpoint is the best"
        findings += one_finding(WARNING, f"{text}{crowds and '; '}{crowds}")
    elif val is not None:
        unseen = names[(class_counts(val) > 0) & (number == 0)]
        if unseen.size:
            text = "classes are only in the validation data"
            findings += one_finding(WARNING, f"{len(unseen)} {text}", unseen.tolist())
    return findings


def crowd_warning(dataset: CocoDataset) -> str:
    """Returns why little or nothing is learned if most annotations are crowds, or ""."""
    crowds, total = dataset.counts["crowds"], dataset.counts["annotations"]
    if 2 * crowds <= total:
        return ""
    return (
        f"{crowds} of {total} annotations have iscrowd 1 and are not trained on; some "
        "annotation tools write that for every brush or SAM mask: set iscrowd to 0 where "
        "an annotation is one object"
    )


def class_counts(dataset: CocoDataset) -> np.ndarray:
    """Returns the number of objects of each class, int [K]."""
    return np.bincount(dataset.labels, minlength=len(dataset.class_names))


def empty_findings(dataset: CocoDataset, keep_empty: bool) -> list[Finding]:
    """Returns how many images have no object."""
    empty = int((dataset.objects_per_image == 0).sum())
    if not empty:
        return []
    what = "trained on as negatives" if keep_empty else "left out (data.keep_empty)"
    text = f"{share(empty, len(dataset))} images have no object: {what}"
    return one_finding(NOTE, text)


def percentiles(values: np.ndarray, at: Sequence[int]) -> list[float]:
    """Returns percentiles, zeros if there is nothing."""
    return np.percentile(values, at).tolist() if len(values) else [0.0] * len(at)
