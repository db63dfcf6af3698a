"""Why AP is 0, in words: wrong classes, wrong masks, or no hit of one size."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.evaluation.coco import SIZES, CocoEvaluator
from solov2_jax.evaluation.evaluate import FinishedEvaluation

Records = Sequence[Mapping[str, Any]]

RIGHT_IOU = 0.5  # from here on, a mask is that object's
_rle: Any = coco_mask  # its type stubs are narrower than what it takes

log = logging.getLogger(__name__)


def log_diagnosis(evaluation: FinishedEvaluation) -> None:
    """Logs why metrics of an evaluation are 0; for `eval.reports`."""
    for line in diagnose(evaluation.evaluator, evaluation.metrics):
        log.info("%s", line)


def diagnose(evaluator: CocoEvaluator, metrics: Mapping[str, float]) -> list[str]:
    """Returns a line for each reason why segm/AP or AP of one size is 0."""
    annotations, results = evaluator.counted()
    if not annotations or not results:
        return []  # the evaluator says so
    if metrics["segm/AP"] == 0:
        return [_nothing_right(annotations, results)]
    zero = [size for size in SIZES if metrics.get(f"segm/AP{size}") == 0]
    return _sizes_without_hit(zero, annotations, results) if zero else []


def image_overlaps(
    annotations: Records, results: Records
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields each image's mask IoU float64 [D, G], whatever the classes.

    As (rows of `results` int64 [D], best score first; rows of `annotations` int64 [G];
    IoU). With a crowd, IoU is the share of the detection that lies in it.
    """
    of_image: dict[int, tuple[list[int], list[int]]] = {}
    for part, records in enumerate((results, annotations)):
        for row, record in enumerate(records):
            of_image.setdefault(record["image_id"], ([], []))[part].append(row)
    for detections, objects in (of_image[i] for i in sorted(of_image)):
        detections.sort(key=lambda row: -results[row]["score"])
        iou = np.zeros((len(detections), len(objects)))
        if iou.size:
            masks = [results[row]["segmentation"] for row in detections]
            outlines = [annotations[row]["segmentation"] for row in objects]
            crowd = [int(annotations[row]["iscrowd"]) for row in objects]
            iou = np.asarray(_rle.iou(masks, outlines, crowd))
        yield np.array(detections, int), np.array(objects, int), iou


def _nothing_right(annotations: Records, results: Records) -> str:
    """Returns why no detection is right at all: the classes, or the masks."""
    best = np.zeros(len(results))
    for detections, _, iou in image_overlaps(annotations, results):
        best[detections] = iou.max(axis=1, initial=0)
    if fitting := int((best >= RIGHT_IOU).sum()):
        return (
            f"segm/AP is 0, but {fitting} of {len(results)} predictions have a mask IoU "
            "of 0.5 or more with an object of another class: the masks are right and "
            "the classes are not; compare category ids and the order of the classes"
        )
    return (
        f"segm/AP is 0: not one of {len(results)} predictions has a mask IoU of 0.5 with "
        f"an object of any class, the best has {best.max():.2f}; weights that are not "
        "trained look like this, and so do masks of other images"
    )


def _sizes_without_hit(sizes: Sequence[str], annotations: Records, results: Records) -> list[str]:
    """Returns a line for each size range in which nothing was detected."""
    area = np.array([a["area"] for a in annotations], float)
    predicted = np.array([_rle.area(r["segmentation"]) for r in results], float)
    crowd = np.array([a["iscrowd"] for a in annotations], bool)
    category = [np.array([r["category_id"] for r in rows]) for rows in (results, annotations)]
    best = np.zeros(len(annotations))
    for detections, objects, iou in image_overlaps(annotations, results):
        same = category[0][detections][:, None] == category[1][objects]
        best[objects] = np.where(same, iou, 0).max(axis=0, initial=0)
    lines = []
    for size in sizes:
        low, high, words = SIZES[size]
        of_size = (area >= low) & (area <= high) & ~crowd
        count = int(((predicted >= low) & (predicted <= high)).sum())
        lines.append(
            f"AP{size} is 0: {int(of_size.sum())} annotated objects are {words} pixels and "
            f"{count} predictions are; the largest mask IoU of such an object with a "
            f"prediction is {best[of_size].max():.2f}"
        )
    return lines
