"""Pascal VOC's average precision of masks, AP^r of simultaneous detection and segmentation.

A detection is right if the object of its class that it overlaps most has an IoU of 0.5 (or
0.7) or more with it and was not found by one with a better score. AP is the mean of the
best precision at the recalls 0, 0.1, ..., 1.
Source: Hariharan et al. 2014, Simultaneous Detection and Segmentation; voc_eval_sds of the
code of Dai et al. 2016 (MNC) and Li et al. 2017 (FCIS). Different here: crowds stand for
VOC's difficult objects: neither they nor detections of them count.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import defined_mean

# AP^r at 0.5 and 0.7 are the usual figures, the mean over 0.1 to 0.9 is the paper's AP^r_vol.
THRESHOLDS = tuple(round(0.1 * n, 1) for n in range(1, 10))
RECALLS = np.arange(0.0, 1.1, 0.1)
_rle: Any = coco_mask  # its type stubs are narrower than what it takes


class VocEvaluator(CocoEvaluator):
    """Collects predictions image by image, then computes Pascal VOC's metrics.

    Its metrics are AP50 and AP70, and AP: the mean over IoU 0.1, 0.2, ..., 0.9. As many
    detections count as there are.
    """

    kinds = ("segm",)
    limited = False
    per_class = ("segm/AP", "segm/AP50", "segm/AP70")

    def groups(self) -> list[tuple[str, ...]]:
        """Returns the metrics that there are, a row of a table each."""
        return [("AP", "AP50", "AP70")]

    def compute(self) -> dict[str, float]:
        """Returns the metrics in any order."""
        annotations, results = self.counted()
        objects, detections = _by_class(annotations), _by_class(results)
        ap = np.array(
            [
                class_ap(objects.get(category, []), detections.get(category, []))
                for category in sorted(self.category_ids)
            ]
        )
        columns = {
            "segm/AP": ap.mean(axis=1),
            "segm/AP50": ap[:, THRESHOLDS.index(0.5)],
            "segm/AP70": ap[:, THRESHOLDS.index(0.7)],
        }
        metrics: dict[str, float] = {}
        for name, values in columns.items():
            metrics[name] = defined_mean(np.nan_to_num(values, nan=-1.0))
            metrics |= self.of_classes(name, values.tolist())
        return metrics


def _by_class(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["category_id"], []).append(record)
    return groups


def class_ap(
    objects: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Returns AP at each of `THRESHOLDS` of one class, NaN without an object.

    Args:
      objects, detections: as COCO's annotations and results, masks as run lengths.
    """
    crowd = np.array([o["iscrowd"] for o in objects], bool)
    if not (num_objects := int((~crowd).sum())):
        return [float("nan")] * len(THRESHOLDS)
    order = np.argsort([-d["score"] for d in detections], kind="stable")
    nearest, overlap = _nearest(objects, [detections[i] for i in order])
    values = []
    for threshold in THRESHOLDS:
        hit = (nearest >= 0) & (overlap >= threshold)
        ignored = hit & crowd[nearest] if len(nearest) else hit
        right = np.zeros(len(nearest), bool)
        # Of the detections of one object, the first is right.
        rows = np.flatnonzero(hit & ~ignored)
        right[rows[np.unique(nearest[rows], return_index=True)[1]]] = True
        values.append(average_precision(right[~ignored], num_objects))
    return values


def average_precision(right: np.ndarray, num_objects: int) -> float:
    """Returns the mean of the best precision at eleven recalls.

    Args:
      right: bool [N], of the detections, best score first.
      num_objects: that there are to find.
    """
    found = np.cumsum(right)
    recall, precision = found / num_objects, found / np.arange(1, len(right) + 1)
    return float(sum(precision[recall >= r].max(initial=0.0) / 11 for r in RECALLS))


def _nearest(
    objects: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the object that each detection overlaps most, int [N], and their IoU.

    -1 where the image has no object.
    """
    nearest, overlap = np.full(len(detections), -1), np.zeros(len(detections))
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for part, records in enumerate((detections, objects)):
        for row, record in enumerate(records):
            rows.setdefault(record["image_id"], ([], []))[part].append(row)
    for found, shown in rows.values():
        if found and shown:
            masks = [detections[i]["segmentation"] for i in found]
            truth = [objects[i]["segmentation"] for i in shown]
            iou = np.asarray(_rle.iou(masks, truth, [0] * len(truth)))
            nearest[found], overlap[found] = np.array(shown)[iou.argmax(1)], iou.max(1)
    return nearest, overlap
