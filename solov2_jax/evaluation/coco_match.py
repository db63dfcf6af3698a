"""Which detection finds which object: COCO's greedy matching, many images at once.

A detection takes the free object it overlaps most, best score first, for each IoU
threshold and size range. pycocotools does this in four nested Python loops; here the
loop runs over the ranks of detections, and every (image, class) pair, threshold, size
range and object is an axis of an array. The result is the same, match for match.
Source: pycocotools cocoeval.py, COCOeval.computeIoU and evaluateImg.


Mask IoU of every detection with every object of its image, whatever the class."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params

from solov2_jax.evaluation.coco_tables import DetectionTable, Kind, ObjectTable, rle

_DEFAULT = Params("segm")
IOU_THRESHOLDS = np.asarray(_DEFAULT.iouThrs)
# Areas [A, 2] of all, small, medium and large objects; both ends belong to a range.
AREA_RANGES = np.asarray(_DEFAULT.areaRng, float)
# Elements of the largest array that is worked on at once.
_BATCH_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class Matches:
    """Shapes: N detections, G objects, A size ranges, T IoU thresholds."""

    # The object that a detection finds, its place in `ObjectTable`, or -1; int32 [N, A, T].
    object: np.ndarray
    ignored: np.ndarray  # bool [N, A, T]: a detection that counts neither way
    object_ignored: np.ndarray  # bool [G, A]: crowds and other sizes


@dataclass(frozen=True)
class Pair:
    """Detections and objects of one image and class, and their overlap."""

    detections: np.ndarray  # int64 [D], those that can match at all
    objects: slice
    iou: np.ndarray  # float64 [D, G]


def match(objects: ObjectTable, found: DetectionTable, kind: Kind) -> Matches:
    """Returns the matches of masks ("segm") or boxes ("bbox")."""
    a, t = len(AREA_RANGES), len(IOU_THRESHOLDS)
    outside = _outside(objects.area)
    object_ignored = outside | objects.crowd[:, None]
    matched = np.full((len(found), a, t), -1, np.int32)
    for batch in _batches(list(overlaps(objects, found, kind))):
        _match_batch(batch, objects.crowd, object_ignored, matched)
    none = matched < 0
    ignored = none & _outside(found.area(kind))[:, :, None]
    n, ranges, _ = np.nonzero(~none)
    ignored[~none] = object_ignored[matched[~none], ranges]
    return Matches(matched, ignored, object_ignored)


def overlaps(objects: ObjectTable, found: DetectionTable, kind: Kind) -> Iterator[Pair]:
    """Yields each image and class that has detections which may match an object."""
    if not len(objects) or not len(found):
        return
    images = 1 + max(objects.image.max(), found.image.max())
    keys = objects.label.astype(np.int64) * images + objects.image
    theirs = found.label.astype(np.int64) * images + found.image
    pairs, starts = np.unique(keys, return_index=True)
    stops = np.append(starts[1:], len(keys))
    first, last = (np.searchsorted(theirs, pairs, side) for side in ("left", "right"))
    shapes = objects.masks if kind == "segm" else objects.boxes
    other = found.masks if kind == "segm" else found.boxes
    crowd = objects.crowd.astype(np.uint8)
    columns = (starts, stops, first, last)
    for a, b, c, d in zip(*(x.tolist() for x in columns), strict=True):
        if c == d:
            continue
        iou = np.asarray(rle.iou(other[c:d], shapes[a:b], crowd[a:b].tolist()))
        useful = np.flatnonzero(iou.max(axis=1) >= IOU_THRESHOLDS[0])
        if len(useful):
            yield Pair(c + useful, slice(a, b), iou[useful])


def _outside(area: np.ndarray) -> np.ndarray:
    """Returns whether an area lies outside of each size range, bool [N, A]."""
    low, high = AREA_RANGES.T
    return (area[:, None] < low) | (area[:, None] > high)


def _batches(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Yields pairs of about one number of objects, most detections first."""

    def width(pair: Pair) -> int:
        return 1 << (pair.iou.shape[1] - 1).bit_length()

    pairs.sort(key=lambda p: (width(p), -len(p.iou)))
    batch: list[Pair] = []
    for pair in pairs:
        size = width(pair) * len(AREA_RANGES) * len(IOU_THRESHOLDS)
        full = batch and (len(batch) + 1) * size > _BATCH_ELEMENTS
        if batch and (full or width(batch[0]) != width(pair)):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _match_batch(
    batch: list[Pair], crowd: np.ndarray, ignored: np.ndarray, matched: np.ndarray
) -> None:
    """Fills in `matched` [N, A, T] for the detections of a batch of pairs.

    Shapes: P pairs with at most D detections and G objects each; A, T as above.
    """
    d = max(len(p.iou) for p in batch)
    g = max(p.iou.shape[1] for p in batch)
    a, t = len(AREA_RANGES), len(IOU_THRESHOLDS)
    iou = np.full((len(batch), d, g), -1.0)
    many = np.zeros((len(batch), g), bool)  # crowds can be found again and again
    aside = np.ones((len(batch), a, g), bool)
    for i, pair in enumerate(batch):
        h, w = pair.iou.shape
        iou[i, :h, :w] = pair.iou
        many[i, :w] = crowd[pair.objects]
        aside[i, :, :w] = ignored[pair.objects].T
    # The place of each object when sorted by overlap: of equal ones the later wins.
    order = np.argsort(iou, axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(g), axis=-1)
    least = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    counts = np.array([len(p.iou) for p in batch])
    best = np.zeros((len(batch), d, a, t), np.int16)  # of the object, plus 1
    taken = np.zeros((len(batch), a, t, g), bool)
    for k in range(d):
        n = int((counts > k).sum())  # the batch is sorted by counts
        fits = iou[:n, k, None, :] >= least[:, None]  # [n, T, G]
        free = fits[:, None] & ~taken[:n]  # [n, A, T, G]
        # An object that does not count is taken only when no other one fits.
        worth = 1 + place[:n, k, None] + g * ~aside[:n]  # [n, A, G]
        value = np.where(free, worth[:, :, None].astype(np.int16), np.int16(0))
        winner = value.argmax(axis=-1)  # [n, A, T]
        found = np.take_along_axis(value, winner[..., None], -1) > 0
        best[:n, k] = np.where(found[..., 0], winner + 1, 0)
        chosen = found & (winner[..., None] == np.arange(g))
        taken[:n] |= chosen & ~many[:n, None, None]
    for i, pair in enumerate(batch):
        rows = best[i, : len(pair.iou)].astype(np.int32)
        places = np.where(rows > 0, rows - 1 + pair.objects.start, -1)
        matched[pair.detections] = places


@dataclass(frozen=True)
class ImageOverlap:
    """One image's detections, best score first, and objects, as places in columns."""

    image: int
    found: np.ndarray  # int64 [D]
    objects: np.ndarray  # int64 [G]
    # float64 [D, G]; with a crowd, the share of the detection that lies in it.
    iou: np.ndarray


def image_overlaps(objects: ObjectTable, found: DetectionTable) -> Iterator[ImageOverlap]:
    """Yields every image that has a detection or an object, in order."""
    of_objects = _by_image(objects.image, np.arange(len(objects)))
    of_found = _by_image(found.image, -found.score)
    nothing = np.zeros(0, np.int64)
    for image in sorted(of_objects.keys() | of_found.keys()):
        g, d = of_objects.get(image, nothing), of_found.get(image, nothing)
        iou = np.zeros((len(d), len(g)))
        if iou.size:
            theirs = [found.masks[i] for i in d.tolist()]
            ours = [objects.masks[i] for i in g.tolist()]
            crowd = objects.crowd[g].astype(int).tolist()
            iou = np.asarray(rle.iou(theirs, ours, crowd))
        yield ImageOverlap(image, d, g, iou)


def _by_image(image: np.ndarray, key: np.ndarray) -> dict[int, np.ndarray]:
    """Returns the places of each image's entries, sorted by `key`."""
    order = np.lexsort((key, image))
    images, starts = np.unique(image[order], return_index=True)
    parts = np.split(order, starts[1:])
    return dict(zip(images.tolist(), parts, strict=bool(len(images))))
