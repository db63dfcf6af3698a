"""What a metric changes on the report's page: names, what counts, and the borders of masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.evaluation.boundary import BoundaryEvaluator
from solov2_jax.evaluation.boundary_eval import boundary_rle
from solov2_jax.evaluation.cityscapes import MIN_PIXELS, CityscapesEvaluator
from solov2_jax.evaluation.coco import CocoEvaluator, format_metric
from solov2_jax.evaluation.evaluators import OwnEvaluator
from solov2_jax.evaluation.keypoints import KeypointEvaluator
from solov2_jax.evaluation.lvis import LVIS_LIMIT, LvisEvaluator
from solov2_jax.evaluation.voc import VocEvaluator
from solov2_jax.tools.report.diagnosis import RIGHT_IOU
from solov2_jax.tools.report.outcomes import Outcome

_rle: Any = coco_mask  # its type stubs are narrower than what it takes
_COCO_WORDS = (
    "AP: the mean over IoU 0.5 to 0.95. s, m, l: objects below 32², up to 96², above. AR: recall "
    "with 1, 10, 100 detections per image."
)
# Of each evaluator: the heading of its metrics, and what they are.
_WORDS: dict[type[CocoEvaluator], tuple[str, str]] = {
    CocoEvaluator: ("COCO's metrics", _COCO_WORDS),
    OwnEvaluator: ("COCO's metrics, and your own", _COCO_WORDS),
    KeypointEvaluator: (
        "COCO's metrics",
        f"{_COCO_WORDS} keypoints: OKS takes the place of IoU; m, l: objects from 32², above 96².",
    ),
    BoundaryEvaluator: (
        "COCO's metrics of masks and of their borders",
        f"{_COCO_WORDS} Borders: two masks are as similar as the lower of their IoU and of that of "
        "their borders, 2 % of the image's diagonal wide.",
    ),
    LvisEvaluator: (
        "LVIS's metrics",
        "AP: the mean over IoU 0.5 to 0.95 and the classes. s, m, l: objects below 32², up to 96², "
        "above. r, c, f: classes in fewer than 10, in fewer than 100, and in more training images. "
        f"AR: recall with the best {LVIS_LIMIT} detections of an image, of all classes together.",
    ),
    CityscapesEvaluator: (
        "Cityscapes' metrics",
        "AP: the mean over IoU 0.5 to 0.95 of the area below precision over recall. Cityscapes has "
        "neither size ranges nor boxes.",
    ),
    VocEvaluator: (
        "Pascal VOC's metrics",
        "AP50, AP70: the mean of the best precision at eleven recalls. AP: the mean over IoU 0.1 "
        "to 0.9. VOC has neither size ranges nor boxes here.",
    ),
}


@dataclass(frozen=True)
class BorderRow:
    """Objects of a size that were found, and how well their borders fit."""

    name: str  # the range of sides
    found: int  # with mask IoU 0.5 and at least the threshold's score
    mask_iou: float  # means over those found; 0 without any
    border_iou: float
    fitting: int  # of those found: the lower of both is 0.5 or more


@dataclass(frozen=True)
class MetricRules:
    """What the page says of its metric."""

    heading: str
    meaning: str  # of the metrics' names
    notes: tuple[str, ...]  # what counts in the parts of the page, and which say nothing


def rules_of(
    evaluator: CocoEvaluator, outcome: Outcome, metrics: Mapping[str, float], coco_ap50: float
) -> MetricRules:
    """Returns what the page says of an evaluator's metric.

    Args:
      coco_ap50: AP50 of the same matches by COCO's rule, which the errors' gains refer to.
    """
    kind = next(cls for cls in type(evaluator).__mro__ if cls in _WORDS)
    heading, meaning = _WORDS[kind]
    return MetricRules(heading, meaning, tuple(_notes(evaluator, outcome, metrics, coco_ap50)))


def _notes(
    evaluator: CocoEvaluator, outcome: Outcome, metrics: Mapping[str, float], coco_ap50: float
) -> list[str]:
    ignored = int(outcome.ignored.sum())
    neither = f"{ignored} of {len(outcome.ignored)} detections are neither right nor wrong:"
    ap50 = (
        f"AP50 where errors are counted is COCO's, of these matches {format_metric(coco_ap50)}; "
        f"this metric's own is {format_metric(metrics.get('segm/AP50'))}."
    )
    if isinstance(evaluator, LvisEvaluator):
        left = len(evaluator.results) - len(outcome.ignored)
        return [
            f"No image was searched for all classes: {left} of {len(evaluator.results)} detections "
            "are in no part of this page, because their image was not searched for their class or "
            f"has {evaluator.max_detections} with better scores.",
            f"{neither} they find no object, and their class is not annotated exhaustively in the "
            "image.",
            "Objects that are mistaken for a class that their image was not searched for count as "
            "missed: whether that class is there too, nobody knows.",
        ]
    if isinstance(evaluator, CityscapesEvaluator):
        return [
            f"{neither} they find no object and lie to more than half in void, in groups or on "
            f"objects of less than {MIN_PIXELS} pixels.",
            f"Objects of less than {MIN_PIXELS} pixels are neither found nor missed.",
            ap50,
        ]
    if isinstance(evaluator, VocEvaluator):
        return [
            f"{neither} they lie in crowds, which stand for VOC's difficult objects.",
            "All parts are at IoU 0.5; AP70 is in the table only.",
            ap50,
        ]
    if isinstance(evaluator, BoundaryEvaluator):
        return [
            "Errors, curves, confusion and scores compare whole masks: by borders, a coarse "
            "outline of the right object would be a false detection and a missed object. What "
            "borders cost stands in a part of its own.",
        ]
    if isinstance(evaluator, KeypointEvaluator):
        masks = any(_rle.area(r["segmentation"]) for r in evaluator.results)
        without = " These detections have no masks: all objects are missed there."
        return [
            "All parts compare masks: OKS has no IoU below which a detection is another object's "
            "or nothing's, so key points have no kinds of errors and no confusion."
            + without
            * (not masks and bool(evaluator.results)),
        ]
    if isinstance(evaluator, OwnEvaluator):
        return ["All parts are COCO's, at mask IoU 0.5; your own metrics are in the table only."]
    return []


def border_rows(
    outcome: Outcome, threshold: float, sizes: list[tuple[str, float, float]]
) -> list[BorderRow]:
    """Returns a row for each range of sizes.

    Args:
      threshold: detections with a lower score are left out.
      sizes: (name, least, greatest side) of squares of an object's area, pixels.
    """
    use = np.flatnonzero(outcome.right & (outcome.detections.score >= threshold))
    objects = outcome.object[use]
    mask_iou = outcome.found_iou(outcome.detections.score >= threshold)[objects]
    border_iou = np.array(
        [
            _border_iou(outcome.detections.records[d], outcome.objects.records[o])
            for d, o in zip(use.tolist(), objects.tolist(), strict=True)
        ]
    )
    side = np.sqrt(outcome.objects.area[objects])
    rows = []
    for name, low, high in sizes:
        inside = (side >= low) & (side < high)
        number = int(inside.sum())
        means = [float(v[inside].mean()) if number else 0.0 for v in (mask_iou, border_iou)]
        fitting = int((np.minimum(mask_iou, border_iou)[inside] >= RIGHT_IOU).sum())
        rows.append(BorderRow(name, number, means[0], means[1], fitting))
    return rows


def _border_iou(detection: Mapping[str, Any], annotation: Mapping[str, Any]) -> float:
    borders = [boundary_rle(record["segmentation"]) for record in (detection, annotation)]
    return float(_rle.iou(borders[:1], borders[1:], [0])[0, 0])
