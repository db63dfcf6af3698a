"""Every object as training will see it: drawn at the network's size, then measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.rasterize import draw_object
from solov2_jax.data.transforms import shortest_edge_sizes
from solov2_jax.rle import Crop

# Two objects of one class whose masks have this IoU are one object, annotated twice.
SAME_IOU = 0.9


@dataclasses.dataclass(frozen=True)
class MeasuredObjects:
    """A objects in pixels of the network's input, sorted by image."""

    image: np.ndarray  # int [A], index in the data set
    index: np.ndarray  # int [A], of the data set's objects
    label: np.ndarray  # int [A]
    box: np.ndarray  # float32 [A, 4], annotated, clipped to the image
    tight: np.ndarray  # float32 [A, 4], around the outline, clipped likewise
    area: np.ndarray  # int [A], pixels of the mask; 0: nothing is left of it
    center: np.ndarray  # float32 [A, 2], mass centre
    quarter: np.ndarray  # int [A], pixels of the mask at a quarter of the size
    crossing: np.ndarray  # bool [A], an outline crosses itself
    outside: np.ndarray  # float32 [A], how far an outline leaves the image
    sizes: np.ndarray  # int [N, 2], (height, width) of every image of the data set
    twins: tuple[tuple[int, int], ...]  # objects annotated twice: rows of this table
    damaged: tuple[str, ...]  # annotations whose run lengths cannot be decoded

    def of(self, image: int) -> np.ndarray:
        """Returns the rows of an image that have a mask."""
        first, last = np.searchsorted(self.image, [image, image + 1])
        rows = np.arange(first, last)
        return rows[self.area[rows] > 0]

    @property
    def images(self) -> np.ndarray:
        """The images that have an object, int."""
        return np.unique(self.image)


def measure(
    dataset: CocoDataset, indices: Sequence[int], short: int, max_size: int
) -> MeasuredObjects:
    """Returns the objects of these images (in increasing order), measured.

    Args:
      short, max_size: of the resize, pixels.
    """
    sizes = shortest_edge_sizes(dataset.heights, dataset.widths, short, max_size)
    rows: list[tuple[Any, ...]] = []
    twins: list[tuple[int, int]] = []
    damaged: list[str] = []
    for i in indices:
        old = int(dataset.heights[i]), int(dataset.widths[i])
        new = int(sizes[i, 0]), int(sizes[i, 1])
        crops: list[Crop | None] = []
        for a in range(int(dataset.start[i]), int(dataset.start[i + 1])):
            try:
                crop = draw_object(dataset.segmentations, a, old, new)
            except ValueError as error:
                damaged.append(f"annotation {dataset.annotation_ids[a]}: {error}")
                crop = None
            crops.append(crop)
            tight = _extent(dataset, a, old, new)
            outline = _outline(dataset, a, old, new)
            rows.append((i, a, tight, *_measure(crop), *outline))
        first = len(rows) - len(crops)
        labels = dataset.labels[dataset.start[i] : dataset.start[i + 1]]
        twins += [(first + a, first + b) for a, b in _twins(crops, labels)]
    columns = list(zip(*rows, strict=True)) or [()] * 8
    image, index = np.array(columns[0], int), np.array(columns[1], int)
    return MeasuredObjects(
        image,
        index,
        dataset.labels[index],
        _boxes(dataset, image, index, sizes),
        np.array(columns[2], np.float32).reshape(-1, 4),
        np.array(columns[3], int),
        np.array(columns[4], np.float32).reshape(-1, 2),
        np.array(columns[5], int),
        np.array(columns[6], bool),
        np.array(columns[7], np.float32),
        sizes,
        tuple(twins),
        tuple(damaged),
    )


def _scaled(
    polygons: list[np.ndarray], old: tuple[int, int], new: tuple[int, int]
) -> list[np.ndarray]:
    scale = np.array([new[1] / old[1], new[0] / old[0]])
    return [(p.reshape(-1, 2) * scale).ravel() for p in polygons]


def _measure(crop: Crop | None) -> tuple[Any, ...]:
    """Returns area, centre and pixels at a quarter."""
    if crop is None or not crop.pixels.any():
        return 0, (0.0, 0.0), 0
    rows, columns = crop.pixels.sum(1, dtype=int), crop.pixels.sum(0, dtype=int)
    area = int(rows.sum())
    offset = np.array([crop.left, crop.top])
    center = np.array([columns @ np.arange(len(columns)), rows @ np.arange(len(rows))])
    return area, center / area + offset, _quarter_pixels(crop)


def _quarter_pixels(crop: Crop) -> int:
    """Returns the pixels left at a quarter of the size: of the middle 2 x 2, two."""
    top, left = crop.top % 4, crop.left % 4
    h, w = crop.pixels.shape
    pad = (top, -(top + h) % 4), (left, -(left + w) % 4)
    pixels = np.pad(crop.pixels, pad)
    middle = pixels.reshape(pixels.shape[0] // 4, 4, -1, 4)[:, 1:3, :, 1:3]
    return int((middle.sum((1, 3), dtype=int) >= 2).sum())


def _extent(
    dataset: CocoDataset, index: int, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    """Returns the box around an object's outline in the resized image, float64 [4].

    Of the outline and not of its pixels: at a small size thin parts have none.
    """
    segmentations = dataset.segmentations
    if runs := segmentations.run_lengths(index):
        x, y, w, h = coco_mask.toBbox({"size": list(old), "counts": runs})
        points = np.array([[x, y], [x + w, y + h]])
    else:
        points = np.concatenate(segmentations.polygons(index)).reshape(-1, 2)
    points = np.clip(points, 0, [old[1], old[0]]) * [new[1] / old[1], new[0] / old[0]]
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _outline(
    dataset: CocoDataset, index: int, old: tuple[int, int], new: tuple[int, int]
) -> tuple[bool, float]:
    """Returns whether an outline crosses itself, and how far it leaves the image."""
    polygons = _scaled(dataset.segmentations.polygons(index), old, new)
    crossing, outside = False, 0.0
    for polygon in polygons:
        points = polygon.reshape(-1, 2)
        beyond = np.concatenate([-points, points - [new[1], new[0]]])
        outside = max(outside, float(beyond.max()))
        x, y = points.T
        net = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        around = np.hypot(*(points - np.roll(points, -1, axis=0)).T).sum()
        flat: Any = [polygon]
        drawn: Any = coco_mask.frPyObjects(flat, *new)
        covered = int(coco_mask.area(drawn[0]))
        # Where an outline runs the other way round, its area counts negative; drawing
        # fills it. Half of the edge's pixels may be drawn beyond the outline.
        crossing |= bool(covered - net > 0.1 * covered + 0.75 * around)
    return crossing, outside


def _boxes(
    dataset: CocoDataset, image: np.ndarray, index: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Returns the annotated boxes at the network's size, clipped, float32 [A, 4]."""
    size = sizes[image]
    old = np.stack([dataset.widths[image], dataset.heights[image]], axis=-1)
    scale = np.tile(size[:, ::-1] / old, 2)
    limit = np.tile(size[:, ::-1], 2)
    return np.clip(dataset.boxes[index] * scale, 0, limit).astype(np.float32)


def _twins(crops: Sequence[Crop | None], labels: np.ndarray) -> list[tuple[int, int]]:
    """Returns pairs of objects of one class and nearly the same mask."""
    boxes = np.array([_rectangle(c) for c in crops], float).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=-1)
    union = areas[:, None] + areas[None] - both
    near = (both > 0.8 * union) & (labels[:, None] == labels[None]) & (both > 0)
    pairs = np.argwhere(np.triu(near, 1)).tolist()
    return [(a, b) for a, b in pairs if mask_iou(crops[a], crops[b]) >= SAME_IOU]


def _rectangle(crop: Crop | None) -> tuple[int, int, int, int]:
    if crop is None:
        return 0, 0, 0, 0
    h, w = crop.pixels.shape
    return crop.left, crop.top, crop.left + w, crop.top + h


def mask_iou(a: Crop | None, b: Crop | None) -> float:
    """Returns the intersection of two masks over their union."""
    if a is None or b is None:
        return 0.0
    x0, y0, x1, y1 = np.maximum(_rectangle(a)[:2], _rectangle(b)[:2]).tolist() + (
        np.minimum(_rectangle(a)[2:], _rectangle(b)[2:]).tolist()
    )
    parts = [c.pixels[y0 - c.top : y1 - c.top, x0 - c.left : x1 - c.left] > 0 for c in (a, b)]
    both = int((parts[0] & parts[1]).sum()) if x1 > x0 and y1 > y0 else 0
    return both / (int(a.pixels.sum()) + int(b.pixels.sum()) - both)
