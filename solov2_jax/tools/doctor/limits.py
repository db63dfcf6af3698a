"""DataLimits of the configuration that a data set reaches, each with the key to raise."""

import dataclasses

import numpy as np

from solov2_jax.data.coco import CocoDataset
from solov2_jax.tools.doctor.findings import WARNING, Finding, one_finding, share


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
    objects = dataset.objects_per_image
    per_class = _most_of_one_class(dataset)
    return [
        *_over(
            objects,
            limits.max_per_image,
            "images have more objects than detections are kept",
            "test.max_per_image",
        ),
        *_over(
            objects,
            limits.nms_pre,
            "images have more objects than candidates enter NMS",
            "test.nms_pre",
        ),
        *_over(
            per_class,
            limits.max_detections,
            "images have more objects of one class than detections count in AP: even perfect "
            "predictions would score less than 1",
            "eval.max_detections",
        ),
    ]


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
    over = np.flatnonzero(numbers > limit)
    if not over.size:
        return []
    most = int(numbers.max())
    text = f"{share(len(over), len(numbers))} {text}, up to {most}: set {key}={most}, not {limit}"
    return one_finding(WARNING, text)


def _most_of_one_class(dataset: CocoDataset) -> np.ndarray:
    """Returns how many objects of its most frequent class each image has, int [N]."""
    classes = len(dataset.class_names)
    image = np.repeat(np.arange(len(dataset)), dataset.objects_per_image)
    keys, counts = np.unique(image * classes + dataset.labels, return_counts=True)
    most = np.zeros(len(dataset), int)
    np.maximum.at(most, keys // max(classes, 1), counts)
    return most
