"""Every object as training will see it: drawn at the network's size, then measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.rasterize import (
    bounding_boxes,
    draw_spans,
    mass_centers,
    select_spans,
    spans_to_masks,
    stride4_masks,
)
from solov2_jax.data.transforms import Affine, shortest_edge_sizes
from solov2_jax.rle import InvalidRLE, Spans

# Two objects of one class whose masks have this IoU are one object, annotated twice.
SAME_IOU = 0.9
_rle: Any = coco_mask  # its type stubs are narrower than what it takes


@dataclasses.dataclass(frozen=True)
class MeasuredObjects:
    """A objects in pixels of the network's input, sorted by image."""

    image: np.ndarray  # int [A], index in the data set
    index: np.ndarray  # int [A], of the data set's objects
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
    columns: dict[str, list[np.ndarray]] = {}
    twins: list[tuple[int, int]] = []
    damaged: list[str] = []
    first = 0
    for i in indices:
        objects = np.arange(dataset.start[i], dataset.start[i + 1])
        affine = resize_map(dataset, i, (int(sizes[i, 0]), int(sizes[i, 1])))
        spans, undrawn = draw(dataset, objects, affine)
        damaged += undrawn
        area = np.bincount(spans.owner, spans.bottom - spans.top, len(objects)).astype(int)
        quarter = np.zeros(len(objects), int)
        for position, crop in stride4_masks(spans, affine.size):
            quarter[position] = crop.pixels.sum(dtype=int)
        outlines = [_outline(dataset, a, affine) for a in objects.tolist()]
        for name, values in (
            ("image", np.full(len(objects), i)),
            ("index", objects),
            ("box", affine.boxes(dataset.boxes[objects])),
            ("tight", _extents(dataset, objects, affine)),
            ("area", area),
            ("center", mass_centers(spans, len(objects))[0]),
            ("quarter", quarter),
            ("crossing", np.array([crossing for crossing, _ in outlines], bool)),
            ("outside", np.array([outside for _, outside in outlines], np.float32)),
        ):
            columns.setdefault(name, []).append(values)
        twins += [(first + a, first + b) for a, b in _twins(spans, dataset.labels[objects], affine)]
        first += len(objects)
    table = {name: np.concatenate(values) for name, values in columns.items()}
    return MeasuredObjects(**table, sizes=sizes, twins=tuple(twins), damaged=tuple(damaged))


def resize_map(dataset: CocoDataset, image: int, size: tuple[int, int]) -> Affine:
    """Returns the map from an image of the data set to one of another (height, width)."""
    original = int(dataset.heights[image]), int(dataset.widths[image])
    return Affine(original, original, np.eye(2, 3)).resized(size)


def draw(dataset: CocoDataset, objects: np.ndarray, affine: Affine) -> tuple[Spans, list[str]]:
    """Returns the masks of an image's objects, and which ones are damaged and left empty."""
    kept, damaged = list(range(len(objects))), []
    while True:
        try:
            spans = draw_spans(dataset.segmentations, objects[kept].tolist(), affine)
            return dataclasses.replace(spans, owner=np.array(kept, int)[spans.owner]), damaged
        except InvalidRLE as error:
            position = kept.pop(error.position)
            damaged.append(f"annotation {dataset.annotation_ids[objects[position]]}: {error}")


def _extents(dataset: CocoDataset, objects: np.ndarray, affine: Affine) -> np.ndarray:
    """Returns the boxes around objects' outlines in the resized image, float32 [n, 4].

    Of the outlines and not of their pixels: at a small size thin parts have none.
    """
    boxes = np.zeros((len(objects), 4))
    for box, index in zip(boxes, objects.tolist(), strict=True):
        if runs := dataset.segmentations.run_lengths(index):
            x, y, w, h = _rle.toBbox({"size": list(affine.original), "counts": runs})
            box[:] = x, y, x + w, y + h
        else:
            points = np.concatenate(dataset.segmentations.polygons(index)).reshape(-1, 2)
            box[:] = *points.min(axis=0), *points.max(axis=0)
    return affine.boxes(boxes)


def _outline(dataset: CocoDataset, index: int, affine: Affine) -> tuple[bool, float]:
    """Returns whether an outline crosses itself, and how far it leaves the image."""
    height, width = affine.size
    crossing, outside = False, 0.0
    for polygon in dataset.segmentations.polygons(index):
        points = affine.points(polygon.reshape(-1, 2))
        beyond = np.concatenate([-points, points - [width, height]])
        outside = max(outside, float(beyond.max()))
        x, y = points.T
        net = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        around = np.hypot(*(points - np.roll(points, -1, axis=0)).T).sum()
        covered = int(_rle.area(_rle.frPyObjects([points.ravel()], height, width))[0])
        # Where an outline runs the other way round, its area counts negative; drawing
        # fills it. Half of the edge's pixels may be drawn beyond the outline.
        crossing |= bool(covered - net > 0.1 * covered + 0.75 * around)
    return crossing, outside


def _twins(spans: Spans, labels: np.ndarray, affine: Affine) -> list[tuple[int, int]]:
    """Returns pairs of objects of one class and nearly the same mask."""
    if len(labels) < 2:
        return []
    boxes = bounding_boxes(spans, len(labels)).astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    near = _rle.iou(boxes, boxes, [0] * len(boxes)) > 0.8
    twins = []
    for pair in np.argwhere(np.triu(near & (labels[:, None] == labels), 1)):
        a, b = spans_to_masks(select_spans(spans, pair, len(labels)), 2, affine.size)
        if (a & b).sum() >= SAME_IOU * (a | b).sum():
            twins.append((int(pair[0]), int(pair[1])))
    return twins
