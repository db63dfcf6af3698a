"""What is wrong with annotations, in one form for console, page and log."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.data.coco import DROPPED, CocoDataset
from solov2_jax.tools.doctor.measure import MeasuredObjects

# Training may not start; look at it; good to know.
ERROR, WARNING, NOTE = "error", "warning", "note"
MAX_EXAMPLES = 12  # kept per finding
# A mask with fewer pixels at a quarter of the size hardly teaches anything.
TINY = 4
# An annotated box that disagrees with the mask: its IoU with the mask's own box is
# below this, and a side is off by more pixels (of the network's input) than that.
BOX_IOU, BOX_PIXELS = 0.8, 4.0
# Outlines may leave the image by this share of its longer side before it is told.
BEYOND = 0.01
FEW = 20  # objects of a class


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of problem, with how often and where."""

    level: str
    text: str
    examples: tuple[str, ...] = ()
    images: tuple[int, ...] = ()  # indices in the data set, for pictures

    def line(self) -> str:
        """Returns the finding as one line."""
        where = f": {', '.join(self.examples[:5])}" if self.examples else ""
        more = ", ..." if len(self.examples) > 5 else ""
        return f"{self.level}: {self.text}{where}{more}"


def one_finding(
    level: str, text: str, examples: Sequence[str] = (), images: Sequence[int] = ()
) -> list[Finding]:
    """Returns one finding; texts name the count themselves."""
    kept = tuple(examples[:MAX_EXAMPLES])
    return [Finding(level, text, kept, tuple(dict.fromkeys(images))[:MAX_EXAMPLES])]


def counted(
    level: str,
    number: int,
    text: str,
    examples: Sequence[str] = (),
    images: Sequence[int] = (),
    *,
    of: int = 0,
) -> list[Finding]:
    """Returns the finding that a number of things (of so many) are so; none for 0."""
    count = share(number, of) if of else str(number)
    return one_finding(level, f"{count} {text}", examples, images) if number else []


def worst(findings: Sequence[Finding]) -> str:
    """Returns the gravest level, NOTE if there is none."""
    levels = {f.level for f in findings}
    return next((level for level in (ERROR, WARNING) if level in levels), NOTE)


def share(part: int, of: int) -> str:
    """Returns e.g. "3 of 40 (7.5 %)"."""
    return f"{part} of {of} ({100 * part / of:.1f} %)" if of else f"{part} of 0"


# --- Objects -------------------------------------------------------------------------


def object_findings(dataset: CocoDataset, objects: MeasuredObjects) -> list[Finding]:
    """Returns broken outlines, wrong boxes, doubles, vanishing masks."""
    findings = dropped_findings(dataset)
    text = "annotations have damaged run lengths"
    findings += counted(ERROR, len(objects.damaged), text, objects.damaged)
    beyond = objects.outside > BEYOND * objects.sizes.max()
    gone, tiny = objects.quarter == 0, (objects.quarter > 0) & (objects.quarter < TINY)
    twins = np.array([b for _, b in objects.twins], int)
    for level, rows, text in (
        (WARNING, np.flatnonzero(objects.crossing), "have an outline that crosses itself"),
        (NOTE, np.flatnonzero(beyond), "have an outline that leaves the image"),
        (WARNING, wrong_boxes(objects), "have a box that disagrees with their mask"),
        (
            WARNING,
            np.flatnonzero(gone),
            "have no pixel left at a quarter of the input's size: their masks are empty in "
            "training",
        ),
        (
            WARNING,
            np.flatnonzero(tiny),
            f"have fewer than {TINY} pixels at a quarter of the input's size",
        ),
        (WARNING, twins, "are annotated twice"),
    ):
        names = [_name(dataset, objects, row) for row in rows[:MAX_EXAMPLES].tolist()]
        images, total = objects.image[rows].tolist(), len(objects.image)
        findings += counted(level, len(rows), f"objects {text}", names, images, of=total)
    return findings


def _name(dataset: CocoDataset, objects: MeasuredObjects, row: int) -> str:
    annotation = dataset.annotation_ids[objects.index[row]]
    return f"{dataset.file_names[objects.image[row]]} (annotation {annotation})"


def dropped_findings(dataset: CocoDataset) -> list[Finding]:
    """Returns what reading the json dropped."""
    findings = []
    for key, text in DROPPED.items():
        level = NOTE if key in ("crowds", "derived_boxes") else WARNING
        findings += counted(level, dataset.counts.get(key, 0), text)
    return findings


def wrong_boxes(objects: MeasuredObjects) -> np.ndarray:
    """Returns the rows whose annotated box does not fit their mask."""
    a, b = objects.box, objects.tight
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    both = np.clip(high - low, 0, None).prod(axis=1)
    area = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    union = area[0] + area[1] - both
    off = np.abs(a - b).max(axis=1, initial=0)
    return np.flatnonzero((both < BOX_IOU * union) & (off > BOX_PIXELS) & (objects.area > 0))


# --- Classes and images --------------------------------------------------------------


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
    several = shared[count > 1].tolist()
    findings += counted(WARNING, len(several), "names are shared by several categories", several)
    none, few = names[number == 0].tolist(), names[(number > 0) & (number < FEW)].tolist()
    text = "classes have no object to train on"
    findings += counted(WARNING, len(none), text, none, of=len(names))
    text = f"classes have fewer than {FEW} objects"
    findings += counted(NOTE, len(few), text, few, of=len(names))
    if val is not None and not len(val.labels):
        crowds = crowd_warning(val)
        text = "the validation data has no object: AP is undefined, so no checkpoint is the best"
        findings += one_finding(WARNING, f"{text}{crowds and '; '}{crowds}")
    elif val is not None:
        unseen = names[(class_counts(val) > 0) & (number == 0)].tolist()
        text = "classes are only in the validation data"
        findings += counted(WARNING, len(unseen), text, unseen)
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
    what = "trained on as negatives" if keep_empty else "left out (data.keep_empty)"
    return counted(NOTE, empty, f"images have no object: {what}", of=len(dataset))


# --- Limits of the configuration -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataLimits:
    """Keys of the configuration that bound what an image may hold."""

    max_instances: int = 0  # padded objects; 0: as many as the data has
    max_pairs: int = 256  # (cell, object) pairs
    nms_pre: int = 500  # candidates that enter NMS
    max_per_image: int = 100  # detections kept
    max_detections: int = 100  # that AP counts, per class


def limit_findings(dataset: CocoDataset, limits: DataLimits) -> list[Finding]:
    """Returns where images have more objects than are predicted or counted."""
    objects, kept, candidates = dataset.objects_per_image, limits.max_per_image, limits.nms_pre
    text = "images have more objects than detections are kept"
    findings = _over(objects, kept, text, "test.max_per_image")
    text = "images have more objects than candidates enter NMS"
    findings += _over(objects, candidates, text, "test.nms_pre")
    text = (
        "images have more objects of one class than detections count in AP: even perfect "
        "predictions would score less than 1"
    )
    of_class, counted = _most_of_one_class(dataset), limits.max_detections
    return findings + _over(of_class, counted, text, "eval.max_detections")


def training_limit_findings(
    dataset: CocoDataset, limits: DataLimits, pairs: np.ndarray
) -> list[Finding]:
    """Returns where objects of the training images have no place in a batch.

    Args:
      pairs: (cell, object) pairs of the images that were looked at, int.
    """
    findings = []
    if limits.max_instances:
        text = "images have more objects than a batch holds: the others are not trained on"
        objects = dataset.objects_per_image
        findings += _over(objects, limits.max_instances, text, "data.max_instances")
    text = "images have more pairs of a grid cell and an object than are trained on at a time"
    return findings + _over(pairs, limits.max_pairs, text, "targets.max_pairs")


def _over(numbers: np.ndarray, limit: int, text: str, key: str) -> list[Finding]:
    """Returns a warning if some of the numbers, one per image, are above a limit."""
    most = int(numbers.max(initial=0))
    text = f"{text}, up to {most}: set {key}={most}, not {limit}"
    return counted(WARNING, int((numbers > limit).sum()), text, of=len(numbers))


def _most_of_one_class(dataset: CocoDataset) -> np.ndarray:
    """Returns how many objects of its most frequent class each image has, int [N]."""
    classes = len(dataset.class_names)
    image = np.repeat(np.arange(len(dataset)), dataset.objects_per_image)
    keys, counts = np.unique(image * classes + dataset.labels, return_counts=True)
    most = np.zeros(len(dataset), int)
    np.maximum.at(most, keys // max(classes, 1), counts)
    return most
