"""Why a figure is -1 or 0, in words.

Predictions -> COCO's average precision.

Source: detectron2 evaluation/coco_evaluation.py, COCOEvaluator (reset, process,
evaluate). Different here: box AP means something, because boxes are the masks' own;
predictions are RLE from the moment they arrive; figures that do not exist say why.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.evaluation.coco_accumulate import (
    BACKENDS,
    FIGURES,
    Score,
    score_fast,
    score_pycocotools,
)
from solov2_jax.evaluation.coco_match import AREA_RANGES, image_overlaps
from solov2_jax.evaluation.coco_tables import (
    DetectionTable,
    Kind,
    ObjectTable,
    make_detections,
    make_objects,
)
from solov2_jax.evaluation.ground_truth import GroundTruth, read_ground_truth
from solov2_jax.inference.prediction import Prediction, to_coco_results

SIZES = {
    "s": "smaller than 32 x 32",
    "m": "from 32 x 32 to 96 x 96",
    "l": "larger than 96 x 96",
}


def reasons(
    metrics: Mapping[str, float],
    objects: ObjectTable,
    found: DetectionTable,
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


def _nothing_right(objects: ObjectTable, found: DetectionTable) -> list[str]:
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
    sizes: Sequence[str], objects: ObjectTable, found: DetectionTable
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


log = logging.getLogger(__name__)


class CocoEvaluator:
    """Collects predictions image by image, then computes the twelve figures of COCO.

    Args:
      annotations: an instances json file, or its content, or what `read_ground_truth` returns.
      category_ids: the annotation file's category id of each label 0..K-1.
      class_names: their names.
      backend: "fast" or "pycocotools"; the figures are equal to the last digit.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | dict[str, Any] | GroundTruth,
        category_ids: Sequence[int],
        class_names: Sequence[str],
        backend: str = "fast",
    ):
        if backend not in BACKENDS:
            raise ValueError(f"eval.backend is {backend!r}; use one of {BACKENDS}")
        known = isinstance(annotations, GroundTruth)
        self.truth = annotations if known else read_ground_truth(annotations)
        self.source, self._backend = self.truth.source, backend
        self.category_ids = tuple(int(i) for i in category_ids)
        self.class_names = unique_names(class_names, self.category_ids)
        there = self.truth.categories
        if missing := sorted(set(self.category_ids) - set(there)):
            raise ValueError(
                f"{self.source}: no category has id {missing[:5]}, which the model's "
                f"classes stand for; categories there are {sorted(there)[:10]}"
            )
        self.reset()

    def reset(self) -> None:
        """Forgets every prediction."""
        self._results: list[dict[str, Any]] = []
        self._seen: set[int] = set()

    @property
    def results(self) -> list[dict[str, Any]]:
        """The predictions so far in COCO's results format."""
        return self._results

    @property
    def image_ids(self) -> list[int]:
        """The images that were processed, sorted."""
        return sorted(self._seen)

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def process(self, prediction: Prediction) -> None:
        """Adds one image's predictions; an image without any counts too."""
        # Batches may carry other numbers than the file's ids, which need not fit.
        image_id = self.truth.image_ids.get(int(prediction.image_id), prediction.image_id)
        image = self.truth.images.get(image_id)
        if image is None:
            raise ValueError(f"{self.source}: no image has id {image_id}")
        if image_id in self._seen:
            raise ValueError(f"image {image_id} was predicted twice")
        expected = (int(image["height"]), int(image["width"]))
        if prediction.masks.shape[1:] != expected:
            raise ValueError(
                f"image {image_id}: masks are {prediction.masks.shape[1:]} (height, "
                f"width), but {self.source} says {expected}; correct the file's sizes"
            )
        labels = prediction.labels
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"image {image_id}: label {labels.max()} of {self.num_classes} classes"
            )
        self._seen.add(image_id)
        results = to_coco_results(prediction, self.category_ids)
        self._results.extend({**result, "image_id": image_id} for result in results)

    def state(self) -> dict[str, Any]:
        """Returns what was processed so far, as JSON values, for `merge`."""
        return {"images": self.image_ids, "results": self._results}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replaces what was processed by the parts that several evaluators processed.

        Raises a ValueError if two of them processed the same image.
        """
        images = [image for state in states for image in state["images"]]
        twice = sorted(i for i, n in Counter(images).items() if n > 1)
        if twice:
            raise ValueError(f"images {twice[:5]} were predicted by two processes")
        self._seen = set(images)
        results = [result for state in states for result in state["results"]]
        self._results = sorted(results, key=lambda result: result["image_id"])

    def add_results(self, results: Sequence[dict[str, Any]]) -> None:
        """Adds results in COCO's format, as predictions of every image of the truth."""
        self._seen.update(self.truth.images)
        self._results.extend(results)

    def columns(self) -> tuple[ObjectTable, DetectionTable]:
        """Returns what is annotated and what was predicted on the processed images.

        Labels are places in the sorted category ids, images places in `image_ids`.
        """
        ids = sorted(self.category_ids)
        return (
            make_objects(self.truth.annotations, self.image_ids, ids),
            make_detections(self._results, self.image_ids, ids),
        )

    def evaluate(self) -> dict[str, float]:
        """Returns `segm/AP`, ... `bbox/ARl` and `segm/AP/<class name>`, all 0..1.

        Over the images that were processed. -1 marks, as in pycocotools, a figure that
        does not exist because no object of that size or class is annotated.
        """
        if not self._seen:
            raise ValueError("nothing to evaluate: no image was processed")
        columns = self.columns()
        scores = {
            "segm": self._score("segm", *columns),
            "bbox": self._score("bbox", *columns),
        }
        metrics = {
            f"{kind}/{name}": value
            for kind, score in scores.items()
            for name, value in score.figures.items()
        }
        by_class = scores["segm"].class_precision().tolist()
        for name, value in zip(self.sorted_names(), by_class, strict=True):
            metrics[f"segm/AP/{name}"] = value
        for line in self.table(metrics) + self.reasons(metrics):
            log.info("%s", line)
        return metrics

    def sorted_names(self) -> list[str]:
        """Returns the class names in the order of their category ids."""
        named = dict(zip(self.category_ids, self.class_names, strict=True))
        return [named[i] for i in sorted(named)]

    def metric_names(self) -> list[str]:
        """Returns the keys of what `evaluate` returns."""
        figures = [f"{kind}/{name}" for kind in ("segm", "bbox") for name in FIGURES]
        return figures + [f"segm/AP/{name}" for name in self.sorted_names()]

    def reasons(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns why figures are -1 or 0, a line for each reason."""
        return reasons(metrics, *self.columns(), len(self._results))

    def _score(self, kind: Kind, objects: ObjectTable, found: DetectionTable) -> Score:
        if self._backend == "fast":
            return score_fast(objects, found, kind, self.num_classes)
        ids = sorted(self.category_ids)
        return score_pycocotools(self.truth, self._results, kind, self.image_ids, ids)

    def table(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns the lines of a table of `metrics`, and what they are about."""
        lines = [f"{'':5}" + "".join(f"{name:>7}" for name in FIGURES)]
        for kind in ("segm", "bbox"):
            row = (figure(metrics[f"{kind}/{name}"]) for name in FIGURES)
            lines.append(f"{kind:5}" + "".join(f"{v:>7}" for v in row))
        counts = self.objects_per_class()
        cells = [
            (name, figure(metrics[f"segm/AP/{name}"]), str(counts[category]))
            for category, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        lines += class_table(cells)
        lines.append(
            f"{len(self._seen)} of {len(self.truth.images)} images, "
            f"{sum(counts.values())} objects, {len(self._results)} predictions"
        )
        if self.truth.num_without_mask:
            lines.append(
                f"{self.truth.num_without_mask} annotations have no usable mask and "
                "are left out, as in training"
            )
        return lines

    def objects_per_class(self) -> dict[int, int]:
        """Returns how many objects, crowds aside, the processed images have."""
        counts = dict.fromkeys(self.category_ids, 0)
        for annotation in self.truth.annotations:
            category = annotation["category_id"]
            if annotation["image_id"] in self._seen and category in counts:
                counts[category] += not annotation["iscrowd"]
        return counts


def unique_names(names: Sequence[str], ids: Sequence[int]) -> tuple[str, ...]:
    """Returns the class names, those that occur twice with their category id."""
    if len(names) != len(ids):
        raise ValueError(f"{len(names)} class names for {len(ids)} category ids")
    return tuple(
        f"{name} ({i})" if list(names).count(name) > 1 else name
        for name, i in zip(names, ids, strict=True)
    )


def figure(value: float) -> str:
    """Returns a figure as text; "-" where nothing is annotated."""
    return "-" if value < 0 else f"{value:.4f}"


def class_table(cells: Sequence[tuple[str, str, str]]) -> list[str]:
    """Returns (class, AP, objects) in up to three columns of lines, read downwards."""
    width = max(len(name) for name, _, _ in cells)
    columns = 1 if len(cells) <= 12 else 3
    rows = -(-len(cells) // columns)

    def line(row: Sequence[tuple[str, str, str]]) -> str:
        texts = (f"{n:{width}} {v:>7} {c:>8}" for n, v, c in row)
        return "   ".join(texts)

    heads = [("class", "segm/AP", "objects")] * columns
    return [line(heads), *(line(cells[i::rows]) for i in range(rows))]
