"""COCO's metrics of key points: OKS takes the place of IoU.

Source: pycocotools cocoeval.py, iouType "keypoints"; detectron2
evaluation/coco_evaluation.py, TEST.KEYPOINT_OKS_SIGMAS.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from solov2_jax.data.annotations import annotation_ids, read_content
from solov2_jax.data.keypoints import keypoint_names, points_of
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.io import InputError

NAMES = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
COCO_POINTS = 17


class KeypointEvaluator(CocoEvaluator):
    """COCO's metrics of masks and boxes, and `keypoints/AP` and others of key points.

    Objects whose `num_keypoints` is 0, or that are crowds, are neither found nor missed. The
    score of a detection is its mask's.

    Args:
      sigmas: of the points, one each; (): COCO's for 17 points, else 1 over their number.
    """

    def __init__(self, *args: Any, sigmas: Sequence[float] = (), **options: Any):
        super().__init__(*args, **options)
        if not os.path.isfile(self.source):
            raise InputError(f"{self.source}: key points are read from a json file; give one.")
        content = read_content(self.source)
        names = keypoint_names(content, self.source)
        if sigmas and len(sigmas) != len(names):
            raise InputError(
                f"eval.keypoint_sigmas has {len(sigmas)} entries, but {self.source} has "
                f"{len(names)} key points ({', '.join(names)}); give one for each."
            )
        self.sigmas = np.array(sigmas or default_sigmas(len(names)), np.float64)
        with_points = [c["id"] for c in content["categories"] if c.get("keypoints")]
        self._categories = [i for i in self.category_ids if i in with_points]
        ids = annotation_ids(content["annotations"], self.source).tolist()
        self._objects = [
            _object(record, points_of(record, len(names), f"{self.source}: annotation {name}"))
            for name, record in zip(ids, content["annotations"], strict=True)
            if record["category_id"] in self._categories
        ]

    def metric_names(self) -> list[str]:
        """Returns the keys of what `evaluate` returns."""
        return [*super().metric_names(), *(f"keypoints/{name}" for name in NAMES)]

    def compute(self) -> dict[str, float]:
        """Returns the metrics in any order."""
        stats = dict(zip(NAMES, self._stats(), strict=True))
        metrics = super().compute()
        if self.results and not any(coco_mask.area(r["segmentation"]) for r in self.results):
            # Points alone, of a program that knows no masks: theirs are undefined.
            metrics |= dict.fromkeys((n for n in metrics if n.startswith("segm/")), float("nan"))
        return metrics | {f"keypoints/{k}": v for k, v in stats.items()}

    def table(self, metrics: Any) -> list[str]:
        """Returns the lines of a table of `metrics`, and what they are about."""
        values = ((name, metrics[f"keypoints/{name}"]) for name in NAMES)
        line = "  ".join(f"{name} {'-' if np.isnan(v) else f'{v:.4f}'}" for name, v in values)
        return [*super().table(metrics), f"keypoints  {line}"]

    def _stats(self) -> list[float]:
        """Returns COCO's ten numbers, NaN where one is undefined."""
        chosen, number = set(self.image_ids), len(self.sigmas)
        objects = [o for o in self._objects if o["image_id"] in chosen]
        found = [
            _result(result, number, self.source)
            for result in self.results
            if result["image_id"] in chosen and result["category_id"] in self._categories
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            scores = COCOeval(self._coco(objects), self._coco(found), "keypoints")
            scores.params.imgIds = self.image_ids
            scores.params.catIds = self._categories
            scores.params.kpt_oks_sigmas = self.sigmas
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
        return [float(v) if v > -1 else float("nan") for v in scores.stats]

    def _coco(self, records: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        # An id of 0 would be no match.
        annotations = [{**record, "id": i} for i, record in enumerate(records, 1)]
        images = [{"id": image} for image in self.image_ids]
        categories = [{"id": category} for category in self._categories]
        vars(coco)["dataset"] = {
            "images": images,
            "categories": categories,
            "annotations": annotations,
        }
        coco.createIndex()
        return coco


def default_sigmas(number: int) -> tuple[float, ...]:
    """Returns COCO's sigmas of its 17 points, else 1 over their number for each."""
    if number == COCO_POINTS:
        return tuple(Params("keypoints").kpt_oks_sigmas.tolist())
    return (1 / number,) * number


def _object(record: dict[str, Any], points: np.ndarray) -> dict[str, Any]:
    """Returns an annotation with what COCO's evaluation reads, filled in where it lacks."""
    x, y, w, h = (float(v) for v in record.get("bbox") or (0, 0, 0, 0))
    return {
        "image_id": record["image_id"],
        "category_id": record["category_id"],
        "iscrowd": int(record.get("iscrowd") or 0),
        "bbox": [x, y, w, h],
        "area": float(record.get("area") or w * h),
        "num_keypoints": int((points[:, 2] > 0).sum()),
        "keypoints": _in_json(points),
    }


def _in_json(points: np.ndarray) -> list[float]:
    """Returns points as a json has them: a place is a pixel's index, not its middle."""
    moved = points.astype(np.float64)
    moved[moved[:, 2] > 0, :2] -= 0.5
    return moved.ravel().tolist()


def _result(result: dict[str, Any], number: int, source: str) -> dict[str, Any]:
    values = result.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * number:
        raise InputError(
            f"a prediction of image {result['image_id']} has no list `keypoints` of "
            f"{3 * number} numbers, x, y and a score for each of {source}'s {number} points: "
            "predict with a network that has learned them (data.mapper = 'fcpose'), without "
            "tiles or test-time augmentation, or choose "
            "the metric 'coco'."
        )
    x, y = values[0::3], values[1::3]
    area = (max(x) - min(x)) * (max(y) - min(y))  # as pycocotools' loadRes
    kept = {key: result[key] for key in ("image_id", "category_id", "score")}
    return {**kept, "keypoints": values, "area": area, "bbox": result["bbox"], "iscrowd": 0}
