"""A COCO instances json, put together image by image."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.io import write_text
from solov2_jax.rle import mask_to_rle, polygons_to_rle


class Instances:
    """Collects images and objects; `write` makes the file."""

    def __init__(self, categories: Mapping[int, str]):
        self.categories = dict(categories)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, file_name: str, height: int, width: int) -> None:
        """Takes an image; the objects that follow are in it."""
        number = len(self.images) + 1
        size = {"height": int(height), "width": int(width)}
        self.images.append({"id": number, "file_name": file_name} | size)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the last image."""
        return self.images[-1]["height"], self.images[-1]["width"]

    def add_polygons(self, category: int, polygons: Sequence[np.ndarray]) -> None:
        """Takes an object of the last image: outlines [n, 2], x and y in pixels."""
        flat: Any = [np.asarray(p, np.float64).ravel() for p in polygons]
        corners = np.concatenate(flat).reshape(-1, 2)
        low, high = corners.min(axis=0), corners.max(axis=0)
        whole: Any = polygons_to_rle(flat, self.size)
        area = coco_mask.area(whole)
        box = [*low.tolist(), *(high - low).tolist()]
        self._add(category, [p.round(3).tolist() for p in flat], box, float(area))

    def add_mask(self, category: int, mask: np.ndarray) -> None:
        """Takes an object of the last image: its mask, bool [height, width]."""
        runs: Any = mask_to_rle(mask)
        segmentation = {"size": list(mask.shape), "counts": runs["counts"].decode()}
        box = coco_mask.toBbox(runs).tolist()
        self._add(category, segmentation, box, float(coco_mask.area(runs)))

    def _add(self, category: int, segmentation: Any, box: list, area: float) -> None:
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": self.images[-1]["id"],
                "category_id": int(category),
                "segmentation": segmentation,
                "bbox": [round(v, 3) for v in box],
                "area": area,
                "iscrowd": 0,
            }
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the json, whole or not at all."""
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in sorted(self.categories.items())],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(content), path)
