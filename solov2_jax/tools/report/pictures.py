"""Ground truth beside prediction, for a look at what an evaluation saw."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_image
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.data.rasterize import draw_object
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import FinishedEvaluation
from solov2_jax.inference.draw import draw_prediction, enlarge
from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.io import InputError
from solov2_jax.rle import Crop, rle_decode, rle_from_string

# Shown are predictions with at least this score, as `predict.py` does by default.
MIN_SCORE = 0.3
# Pictures of the report are reduced to this width, pixels.
PICTURE_WIDTH = 1400
PAPER = 235  # grey on which masks are drawn when there is no image


def write_pictures(evaluation: FinishedEvaluation) -> None:
    """Writes `pictures/<image id>.jpg` of an evaluation; for `eval.reports`.

    Ground truth left, prediction right, of the images whose predictions were kept.
    """
    if not evaluation.predictions:
        return
    dataset, out = evaluation.dataset, evaluation.folder / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jpg"):  # of an evaluation of other images
        old.unlink()
    indices = {int(i): n for n, i in enumerate(dataset.image_ids)}
    for image_id, prediction in evaluation.predictions.items():
        index = indices[image_id]
        picture = side_by_side(
            read_image(dataset.path(index), dataset.pixels),
            annotated_objects(dataset, index),
            prediction.above(MIN_SCORE),
            dataset.class_names,
        )
        Image.fromarray(picture).save(out / f"{image_id}.jpg", quality=92)


class Gallery:
    """Pictures of images with what is annotated and what was predicted.

    Args:
      paths: of the images, by id; None draws masks on grey.
    """

    def __init__(
        self, evaluator: CocoEvaluator, paths: Mapping[int, str] | None, pixels: PixelFormat = RGB
    ):
        self._evaluator, self._paths, self._pixels = evaluator, paths, pixels
        self._labels = {c: n for n, c in enumerate(sorted(evaluator.category_ids))}
        names = evaluator.sorted_names()
        self._names = names if len(names) > 1 else []  # one class needs no labels
        annotations, results = evaluator.counted()
        self._annotations, self._results = defaultdict(list), defaultdict(list)
        for record in annotations:
            if not record["iscrowd"]:
                self._annotations[record["image_id"]].append(record)
        for record in results:
            self._results[record["image_id"]].append(record)

    def file_name(self, image_id: int) -> str:
        """Returns the image's file name, or its id where the file has no names."""
        return str(self._evaluator.truth.images[image_id].get("file_name") or image_id)

    def draw(self, image_id: int, threshold: float) -> Image.Image:
        """Returns the ground truth, without crowds, beside the predictions from a score."""
        record = self._evaluator.truth.images[image_id]
        size = (int(record["height"]), int(record["width"]))
        image = np.full((*size, 3), PAPER, np.uint8)
        if self._paths is not None:
            image = read_image(self._paths[image_id], self._pixels)
        if image.shape[:2] != size:
            raise InputError(
                f"{self.file_name(image_id)} is {image.shape[:2]} (height, width), but "
                f"{self._evaluator.source} says {size}"
            )
        annotated, predicted = (
            from_records(records[image_id], self._labels, image_id, size)
            for records in (self._annotations, self._results)
        )
        pixels = side_by_side(image, annotated, predicted.above(threshold), self._names)
        picture = Image.fromarray(pixels)
        picture.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
        return picture


def side_by_side(
    image: np.ndarray, left: Prediction, right: Prediction, class_names: Sequence[str]
) -> np.ndarray:
    """Returns both drawn into the image [H, W, 3], small images enlarged.

    Args:
      class_names: (): without labels.
    """

    def drawn(prediction: Prediction) -> np.ndarray:
        canvas, large = enlarge(image, prediction)
        return draw_prediction(canvas, large, class_names, labels=bool(class_names))

    sides = [drawn(left), drawn(right)]
    gap = np.full((sides[0].shape[0], 8, 3), 255, np.uint8)
    return np.concatenate([sides[0], gap, sides[1]], axis=1)


def from_records(
    records: Sequence[Mapping[str, Any]],
    labels: Mapping[int, int],
    image_id: int,
    size: tuple[int, int],
) -> Prediction:
    """Returns COCO results or annotations (RLE masks) of one image, best score first.

    Args:
      labels: category id -> label.
      size: (height, width) of the image.
    """
    objects = []
    for record in sorted(records, key=lambda record: -record.get("score", 1.0)):
        counts = record["segmentation"]["counts"]
        counts = counts.encode("ascii") if isinstance(counts, str) else counts
        crop = rle_decode(rle_from_string(counts), size)
        objects.append((crop, labels[record["category_id"]], record.get("score", 1.0)))
    return _prediction(objects, image_id, size)


def annotated_objects(dataset: CocoDataset, index: int) -> Prediction:
    """Returns the annotated objects of an image, without crowds, with score 1."""
    size = (int(dataset.heights[index]), int(dataset.widths[index]))
    objects = [
        (draw_object(dataset.segmentations, i, size), int(dataset.labels[i]), 1.0)
        for i in range(dataset.start[index], dataset.start[index + 1])
    ]
    return _prediction(objects, int(dataset.image_ids[index]), size)


def _prediction(
    objects: Sequence[tuple[Crop | None, int, float]], image_id: int, size: tuple[int, int]
) -> Prediction:
    """Returns the objects (mask, label, score) that have a pixel."""
    kept = [
        (packed, label, score)
        for crop, label, score in objects
        if crop and (packed := pack(crop.pixels.view(bool), crop.top, crop.left))
    ]
    masks = MaskCrops([packed for packed, _, _ in kept], size)
    return Prediction(
        masks=masks,
        boxes=masks.boxes(),
        scores=np.array([score for _, _, score in kept], np.float32),
        labels=np.array([label for _, label, _ in kept], np.int32),
        image_id=image_id,
    )
