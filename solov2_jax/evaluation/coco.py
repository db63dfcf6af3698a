"""Predictions -> COCO's average precision, by pycocotools.

Source: detectron2 evaluation/coco_evaluation.py, COCOEvaluator (reset, process,
evaluate). Different here: box AP means something, because boxes are the masks' own;
predictions are RLE from the moment they arrive; figures that do not exist say why.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2_jax.inference.prediction import Prediction, to_coco_results

log = logging.getLogger(__name__)
# Its type stubs are narrower than what it takes.
rle: Any = coco_mask

# In the order of pycocotools' summary.
FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
SIZE_RANGES = {
    "s": "smaller than 32 x 32",
    "m": "from 32 x 32 to 96 x 96",
    "l": "larger than 96 x 96",
}


class CocoEvaluator:
    """Collects predictions image by image, then computes the twelve figures of COCO.

    Args:
      annotations: an instances json file, or its content.
      category_ids: the annotation file's category id of each label 0..K-1.
      class_names: their names.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | dict[str, Any],
        category_ids: Sequence[int],
        class_names: Sequence[str],
    ):
        if isinstance(annotations, dict):
            self.source, content = "the annotations", annotations
        else:
            self.source = os.fspath(annotations)
            content = json.loads(Path(annotations).read_text("utf-8"))
        self.category_ids = tuple(int(i) for i in category_ids)
        self.class_names = unique_names(class_names, self.category_ids)
        known = {int(c["id"]) for c in content["categories"]}
        if missing := sorted(set(self.category_ids) - known):
            raise ValueError(
                f"{self.source}: no category has id {missing[:5]}, which the model's "
                f"classes stand for; categories there are {sorted(known)[:10]}"
            )
        self._truth, self.num_without_mask = ground_truth(content, self.source)
        self.reset()

    def reset(self) -> None:
        """Forgets every prediction."""
        self._results: list[dict[str, Any]] = []
        self._seen: set[int] = set()

    @property
    def results(self) -> list[dict[str, Any]]:
        """The predictions so far in COCO's results format."""
        return self._results

    def process(self, prediction: Prediction) -> None:
        """Adds one image's predictions; an image without any counts too."""
        image_id = int(prediction.image_id)
        image = self._truth.imgs.get(image_id)
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
        self._results.extend(to_coco_results(prediction, self.category_ids))

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def evaluate(self) -> dict[str, float]:
        """Returns `segm/AP`, ... `bbox/ARl` and `segm/AP/<class name>`, all 0..1.

        Over the images that were processed. -1 marks, as in pycocotools, a figure that
        does not exist because no object of that size or class is annotated.
        """
        if not self._seen:
            raise ValueError("nothing to evaluate: no image was processed")
        metrics: dict[str, float] = {}
        masks, boxes = self._run("segm"), self._run("bbox")
        for kind, evaluation in (("segm", masks), ("bbox", boxes)):
            for name, value in zip(FIGURES, evaluation.stats, strict=True):
                metrics[f"{kind}/{name}"] = float(value)
        metrics.update(self._per_class(masks))
        for line in self.report(metrics):
            log.info("%s", line)
        return metrics

    def _run(self, kind: Literal["segm", "bbox"]) -> COCOeval:
        """Returns pycocotools' finished evaluation of "segm" or "bbox"."""
        # With a box beside the mask, pycocotools would take a prediction's area from
        # the box, and the size ranges of mask AP would no longer be those of masks.
        wanted = "segmentation" if kind == "segm" else "bbox"
        results: Any = [
            {k: r[k] for k in ("image_id", "category_id", "score", wanted)}
            for r in self._results
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            predicted = self._truth.loadRes(results) if results else empty(self._truth)
            evaluation = COCOeval(self._truth, predicted, kind)
            evaluation.params.imgIds = sorted(self._seen)
            evaluation.params.catIds = list(self.category_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _per_class(self, evaluation: COCOeval) -> dict[str, float]:
        """Returns mask AP of each class, over all sizes and 100 detections."""
        # precision [IoU threshold, recall, class, size range, detections]
        by_class = np.moveaxis(evaluation.eval["precision"][:, :, :, 0, -1], 2, 0)
        values = {}
        for label, precision in zip(evaluation.params.catIds, by_class, strict=True):
            name = self.class_names[self.category_ids.index(label)]
            exists = precision[precision > -1]
            values[f"segm/AP/{name}"] = float(exists.mean()) if exists.size else -1.0
        return values

    def report(self, metrics: dict[str, float]) -> list[str]:
        """Returns the lines of a table of `metrics`, with the reason of odd figures."""
        lines = [f"{'':5}" + "".join(f"{name:>7}" for name in FIGURES)]
        for kind in ("segm", "bbox"):
            row = (figure(metrics[f"{kind}/{name}"]) for name in FIGURES)
            lines.append(f"{kind:5}" + "".join(f"{v:>7}" for v in row))
        counts = self._objects_per_class()
        cells = [
            (name, figure(metrics[f"segm/AP/{name}"]), str(counts[category]))
            for category, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        lines += class_table(cells)
        total = len(self._truth.imgs)
        lines.append(
            f"{len(self._seen)} of {total} images, {sum(counts.values())} objects, "
            f"{len(self._results)} predictions"
        )
        if not self._results:
            lines.append("every figure is 0 because there is not one prediction")
        if self.num_without_mask:
            lines.append(
                f"{self.num_without_mask} annotations have no usable mask and are "
                "left out, as in training"
            )
        for suffix, words in SIZE_RANGES.items():
            if metrics[f"segm/AP{suffix}"] < 0:
                lines.append(f"AP{suffix}: no annotated object is {words} pixels")
        return lines

    def _objects_per_class(self) -> dict[int, int]:
        """Returns how many objects, crowds aside, the processed images have."""
        counts = dict.fromkeys(self.category_ids, 0)
        for annotation in self._truth.dataset["annotations"]:
            category = annotation["category_id"]
            if annotation["image_id"] in self._seen and category in counts:
                counts[category] += not annotation["iscrowd"]
        return counts


def ground_truth(content: dict[str, Any], source: str) -> tuple[COCO, int]:
    """Returns pycocotools' index of an instances json and how many objects it lacks.

    Objects without a usable mask are left out, missing `area`, `bbox` and `iscrowd` are
    filled in, and ids are counted from 1: pycocotools takes a match with an object of
    id 0 for no match.
    """
    sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in content["images"]}
    categories = {c["id"] for c in content["categories"]}
    annotations = []
    for a in content["annotations"]:
        for key, known in (("image_id", sizes), ("category_id", categories)):
            if a[key] not in known:
                raise ValueError(
                    f"{source}: annotation {a.get('id')} has {key} {a[key]}, which is "
                    "not in the file; remove the annotation or add the entry"
                )
        mask = to_rle(a.get("segmentation"), sizes[a["image_id"]])
        if mask is None:
            continue
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "segmentation": mask,
                "area": float(a["area"]) if "area" in a else float(rle.area(mask)),
                "bbox": a["bbox"] if a.get("bbox") else rle.toBbox(mask).tolist(),
                "iscrowd": int(a.get("iscrowd", 0)),
            }
        )
    coco = COCO()
    coco.dataset = {
        "images": content["images"],
        "categories": content["categories"],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, len(content["annotations"]) - len(annotations)


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Returns polygons, RLE or uncompressed RLE as RLE; None without a usable one."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return rle.frPyObjects(segmentation, *size)
        return segmentation
    polygons = [p for p in segmentation or () if len(p) >= 6 and len(p) % 2 == 0]
    return rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None


def empty(truth: COCO) -> COCO:
    """Returns the index of no predictions at all, which `loadRes` cannot make."""
    coco = COCO()
    coco.dataset = {**truth.dataset, "annotations": []}
    coco.createIndex()
    return coco


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
