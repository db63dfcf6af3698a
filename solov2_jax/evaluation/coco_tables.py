"""Objects and detections as columns: what matching and analysis compute on.

A data set of 5,000 images has half a million detections; as columns they are sorted and
cut by numpy instead of one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

# Its type stubs are narrower than what it takes.
rle: Any = coco_mask

Kind = Literal["segm", "bbox"]
# DetectionTable of one image and class that can count, best first: COCO's largest maxDets.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class ObjectTable:
    """N annotated objects, sorted by class, then image, then as in the file."""

    image: np.ndarray  # int32 [N], place in the list of evaluated images
    label: np.ndarray  # int32 [N], place in the list of categories
    masks: list[dict[str, Any]]  # RLE
    boxes: np.ndarray  # float64 [N, 4], x, y, width, height
    area: np.ndarray  # float64 [N], of the mask, as annotated
    crowd: np.ndarray  # bool [N]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class DetectionTable:
    """N detections, sorted by class, then image, then score, best first.

    At most 100 of an image and class; `results` says which of the results they are.
    """

    image: np.ndarray
    label: np.ndarray
    masks: list[dict[str, Any]]
    boxes: np.ndarray
    score: np.ndarray  # float64 [N]
    rank: np.ndarray  # int32 [N], place among those of its image and class
    results: np.ndarray  # int64 [N], place in the list of results

    def __len__(self) -> int:
        return len(self.image)

    def area(self, kind: Kind) -> np.ndarray:
        """Returns the area that decides the size range, float64 [N]."""
        if kind == "bbox":
            return self.boxes[:, 2] * self.boxes[:, 3]
        return mask_areas(self.masks)


def mask_areas(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Returns the number of pixels of each RLE, float64 [N]."""
    # pycocotools refuses lists of more than 255 (an overflow in its own code).
    parts = [rle.area(list(masks[i : i + 128])) for i in range(0, len(masks), 128)]
    return np.concatenate(parts).astype(float) if parts else np.zeros(0)


def make_objects(
    annotations: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> ObjectTable:
    """Returns the annotations (of `truth.Truth`) of these images and categories."""
    kept, image, label, order = _sorted(annotations, image_ids, category_ids)
    chosen = [annotations[i] for i in kept[order].tolist()]
    return ObjectTable(
        image[order],
        label[order],
        [a["segmentation"] for a in chosen],
        np.array([a["bbox"] for a in chosen], float).reshape(-1, 4),
        np.array([a["area"] for a in chosen], float),
        np.array([a["iscrowd"] for a in chosen], bool),
    )


def make_detections(
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> DetectionTable:
    """Returns the results (in COCO's format) of these images and categories."""
    score = np.array([r["score"] for r in results], float)
    kept, image, label, order = _sorted(results, image_ids, category_ids, score)
    image, label, places = image[order], label[order], kept[order]
    rank = _rank(label.astype(np.int64) * (len(image_ids) + 1) + image)
    counts = rank < MAX_DETECTIONS
    image, label, places = image[counts], label[counts], places[counts]
    return DetectionTable(
        image,
        label,
        [results[i]["segmentation"] for i in places.tolist()],
        np.array([results[i]["bbox"] for i in places.tolist()], float).reshape(-1, 4),
        score[places],
        rank[counts].astype(np.int32),
        places,
    )


def _sorted(
    records: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    score: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (which records count, their images, their labels, their order)."""
    images = {int(i): n for n, i in enumerate(image_ids)}
    labels = {int(c): n for n, c in enumerate(category_ids)}
    image = np.array([images.get(r["image_id"], -1) for r in records], np.int32)
    label = np.array([labels.get(r["category_id"], -1) for r in records], np.int32)
    kept = np.flatnonzero((image >= 0) & (label >= 0))
    image, label = image[kept], label[kept]
    keys = (image, label) if score is None else (-score[kept], image, label)
    return kept, image, label, np.lexsort(keys)  # stable: ties stay as they come


def _rank(key: np.ndarray) -> np.ndarray:
    """Returns each element's place in its run of equal keys."""
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return np.arange(len(key)) - np.repeat(first, np.diff(first, append=len(key)))
