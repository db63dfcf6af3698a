"""What several views of one image found -> its objects, each once.

A view is a rectangle of the image that the network looked at: a tile, or the whole.
Masks of two views are of one object if they agree where both views look: IoU above
1/2 there, so that of two objects apart only one can agree with a third mask. Touching
objects thus never become one, even where a view took them for one. No JAX.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from solov2_jax.inference.prediction import (
    PackedMask,
    Rectangle,
    intersect,
    overlapping_pairs,
    pack,
    slices,
)

# Least IoU, where both views look, of two masks of one object.
AGREE = 0.5
# A cut object goes if others explain this share of it.
CONTAINED = 0.7
# How much of an object a view sees: all of it in a tile, all in the whole image at a
# lower resolution, or a part that the tile's border cuts off. The least is the best.
COMPLETE, COARSE, CUT = range(3)


@dataclass(frozen=True)
class ImageView:
    """Where the network looked, and the part of it that no other tile knows better."""

    window: Rectangle
    core: Rectangle  # the tiles' cores share no pixel and cover the image


@dataclass(frozen=True)
class ViewObject:
    """An object, or what one view saw of it, in the frame of the whole image."""

    mask: PackedMask
    score: float
    label: int
    views: frozenset[int]  # those that saw it
    kind: int  # COMPLETE, COARSE or CUT


@dataclass(frozen=True)
class NmsOptions:
    """How objects of different views lower each other; see `test` in the config."""

    nms_type: str
    nms_kernel: str
    nms_sigma: float
    nms_iou: float
    update_threshold: float


def merge(
    found: Sequence[ViewObject], views: Sequence[ImageView], nms: NmsOptions
) -> list[ViewObject]:
    """Returns the objects, best first.

    Those that agree become one: as the view that saw it whole has it, else joined from
    its parts. A part that other objects explain goes. Then NMS, between objects that
    no view saw both: two that one view saw have been judged by the network's own.

    Args:
      found: what each view saw, its `views` being that one.
    """
    groups = connected(len(found), pairs_of_one_object(found, views))
    objects = [merge_group([found[i] for i in group], views) for group in groups]
    objects.sort(key=lambda o: -o.score)
    pairs, common = overlaps_of_different_views(objects)
    gone = explained_fragments(objects, pairs, views)
    left = ~gone[pairs].any(axis=1)
    pairs, common = pairs[left], common[left]
    area = np.array([o.mask.area for o in objects], np.float64)
    iou = common / (area[pairs].sum(axis=1) - common)
    scores = np.array([o.score for o in objects], np.float64)
    scores = np.where(gone, 0.0, suppress(scores, pairs, iou, nms))
    kept = np.flatnonzero((scores > 0) & (scores >= nms.update_threshold))
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return [replace(objects[i], score=float(scores[i])) for i in kept.tolist()]


def candidate_pairs(objects: Sequence[ViewObject]) -> Iterator[tuple[int, int]]:
    """Yields the pairs (i, j), i < j, of one class that may overlap and no view saw both."""
    rectangles = np.array([o.mask.rectangle for o in objects], int).reshape(-1, 4)
    for i, j in overlapping_pairs(rectangles).tolist():
        if objects[i].label == objects[j].label and not objects[i].views & objects[j].views:
            yield i, j


def pairs_of_one_object(
    found: Sequence[ViewObject], views: Sequence[ImageView]
) -> Iterator[tuple[int, int]]:
    """Yields the pairs that are one object."""
    for i, j in candidate_pairs(found):
        a, b = found[i], found[j]
        shared = intersect(*(views[v].window for v in sorted(a.views | b.views)))
        window = shared and intersect(shared, _union(a.mask.rectangle, b.mask.rectangle))
        assert window, "masks that meet lie in views that meet"
        one, two = a.mask.within(window), b.mask.within(window)
        if (one & two).sum() > AGREE * (one | two).sum():
            yield i, j


def connected(number: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Returns 0 .. number - 1 in groups, those that a chain of pairs connects."""
    rows, columns = np.array(list(pairs), int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(number, number))
    num_groups, group_of = connected_components(graph, directed=False)
    return [np.flatnonzero(group_of == group).tolist() for group in range(num_groups)]


def merge_group(group: Sequence[ViewObject], views: Sequence[ImageView]) -> ViewObject:
    """Returns the object that a group of views saw; its score is the best of them."""
    kind = min(f.kind for f in group)
    best = max((f for f in group if f.kind == kind), key=lambda f: f.score)
    mask = best.mask
    if kind == CUT and len(group) > 1:
        mask = join_cut_masks(group, views) or mask
    score = max(f.score for f in group)
    seen = frozenset().union(*(f.views for f in group))
    return ViewObject(mask, score, best.label, seen, kind)


def join_cut_masks(group: Sequence[ViewObject], views: Sequence[ImageView]) -> PackedMask | None:
    """Returns the mask that parts of an object make; None if no pixel is left.

    In the core of a part's view, that view alone decides, because it sees the pixel
    farthest from its border; elsewhere any part may have it.
    """
    y0, x0, y1, x1 = group[0].mask.rectangle
    for part in group[1:]:
        y0, x0, y1, x1 = _union((y0, x0, y1, x1), part.mask.rectangle)
    canvas = np.zeros((y1 - y0, x1 - x0), bool)
    seen = frozenset().union(*(part.views for part in group))
    for part in group:
        pixels = part.mask.unpack().copy()
        for view in seen - part.views:
            core = intersect(views[view].core, part.mask.rectangle)
            if core is not None:
                pixels[slices(core, part.mask.rectangle)] = False
        canvas[slices(part.mask.rectangle, (y0, x0, y1, x1))] |= pixels
    return pack(canvas, y0, x0)


def overlaps_of_different_views(objects: Sequence[ViewObject]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs (better, worse) that overlap, int [p, 2], and their pixels.

    Args:
      objects: best first.
    """
    pairs, common = [], []
    for i, j in candidate_pairs(objects):
        a, b = objects[i].mask, objects[j].mask
        window = intersect(a.rectangle, b.rectangle)
        assert window is not None
        pixels = int((a.within(window) & b.within(window)).sum())
        if pixels:
            pairs.append((i, j))
            common.append(pixels)
    return np.array(pairs, int).reshape(-1, 2), np.array(common, np.float64)


def explained_fragments(
    objects: Sequence[ViewObject], pairs: np.ndarray, views: Sequence[ImageView]
) -> np.ndarray:
    """Returns which cut objects most of whose pixels others explain, bool [n].

    A pixel is explained by an object that a view saw whole, by a larger cut one, and by
    lying in the core of a view that is none of the object's: that one knows it better.
    """
    gone = np.zeros(len(objects), bool)
    beside: list[list[int]] = [[] for _ in objects]
    for i, j in pairs.tolist():
        beside[i].append(j)
        beside[j].append(i)
    for i, part in enumerate(objects):
        if part.kind != CUT:
            continue
        rectangle, own = part.mask.rectangle, part.mask.unpack()
        known = np.zeros(own.shape, bool)
        for core in (intersect(views[v].core, rectangle) for v in part.views):
            if core is not None:
                known[slices(core, rectangle)] = True
        covered = ~known
        for other in (objects[j] for j in beside[i]):
            if other.kind != CUT or other.mask.area > part.mask.area:
                covered |= other.mask.within(rectangle)
        gone[i] = (covered & own).sum() >= CONTAINED * part.mask.area
    return gone


def suppress(scores: np.ndarray, pairs: np.ndarray, iou: np.ndarray, nms: NmsOptions) -> np.ndarray:
    """Returns the scores after NMS; 0 where mask NMS removes an object.

    Source: the same formulas as `nms.matrix_nms` and `nms.mask_nms`, over the few pairs
    that overlap instead of all.

    Args:
      scores: best first, float [n].
      pairs: (better, worse), int [p, 2], ordered; `iou` of each.
    """
    better, worse = pairs.T
    if nms.nms_type == "mask":
        kept = np.ones(len(scores), bool)
        for i, j in pairs[iou > nms.nms_iou].tolist():
            if kept[i]:
                kept[j] = False
        return np.where(kept, scores, 0.0)
    covered = np.zeros(len(scores))
    np.maximum.at(covered, worse, iou)
    covered = covered[better]
    if nms.nms_kernel == "gaussian":
        decay = np.exp(-nms.nms_sigma * (iou**2 - covered**2))
    else:
        twin = covered >= 1
        decay = np.where(twin, 1.0, (1 - iou) / np.where(twin, 1.0, 1 - covered))
    least = np.ones(len(scores))
    np.minimum.at(least, worse, decay)
    return scores * least


def _union(a: Rectangle, b: Rectangle) -> Rectangle:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
