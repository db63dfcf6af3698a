"""Augmentations that join several images: copy and paste, mosaic, mixup.

All work on finished samples, whose outlines are still spans: objects are moved and cut,
and drawn no second time.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.data import rasterize
from solov2_jax.data.augment import Outlines, Sample
from solov2_jax.data.transforms import clear_outside, hide_points
from solov2_jax.rle import Size

# Of a mosaic: where its centre lies, over the sides; the scale of its images.
_CENTER, _SCALE = (0.3, 0.7), (0.5, 1.0)
_WEIGHT = (0.35, 0.65)  # of an image in a mixup


def copy_paste(
    host: Sample, guest: Sample, canvas: Size, rng: np.random.Generator, share: float = 0.5
) -> Sample:
    """Returns the host with some of the guest's objects on top, at a random place.

    What they hide is cut from the objects below; one that is hidden has no mask left.
    Each object keeps the scale that its image was drawn at; what reaches beyond the
    canvas is cut off. Objects of which only the box is known stay where they are.
    Where pasted objects lie beyond the host's picture, the image grows to hold them, black
    between.
    Source: Ghiasi et al. 2021, "Simple Copy-Paste", without blending.

    Args:
      canvas: (height, width) that the objects are pasted into, at least the host's.
      share: of the guest's objects, each by itself.
    """
    drawn = rng.random(len(guest.labels)) < share
    chosen = np.flatnonzero(drawn if guest.has_mask is None else drawn & guest.has_mask)
    free = np.array(canvas) - guest.size
    low, high = np.minimum(free, 0), np.maximum(free, 0)
    top, left = (low + (rng.random(2) * (high - low + 1)).astype(int)).tolist()
    above = rasterize.select_spans(guest.outlines(), chosen, len(guest.labels))
    above = rasterize.shift_spans(above, top, left, canvas)
    size = host.size
    if len(above.owner):
        size = max(size[0], int(above.bottom.max())), max(size[1], int(above.column.max()) + 1)
    image = np.zeros((*size, host.image.shape[2]), host.image.dtype)
    image[: host.size[0], : host.size[1]] = host.image
    cover = np.asarray(rasterize.spans_to_masks(above, len(chosen), size).any(axis=0))
    rows, columns = np.nonzero(cover)
    image[rows, columns] = guest.image[rows - top, columns - left]
    below = rasterize.subtract_cover(host.outlines(), cover)
    num_host, num_objects = len(host.labels), len(host.labels) + len(chosen)
    above = dataclasses.replace(above, owner=above.owner + num_host)
    spans = rasterize.concatenate_spans([below, above])
    keypoints = host.keypoints
    if keypoints is not None and guest.keypoints is not None:
        moved = guest.keypoints[chosen]
        moved[..., :2] += np.array([left, top], np.float32)
        keypoints = np.concatenate([hide_points(keypoints, cover), clear_outside(moved, size)])
    return dataclasses.replace(
        host,
        image=image,
        masks=Outlines(spans, num_objects, size),
        boxes=rasterize.bounding_boxes(spans, num_objects),
        labels=np.concatenate([host.labels, guest.labels[chosen]]),
        keypoints=keypoints,
        has_mask=None
        if host.has_mask is None
        else np.concatenate([host.has_mask, np.ones(len(chosen), bool)]),
    )


def quadrants(canvas: Size, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Returns the four parts (y0, x0, y1, x1) around a random point near the middle."""
    height, width = canvas
    y, x = (max(int(v), 1) for v in np.array(canvas) * rng.uniform(*_CENTER, 2))
    tops, lefts = ((0, y), (y, height)), ((0, x), (x, width))
    parts = [(y0, x0, y1, x1) for y0, y1 in tops for x0, x1 in lefts]
    return [p for p in parts if p[2] > p[0] and p[3] > p[1]]


def random_window(
    size: Size, planned: Size, part: Size, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns which part (x0, y0, x1, y1) of an image of `size` fills a quadrant.

    Args:
      planned: (height, width) that the image would have by itself: in the quadrant it is
        half as large to as large, or what it takes to fill it.
      part: (height, width) of the quadrant.
    """
    scale = max(rng.uniform(*_SCALE), part[0] / planned[0], part[1] / planned[1])
    shown = np.minimum(np.array(part) / (np.array(planned) * scale), 1)  # share of the image
    low = rng.random(2) * (1 - shown)
    (y0, x0), (y1, x1) = low * size, np.minimum((low + shown) * size, size)
    return float(x0), float(y0), float(x1), float(y1)


def mosaic(samples: Sequence[Sample], corners: Sequence[tuple[int, int]], canvas: Size) -> Sample:
    """Returns one sample of several, each placed with its upper left corner at (row,
    column); what reaches beyond the canvas (height, width) is cut off.

    Source: Bochkovskiy et al. 2020, "YOLOv4"; here each part is full.
    """
    first = samples[0].image
    image = np.zeros((*canvas, first.shape[2]), first.dtype)
    pieces, count, points = [], 0, []
    flags = [s.has_mask for s in samples if s.has_mask is not None]
    for sample, (top, left) in zip(samples, corners, strict=True):
        h, w = sample.size
        room = image[top : top + h, left : left + w]
        room[:] = sample.image[: room.shape[0], : room.shape[1]]
        moved = rasterize.shift_spans(sample.outlines(), top, left, canvas)
        pieces.append(dataclasses.replace(moved, owner=moved.owner + count))
        count += len(sample.labels)
        if sample.keypoints is not None:
            moved_points = sample.keypoints.copy()
            moved_points[..., :2] += np.array([left, top], np.float32)
            points.append(clear_outside(moved_points, canvas))
    spans = rasterize.concatenate_spans(pieces)
    return dataclasses.replace(
        samples[0],
        image=image,
        masks=Outlines(spans, count, canvas),
        boxes=rasterize.bounding_boxes(spans, count),
        labels=np.concatenate([s.labels for s in samples]),
        keypoints=np.concatenate(points) if points else None,
        has_mask=None if samples[0].has_mask is None else np.concatenate(flags),
    )


def mixup(host: Sample, guest: Sample, rng: np.random.Generator) -> Sample:
    """Returns both images over each other, weighted, with the objects of both.

    Where only one of them is, the other counts as black.
    Source: Zhang et al. 2018, "mixup", with the weights near a half that detectors use.
    """
    weight = rng.uniform(*_WEIGHT)
    canvas = max(host.size[0], guest.size[0]), max(host.size[1], guest.size[1])
    both = mosaic((host, guest), ((0, 0), (0, 0)), canvas)
    image = np.zeros(both.image.shape, np.float32)
    for sample, share in ((host, weight), (guest, 1 - weight)):
        h, w = sample.size
        image[:h, :w] += np.float32(share) * sample.image
    if host.image.dtype == np.uint8:
        image = np.rint(image).astype(np.uint8)
    both.image = image
    return both
