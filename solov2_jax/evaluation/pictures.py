"""Ground truth beside prediction, for a look at what an evaluation saw."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_image
from solov2_jax.data.masks import rasterize
from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.prediction import Prediction

# Shown are predictions with at least this score, as `predict.py` does by default.
MIN_SCORE = 0.3
# Small pictures are enlarged by a whole factor up to about this height.
MIN_HEIGHT = 256


def write_pictures(
    dataset: CocoDataset,
    predictions: Mapping[int, Prediction],
    folder: str | os.PathLike[str],
) -> None:
    """Writes `<image id>.jpg`: truth left, prediction right.

    Args:
      predictions: by image id; images that are not in it get no picture.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jpg"):  # of an evaluation of other images
        old.unlink()
    indices = {int(i): n for n, i in enumerate(dataset.image_ids)}
    for image_id, prediction in predictions.items():
        index = indices[image_id]
        image = read_image(dataset.path(index))
        sides = [
            _enlarged(image, shown, dataset.class_names)
            for shown in (truth(dataset, index), prediction.above(MIN_SCORE))
        ]
        gap = np.full((sides[0].shape[0], 8, 3), 255, np.uint8)
        picture = np.concatenate([sides[0], gap, sides[1]], axis=1)
        Image.fromarray(picture).save(out / f"{image_id}.jpg", quality=92)


def truth(dataset: CocoDataset, index: int) -> Prediction:
    """Returns the annotated objects of an image, without crowds, with score 1."""
    size = (int(dataset.heights[index]), int(dataset.widths[index]))
    masks, labels = [np.zeros((0, *size), bool)], []
    for i in range(dataset.start[index], dataset.start[index + 1]):
        crop = rasterize(dataset.segmentations, i, size, size, False)
        if crop is None:
            continue
        mask = np.zeros(size, bool)
        h, w = crop.pixels.shape
        mask[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels > 0
        masks.append(mask[None])
        labels.append(dataset.labels[i])
    stacked = np.concatenate(masks)
    boxes = np.array([_box(mask) for mask in stacked], np.float32).reshape(-1, 4)
    return Prediction(
        stacked,
        boxes,
        np.ones(len(stacked), np.float32),
        np.array(labels, np.int32),
        int(dataset.image_ids[index]),
    )


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _enlarged(image, prediction: Prediction, class_names) -> np.ndarray:
    factor = max(1, MIN_HEIGHT // image.shape[0])
    large = Prediction(
        np.asarray(prediction.masks).repeat(factor, 1).repeat(factor, 2),
        prediction.boxes * factor,
        prediction.scores,
        prediction.labels,
        prediction.image_id,
    )
    return draw_prediction(
        image.repeat(factor, 0).repeat(factor, 1), large, class_names
    )
