"""Why a figure is -1 or 0, in words."""

from collections.abc import Mapping, Sequence

import numpy as np

from solov2_jax.evaluation.matching import AREA_RANGES
from solov2_jax.evaluation.overlap import image_overlaps
from solov2_jax.evaluation.tables import Detections, Objects

SIZES = {
    "s": "smaller than 32 x 32",
    "m": "from 32 x 32 to 96 x 96",
    "l": "larger than 96 x 96",
}


def reasons(
    metrics: Mapping[str, float],
    objects: Objects,
    found: Detections,
    num_results: int,
) -> list[str]:
    """Returns a line for each reason of a figure that is -1 or 0.

    Args:
      metrics: of `CocoEvaluator.evaluate`.
      num_results: predictions, also those of other images or categories.
    """
    lines = [
        f"AP{suffix}: no annotated object is {words} pixels"
        for suffix, words in SIZES.items()
        if metrics[f"segm/AP{suffix}"] < 0
    ]
    if not num_results:
        return [*lines, "every figure is 0 because there is not one prediction"]
    if not len(found):
        return [
            *lines,
            f"every figure is 0: none of the {num_results} predictions is of these "
            "images and categories; compare the ids",
        ]
    if metrics["segm/AP"] == 0:
        lines += _nothing_right(objects, found)
    zero = [s for s in SIZES if metrics[f"segm/AP{s}"] == 0]
    if zero and metrics["segm/AP"] > 0:
        lines += _sizes_without_hit(zero, objects, found)
    return lines


def _nothing_right(objects: Objects, found: Detections) -> list[str]:
    """Returns why no detection is right at all: the classes, or the masks."""
    best = np.zeros(len(found))
    for one in image_overlaps(objects, found):
        best[one.found] = one.iou.max(axis=1, initial=0)
    fitting = int((best >= 0.5).sum())
    if fitting:
        return [
            f"segm/AP is 0, but {fitting} of {len(found)} predictions have a mask IoU "
            "of 0.5 or more with an object of another class: the masks are right and "
            "the classes are not; compare category ids and the order of the classes"
        ]
    return [
        f"segm/AP is 0: not one of {len(found)} predictions has a mask IoU of 0.5 with "
        f"an object of any class, the best has {best.max():.2f}; weights that are not "
        "trained look like this, and so do masks of other images"
    ]


def _sizes_without_hit(
    sizes: Sequence[str], objects: Objects, found: Detections
) -> list[str]:
    """Returns a line for each size range in which nothing was found."""
    area, theirs = objects.area, found.area("segm")
    best = np.zeros(len(objects))
    for one in image_overlaps(objects, found):
        same = found.label[one.found][:, None] == objects.label[one.objects]
        best[one.objects] = np.where(same, one.iou, 0).max(axis=0, initial=0)
    lines = []
    for suffix in sizes:
        low, high = AREA_RANGES[1 + list(SIZES).index(suffix)]
        there = (area >= low) & (area <= high) & ~objects.crowd
        predicted = int(((theirs >= low) & (theirs <= high)).sum())
        lines.append(
            f"AP{suffix} is 0: {int(there.sum())} annotated objects are "
            f"{SIZES[suffix]} pixels and {predicted} predictions are; the largest mask "
            f"IoU of such an object with a prediction is {best[there].max():.2f}"
        )
    return lines
