"""Predictions, image by image -> COCO's average precision; the base of other metrics.

Source: detectron2 evaluation/coco_evaluation.py, COCOEvaluator (reset, process,
evaluate). Different here: box AP means something, because boxes are the masks' own;
predictions are RLE from the moment they arrive; a metric that is undefined comes with
its reason.
"""

import itertools
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.data.annotations import AnnotationTable
from solov2_jax.evaluation.coco_score import (
    AREAS,
    BACKENDS,
    COCO_LIMIT,
    METRICS,
    GroundTruth,
    Kind,
    compute_ap,
    extra_metrics,
    read_ground_truth,
    size_metrics,
)
from solov2_jax.inference.prediction import Prediction, to_coco_results

# COCO's size ranges, as (least, greatest area, words).
SIZES = {
    "s": (*AREAS[1], "smaller than 32 x 32"),
    "m": (*AREAS[2], "from 32 x 32 to 96 x 96"),
    "l": (*AREAS[3], "larger than 96 x 96"),
}

log = logging.getLogger(__name__)


def is_defined(value: float | int | None) -> bool:
    """Returns whether a metric exists: not NaN or None, nor the -1 of older files.

    COCO's metrics do not exist where no object of that size or class is annotated. They
    are NaN in Python, null in json and "-" in tables, and never compared or averaged.
    """
    return value is not None and not math.isnan(value) and value != -1


# The metrics that say the most; of another validation set NAME/segm/AP.
HEADLINES = ("segm/AP", "segm/AP50", "segm/AP70", "boundary/AP", "keypoints/AP", "bbox/AP")


def headlines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the names of the metrics that a command prints, in their order."""
    return [n for n in metrics if n in HEADLINES or n.partition("/")[2] in HEADLINES]


def json_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the metrics for a json file, null where one is undefined."""
    return {name: value if is_defined(value) else None for name, value in metrics.items()}


class CocoEvaluator:
    """Collects predictions image by image, then computes COCO's metrics.

    Other metrics derive from it and override `compute`, `groups` and `per_class`; see
    `evaluation.evaluators`. `segm/AP` is always the metric's own single number.

    Attributes:
      kinds: the first part of a metric's name: what is compared.
      limited: whether only the best detections of an image and class count.

    Args:
      annotations: an instances json file, its content, its table or its ground truth.
      category_ids: the annotation file's category id of each label 0..K-1.
      class_names: their names.
      backend: "fast" or "pycocotools"; the metrics are equal to the last digit.
      max_detections: per image and class; beyond 100, metrics with this limit are added.
      size_ranges: sides in pixels between further size ranges, whose metrics are added.
    """

    kinds: tuple[Kind, ...] = ("segm", "bbox")
    per_class: tuple[str, ...] = ("segm/AP",)  # that there are of each class
    names_known = True  # `metric_names` has them all
    limited = True

    def __init__(
        self,
        annotations: str | os.PathLike[str] | dict[str, Any] | AnnotationTable | GroundTruth,
        category_ids: Sequence[int],
        class_names: Sequence[str],
        *,
        backend: str = "fast",
        max_detections: int = COCO_LIMIT,
        size_ranges: Sequence[int] = (),
    ):
        if backend not in BACKENDS:
            raise ValueError(f"eval.backend is {backend!r}; use one of {BACKENDS}")
        is_read = isinstance(annotations, GroundTruth)
        self.truth = annotations if is_read else read_ground_truth(annotations)
        self.source, self._backend = self.truth.source, backend
        self.max_detections = max(max_detections, COCO_LIMIT) if self.limited else sys.maxsize
        self.size_ranges = tuple(size_ranges)
        self.category_ids = tuple(int(i) for i in category_ids)
        self.class_names = unique_names(class_names, self.category_ids)
        known = self.truth.categories
        if missing := sorted(set(self.category_ids) - set(known)):
            raise ValueError(
                f"{self.source}: no category has id {missing[:5]}, which the model's "
                f"classes stand for; the file's categories are {sorted(known)[:10]}"
            )
        self.reset()

    def reset(self) -> None:
        """Forgets every prediction."""
        self.results: list[dict[str, Any]] = []  # in COCO's results format
        self._seen: set[int] = set()

    @property
    def image_ids(self) -> list[int]:
        """The images that were processed, sorted."""
        return sorted(self._seen)

    def process(self, prediction: Prediction) -> None:
        """Adds one image's predictions; an image without any counts too."""
        self.add(*self.encode(prediction))

    def add(self, image_id: int, results: Sequence[dict[str, Any]]) -> None:
        """Adds what `encode` returned of an image."""
        if image_id in self._seen:
            raise ValueError(f"image {image_id} was predicted twice")
        self._seen.add(image_id)
        self.results.extend(results)

    def encode(self, prediction: Prediction) -> tuple[int, list[dict[str, Any]]]:
        """Returns an image's id and its results in COCO's format; may run in any thread."""
        # Batches may carry other numbers than the file's ids, which need not fit.
        image_id = self.truth.image_ids.get(int(prediction.image_id), prediction.image_id)
        image = self.truth.images.get(image_id)
        if image is None:
            raise ValueError(f"{self.source}: no image has id {image_id}")
        expected = (int(image["height"]), int(image["width"]))
        if prediction.masks.shape[1:] != expected:
            raise ValueError(
                f"image {image_id}: masks are {prediction.masks.shape[1:]} (height, "
                f"width), but {self.source} says {expected}; correct the file's sizes"
            )
        labels, num_classes = prediction.labels, len(self.category_ids)
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"image {image_id}: label {labels.max()} of {num_classes} classes")
        results = to_coco_results(prediction, self.category_ids)
        return image_id, [{**result, "image_id": image_id} for result in results]

    def state(self) -> dict[str, Any]:
        """Returns what was processed, as JSON values, for `merge`."""
        return {"images": self.image_ids, "results": self.results}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replaces what was processed by the parts that several evaluators processed."""
        images = [image for state in states for image in state["images"]]
        twice = sorted(i for i, n in Counter(images).items() if n > 1)
        if twice:
            raise ValueError(f"images {twice[:5]} were predicted by two processes")
        self._seen = set(images)
        results = [result for state in states for result in state["results"]]
        self.results = sorted(results, key=lambda result: result["image_id"])

    def add_results(self, results: Sequence[dict[str, Any]]) -> None:
        """Adds results in COCO's format, as predictions of every image of the truth."""
        self._seen.update(self.truth.images)
        self.results.extend(results)

    def images_with(self, count: int) -> int:
        """Returns how many images have that many predictions or more."""
        predictions = Counter(result["image_id"] for result in self.results)
        return sum(n >= count for n in predictions.values())

    def counted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns the annotations and the results of the processed images and the classes."""

        def counts(record: dict[str, Any]) -> bool:
            return record["image_id"] in self._seen and record["category_id"] in categories

        categories = set(self.category_ids)
        return list(filter(counts, self.truth.annotations)), list(filter(counts, self.results))

    def unjudged(self, results: Sequence[dict[str, Any]]) -> np.ndarray:
        """Returns which results are neither right nor wrong if they find no object, bool [N].

        Besides those that lie in a crowd.

        Args:
          results: those of `counted`, or some of them.
        """
        return np.zeros(len(results), bool)

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics by `metric_names`: `segm/AP`, ..., all 0..1.

        Over the images that were processed; NaN where undefined, see `is_defined`.
        """
        if not self._seen:
            raise ValueError("nothing to evaluate: no image was processed")
        metrics = self.compute()
        metrics = {name: metrics[name] for name in self.metric_names()}
        for line in self.table(metrics) + self.notes(metrics):
            log.info("%s", line)
        return metrics

    def compute(self) -> dict[str, float]:
        """Returns the metrics in any order."""
        metrics: dict[str, float] = {}
        for kind in self.kinds:
            score = compute_ap(
                self.truth,
                self.results,
                kind,
                image_ids=self.image_ids,
                category_ids=self.category_ids,
                max_detections=self.max_detections,
                size_ranges=self.size_ranges,
                backend=self._backend,
            )
            metrics |= {f"{kind}/{name}": value for name, value in score.metrics.items()}
            if kind == "segm":
                metrics |= self.of_classes("segm/AP", score.class_ap())
        return metrics

    def of_classes(self, metric: str, values: Sequence[float]) -> dict[str, float]:
        """Returns a metric of each class, given in the order of the category ids."""
        names = [f"{metric}/{name}" for name in self.sorted_names()]
        return dict(zip(names, values, strict=True))

    def groups(self) -> list[tuple[str, ...]]:
        """Returns the metrics that there are of each of `kinds`, a row of a table each."""
        sizes = tuple(itertools.chain(*size_metrics(self.size_ranges)))
        return [names for names in (METRICS, extra_metrics(self.max_detections), sizes) if names]

    def sorted_names(self) -> list[str]:
        """Returns the class names in the order of their category ids."""
        return [name for _, name in sorted(zip(self.category_ids, self.class_names, strict=True))]

    def metric_names(self) -> list[str]:
        """Returns the keys of what `evaluate` returns."""
        names = [
            f"{kind}/{name}" for kind in self.kinds for name in itertools.chain(*self.groups())
        ]
        return names + [f"{m}/{name}" for m in self.per_class for name in self.sorted_names()]

    def table(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns the lines of a table of `metrics`, and what they are about."""
        lines = []
        for names in self.groups():
            lines.append(_row("", names, len(max(names, key=len))))
            for kind in self.kinds:
                values = [format_metric(metrics[f"{kind}/{name}"]) for name in names]
                lines.append(_row(kind, values, len(max(names, key=len))))
        counts = self.objects_per_class()
        cells = [
            (name, format_metric(metrics[f"segm/AP/{name}"]), str(counts[category]))
            for category, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        lines += class_table(cells)
        lines.append(
            f"{len(self._seen)} of {len(self.truth.images)} images, "
            f"{sum(counts.values())} objects, {len(self.results)} predictions"
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
        for annotation in self.counted()[0]:
            counts[annotation["category_id"]] += not annotation["iscrowd"]
        return counts

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns a line for each reason why a metric is undefined or limited."""
        annotations, results = self.counted()
        objects = [a for a in annotations if not a["iscrowd"]]
        if not objects:
            crowds = f", only {len(annotations)} crowd regions" if annotations else ""
            return [
                f"AP is undefined: the {len(self._seen)} evaluated images have no annotated "
                f"object{crowds}; use validation images with objects"
            ]
        lines = [
            f"AP{size} is undefined: no annotated object is {words} pixels"
            for size, (_, _, words) in SIZES.items()
            if not is_defined(metrics.get(f"segm/AP{size}", 0.0))
        ]
        lines += _limit_lines(objects, self.max_detections)
        if not self.results:
            lines.append("AP is 0: there is not one prediction")
        elif not results:
            lines.append(
                f"AP is 0: none of the {len(self.results)} predictions is of these images "
                "and categories; compare the ids"
            )
        return lines


def _limit_lines(objects: Sequence[Mapping[str, Any]], max_detections: int) -> list[str]:
    """Returns a line if images have more objects of a class than detections count."""
    counts = Counter((o["image_id"], o["category_id"]) for o in objects)
    if (most := max(counts.values())) <= max_detections:
        return []
    images = len({image for (image, _), n in counts.items() if n > max_detections})
    return [
        f"AP counts at most {max_detections} detections per image and class, but {images} "
        f"images have more objects of one class, up to {most}: even perfect predictions "
        f"would score less than 1. eval.max_detections={most} (--max_detections={most} with "
        "--predictions) adds metrics with that limit"
    ]


def unique_names(names: Sequence[str], ids: Sequence[int]) -> tuple[str, ...]:
    """Returns the class names, those that occur twice with their category id."""
    if len(names) != len(ids):
        raise ValueError(f"{len(names)} class names for {len(ids)} category ids")
    repeated = {name for name, n in Counter(names).items() if n > 1}
    return tuple(
        f"{name} ({i})" if name in repeated else name for name, i in zip(names, ids, strict=True)
    )


def _row(kind: str, cells: Sequence[str], width: int = 5) -> str:
    return f"{kind:8}" + "".join(f"{cell:>{max(width, 5) + 2}}" for cell in cells)


def format_metric(value: float | int | None) -> str:
    """Returns a metric as text; "-" where it is undefined."""
    return f"{value:.4f}" if is_defined(value) else "-"


def class_table(cells: Sequence[tuple[str, str, str]]) -> list[str]:
    """Returns (class, AP, objects) in up to three columns of lines, read downwards."""
    width = max(len(name) for name, _, _ in cells)
    columns = 1 if len(cells) <= 12 else 3
    rows = -(-len(cells) // columns)

    def line(row: Sequence[tuple[str, str, str]]) -> str:
        texts = (f"{name:{width}} {ap:>7} {objects:>8}" for name, ap, objects in row)
        return "   ".join(texts)

    heads = [("class", "segm/AP", "objects")] * columns
    return [line(heads), *(line(cells[i::rows]) for i in range(rows))]
