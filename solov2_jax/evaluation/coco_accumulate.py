"""Matches -> precision over recall -> COCO's twelve figures, and pycocotools itself.

pycocotools defines the figures. `score_fast` fills in its arrays, equal to the last
digit, and lets pycocotools summarise them; `score_pycocotools` is its own way from
beginning to end.
Source: pycocotools cocoeval.py, COCOeval.accumulate and summarize.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval, Params

from solov2_jax.evaluation.coco_match import Matches, match
from solov2_jax.evaluation.coco_tables import DetectionTable, Kind, ObjectTable
from solov2_jax.evaluation.ground_truth import GroundTruth, index

# In the order of pycocotools' summary.
FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
BACKENDS = ("fast", "pycocotools")


@dataclass(frozen=True)
class Score:
    """Shapes: T IoU thresholds, R recalls, K classes, A size ranges, M most found."""

    figures: dict[str, float]  # by the names in FIGURES
    precision: np.ndarray  # float64 [T, R, K, A, M], -1 where nothing is annotated
    recall: np.ndarray  # float64 [T, K, A, M]

    def class_precision(self) -> np.ndarray:
        """Returns AP of each class, over all sizes and 100 detections; -1: none."""
        rows = np.moveaxis(self.precision[:, :, :, 0, -1], 2, 0)
        known = [row[row > -1] for row in rows]
        return np.array([float(k.mean()) if k.size else -1.0 for k in known])


def score_fast(objects: ObjectTable, found: DetectionTable, kind: Kind, classes: int) -> Score:
    """Returns the figures of `objects` and `found`, of labels 0..classes - 1."""
    params = Params(kind)
    matches = match(objects, found, kind)
    precision, recall = accumulate(objects, found, matches, classes, params)
    # pycocotools would index the truth here; its summary needs the arrays alone.
    evaluation: Any = COCOeval(iouType=kind)
    evaluation.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return _score(evaluation)


def accumulate(
    objects: ObjectTable,
    found: DetectionTable,
    matches: Matches,
    classes: int,
    params: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pycocotools' arrays `precision` and `recall`, see `Score`."""
    ranges, thresholds = len(params.areaRng), len(params.iouThrs)
    recalls, most = np.asarray(params.recThrs), params.maxDets
    precision = -np.ones((thresholds, len(recalls), classes, ranges, len(most)))
    recall = -np.ones((thresholds, classes, ranges, len(most)))
    labels = np.arange(classes + 1)
    starts = np.searchsorted(found.label, labels)
    firsts = np.searchsorted(objects.label, labels)
    for k in range(classes):
        there = ~matches.object_ignored[firsts[k] : firsts[k + 1]]
        positives = there.sum(axis=0)  # [A]
        part = slice(starts[k], starts[k + 1])
        order = np.argsort(-found.score[part], kind="stable")
        rank = found.rank[part][order]
        hits = (matches.object[part] >= 0)[order]
        counted = ~matches.ignored[part][order]
        for a in np.flatnonzero(positives):
            for m, limit in enumerate(most):
                use = slice(None) if limit == most[-1] else rank < limit
                true = np.cumsum((hits[use, a] & counted[use, a]).T, axis=1)
                false = np.cumsum((~hits[use, a] & counted[use, a]).T, axis=1)
                curve, reached = _curve(true, false, int(positives[a]), recalls)
                precision[:, :, k, a, m], recall[:, k, a, m] = curve, reached
    return precision, recall


def _curve(
    true: np.ndarray, false: np.ndarray, positives: int, recalls: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns precision at each recall [T, R] and the largest recall [T].

    Args:
      true, false: numbers of right and wrong detections among the first, int [T, n].
    """
    if not true.shape[1]:
        return np.zeros((len(true), len(recalls))), np.zeros(len(true))
    right = true.astype(float)
    reached = right / positives
    precision = right / (false + right + np.spacing(1))
    # The best precision at this recall or a larger one.
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    at = [np.searchsorted(row, recalls, side="left") for row in reached]
    return np.take_along_axis(best, np.array(at), axis=1), reached[:, -1]


def score_pycocotools(
    truth: GroundTruth,
    results: Sequence[dict[str, Any]],
    kind: Kind,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> Score:
    """Returns the figures by pycocotools alone."""
    # With a box beside the mask, pycocotools would take a prediction's area from the
    # box, and the size ranges of mask AP would no longer be those of masks.
    wanted = "segmentation" if kind == "segm" else "bbox"
    keys = ("image_id", "category_id", "score", wanted)
    copies: Any = [{k: r[k] for k in keys} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        there = index(truth, truth.annotations)
        found = there.loadRes(copies) if copies else index(truth, [])
        evaluation = COCOeval(there, found, kind)
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.catIds = list(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _score(evaluation)


def _score(evaluation: Any) -> Score:
    figures = dict(zip(FIGURES, map(float, evaluation.stats), strict=True))
    arrays = evaluation.eval
    return Score(figures, arrays["precision"], arrays["recall"])
