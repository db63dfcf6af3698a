"""What became of every detection and every object, at mask IoU 0.5, by hotcoco."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import load_hotcoco
from solov2_jax.io import InputError
from solov2_jax.tools.report.diagnosis import RIGHT_IOU, image_overlaps

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ObjectTable:
    """G annotated objects, in the annotations' order."""

    records: Records
    image: np.ndarray  # int64 [G], place among the evaluated images
    label: np.ndarray  # int64 [G], place among the sorted category ids
    area: np.ndarray  # float64 [G], of the mask, as annotated
    crowd: np.ndarray  # bool [G]


@dataclass(frozen=True)
class DetectionTable:
    """N detections by image, then score: as many per image and class as AP counts."""

    records: Records
    image: np.ndarray  # int64 [N], like an object's
    label: np.ndarray  # int64 [N]
    score: np.ndarray  # float64 [N]


@dataclass(frozen=True)
class Outcome:
    """What became of each of N detections."""

    objects: ObjectTable
    detections: DetectionTable
    overlaps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # see `image_overlaps`
    object: np.ndarray  # int64 [N], the object that it found, or -1
    ignored: np.ndarray  # bool [N], neither right nor wrong: in a crowd, or as the metric says

    @property
    def right(self) -> np.ndarray:
        """Returns which detections are right, bool [N]."""
        return self.object >= 0

    def found_iou(self, use: np.ndarray) -> np.ndarray:
        """Returns the mask IoU at which each object is found, float64 [G]; 0: it is not.

        Args:
          use: bool [N], the detections that count.
        """
        iou = np.zeros(len(self.objects.label))
        for rows, image_objects, overlap in self.overlaps:
            hit = np.flatnonzero((self.right & use)[rows])
            found = self.object[rows[hit]]
            iou[found] = overlap[hit, np.searchsorted(image_objects, found)]
        return iou


def outcomes(evaluator: CocoEvaluator) -> Outcome:
    """Returns what became of every detection, whatever its score."""
    annotations, results = evaluator.counted()
    results = _best_per_class(results, evaluator.max_detections)
    images = {image: n for n, image in enumerate(evaluator.image_ids)}
    labels = {category: n for n, category in enumerate(sorted(evaluator.category_ids))}

    def places(records: Records) -> dict[str, np.ndarray]:
        image = np.array([images[r["image_id"]] for r in records], int)
        label = np.array([labels[r["category_id"]] for r in records], int)
        return {"image": image, "label": label}

    objects = ObjectTable(
        records=annotations,
        **places(annotations),
        area=np.array([a["area"] for a in annotations], float),
        crowd=np.array([a["iscrowd"] for a in annotations], bool),
    )
    score = np.array([r["score"] for r in results], float)
    detections = DetectionTable(records=results, **places(results), score=score)
    every = np.ones(len(annotations), bool), np.ones(len(results), bool)
    diagnostics = evaluate_at_half(objects, detections, *every).image_diagnostics(RIGHT_IOU)
    status, matches = diagnostics["dt_status"], diagnostics["dt_match"]  # by id, from 1
    ids = range(1, len(results) + 1)
    found = np.array([matches[i] - 1 if status.get(i) == "tp" else -1 for i in ids], int)
    in_crowd = np.array([i not in status for i in ids], bool)
    return Outcome(
        objects=objects,
        detections=detections,
        overlaps=list(image_overlaps(annotations, results)),
        object=found,
        ignored=in_crowd | (evaluator.unjudged(results) & (found < 0)),
    )


def _best_per_class(results: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Returns the results that AP counts, the best of each image and class.

    In the order of the images, as COCO's stable sort by score sees them.
    """
    of_class: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for result in results:
        of_class.setdefault((result["image_id"], result["category_id"]), []).append(result)
    kept = (
        sorted(group, key=lambda result: -result["score"])[:limit] for group in of_class.values()
    )
    return sorted(itertools.chain(*kept), key=lambda result: (result["image_id"], -result["score"]))


def require_hotcoco() -> tuple[Any, Any]:
    """Returns hotcoco's (COCO, COCOeval), or raises InputError."""
    if (library := load_hotcoco()) is None:
        raise InputError("--report and --against need the package hotcoco: pip install hotcoco")
    return library


def evaluate_at_half(
    objects: ObjectTable,
    detections: DetectionTable,
    use_objects: np.ndarray,
    use_detections: np.ndarray,
) -> Any:
    """Returns hotcoco's COCOeval of these objects and detections, whose masks are compared.

    Their ids are their rows among the used ones, from 1.

    Args:
      use_objects, use_detections: bool [G], bool [N].
    """
    coco, coco_eval = require_hotcoco()

    def rows(table: ObjectTable | DetectionTable, use: np.ndarray, keys: Sequence[str]) -> list:
        return [
            {
                "id": n,
                "image_id": int(table.image[row]),
                "category_id": int(table.label[row]),
                **{key: table.records[row][key] for key in keys},
            }
            for n, row in enumerate(np.flatnonzero(use).tolist(), start=1)
        ]

    truth = coco()
    truth.dataset = {
        "images": [{"id": i} for i in {*objects.image.tolist(), *detections.image.tolist()}],
        "categories": [
            {"id": i, "name": str(i)} for i in {*objects.label.tolist(), *detections.label.tolist()}
        ],
        "annotations": rows(objects, use_objects, ("segmentation", "area", "iscrowd", "bbox")),
    }
    truth.createIndex()
    loaded = truth.loadRes(rows(detections, use_detections, ("segmentation", "score")))
    evaluation = coco_eval(truth, loaded, "segm")
    evaluation.params.maxDets = [1, 10, max(len(detections.label), 100)]
    evaluation.evaluate()
    return evaluation
