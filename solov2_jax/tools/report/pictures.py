"""Ground truth beside prediction, for a look at what an evaluation saw."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_image
from solov2_jax.data.rasterize import rasterize
from solov2_jax.inference.draw import draw_prediction, enlarge
from solov2_jax.inference.prediction import Prediction
from solov2_jax.rle import Crop, rle_decode, rle_from_string

# Shown are predictions with at least this score, as `predict.py` does by default.
MIN_SCORE = 0.3


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
        shown = (truth(dataset, index), prediction.above(MIN_SCORE))
        picture = side_by_side(image, *shown, dataset.class_names)
        Image.fromarray(picture).save(out / f"{image_id}.jpg", quality=92)


def side_by_side(
    image: np.ndarray,
    left: Prediction,
    right: Prediction,
    class_names: Sequence[str],
) -> np.ndarray:
    """Returns both drawn into the image [H, W, 3], small images enlarged.

    Args:
      class_names: (): without labels.
    """
    sides = [_enlarged(image, shown, class_names) for shown in (left, right)]
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
    scores = np.array([r.get("score", 1.0) for r in records], np.float32)
    masks, boxes, chosen = [], [], []
    for i in np.argsort(-scores, kind="stable").tolist():
        counts = records[i]["segmentation"]["counts"]
        counts = counts.encode("ascii") if isinstance(counts, str) else counts
        crop = rle_decode(rle_from_string(counts), size)
        if crop is None:
            continue
        masks.append(full_mask(crop, size))
        boxes.append(_box(masks[-1]))
        chosen.append(i)
    return Prediction(
        np.array(masks, bool).reshape(-1, *size),
        np.array(boxes, np.float32).reshape(-1, 4),
        scores[chosen],
        np.array([labels[records[i]["category_id"]] for i in chosen], np.int32),
        image_id,
    )


def full_mask(crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask in an image of this size, bool [H, W]."""
    mask = np.zeros(size, bool)
    h, w = crop.pixels.shape
    mask[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels > 0
    return mask


def truth(dataset: CocoDataset, index: int) -> Prediction:
    """Returns the annotated objects of an image, without crowds, with score 1."""
    size = (int(dataset.heights[index]), int(dataset.widths[index]))
    masks, labels = [np.zeros((0, *size), bool)], []
    for i in range(dataset.start[index], dataset.start[index + 1]):
        crop = rasterize(dataset.segmentations, i, size, size, False)
        if crop is None:
            continue
        masks.append(full_mask(crop, size)[None])
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
    canvas, large = enlarge(image, prediction)
    return draw_prediction(canvas, large, class_names, labels=bool(class_names))
