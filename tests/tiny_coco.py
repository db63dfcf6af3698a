"""A small COCO folder for tests: write it, spoil a part of it, load it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from solov2_jax import rle as masks
from solov2_jax.data.coco import CocoDataset, load_coco


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Returns a bool [H, W] mask as pycocotools encodes it, with text for json."""
    encoded: Any = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def square(x: float, y: float, side: float) -> list[list[float]]:
    """Returns a polygon segmentation."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotation(number: int, image: int, category: int, **changes: Any) -> dict:
    """Returns the annotation of a square of 20 pixels; a None removes its key."""
    record = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [10, 8, 20, 20],
        "area": 400,
        "iscrowd": 0,
        "segmentation": square(10, 8, 20),
    } | changes
    return {k: v for k, v in record.items() if v is not None}


def content() -> dict[str, Any]:
    """Returns a json of three images, 48x64, 64x48 and 40x40, the last one empty."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 48, "width": 64},
            {"id": 3, "file_name": "sub/b.png", "height": 64, "width": 48},
            {"id": 9, "file_name": "c.png", "height": 40, "width": 40},
        ],
        "annotations": [
            annotation(1, 3, 20),
            annotation(2, 7, 5),
            annotation(3, 7, 20, bbox=[30, 20, 12, 12], segmentation=square(30, 20, 12)),
        ],
        "categories": [{"id": 20, "name": "dog"}, {"id": 5, "name": "cat"}],
    }


def write(folder: Path, data: Any = None) -> tuple[str, str]:
    """Writes images and json and returns their paths, as `load_coco` takes them."""
    data = content() if data is None else data
    images = folder / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for record in content()["images"]:
        shape = (record["height"], record["width"], 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(images / record["file_name"])
    path = folder / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(images), str(path)


def load(folder: Path, data: Any = None, **options: Any) -> CocoDataset:
    """Writes and loads."""
    return load_coco(*write(folder, data), **options)


def whole(crop: masks.Crop | None, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of the whole image."""
    out = np.zeros(size, np.uint8)
    if crop is not None:
        h, w = crop.pixels.shape
        out[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
    return out
