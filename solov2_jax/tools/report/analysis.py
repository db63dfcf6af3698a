"""What goes wrong in an evaluation: pure functions on columns, at mask IoU 0.5.

Source of the kinds of errors: Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors" (2020), sections 2 and 3; here on masks, counted with COCO's
rules for crowds.


An evaluation by size of the object, by score and by image; pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.coco_match import ImageOverlap, match
from solov2_jax.evaluation.coco_tables import DetectionTable, ObjectTable

RIGHT_IOU = 0.5  # from here on, a mask is that object's
TOUCH_IOU = 0.1  # below, a mask has nothing to do with it
ERRORS = ("localisation", "class", "both", "duplicate", "background", "missed")
LOCALISATION, CLASS, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(ERRORS))
# Sides of squares of an object's area, pixels; COCO's sizes split at 32 and 96.
SIDES = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, float("inf"))


@dataclass(frozen=True)
class Outcome:
    """What became of each of N detections and G objects."""

    object: np.ndarray  # int32 [N], the object that it found, or -1
    ignored: np.ndarray  # bool [N], in a crowd: neither right nor wrong
    # With the object that it found, else the nearest one of any class; float64 [N].
    iou: np.ndarray
    error: np.ndarray  # int8 [N], place in ERRORS; -1: right or ignored
    # For localisation and class errors the object that it should have found, int64 [N].
    meant: np.ndarray
    found: np.ndarray  # bool [G], a detection of its class covers it
    missed: np.ndarray  # bool [G], not even a localisation or class error is about it

    @property
    def right(self) -> np.ndarray:
        """Returns which detections are right, bool [N]."""
        return (self.object >= 0) & ~self.ignored


def outcomes(
    objects: ObjectTable, found: DetectionTable, overlaps: Sequence[ImageOverlap]
) -> Outcome:
    """Returns what became of every detection, whatever its score."""
    matches = match(objects, found, "segm")
    right, ignored = matches.object[:, 0, 0], matches.ignored[:, 0, 0]
    n, g = len(found), len(objects)
    iou, meant = np.zeros(n), np.full(n, -1)
    error = np.full(n, -1, np.int8)
    for one in overlaps:
        plain = one.objects[~objects.crowd[one.objects]]
        if not len(one.found) or not len(plain):
            continue
        table = one.iou[:, ~objects.crowd[one.objects]]
        same = found.label[one.found][:, None] == objects.label[plain]
        own, other = np.where(same, table, 0), np.where(same, 0, table)
        best, nearest = own.max(axis=1), table.max(axis=1)
        kinds = [
            (best >= TOUCH_IOU) & (best < RIGHT_IOU),
            other.max(axis=1) >= RIGHT_IOU,
            best >= RIGHT_IOU,  # and yet not right: the object was taken
            nearest < TOUCH_IOU,
        ]
        order = [LOCALISATION, CLASS, DUPLICATE, BACKGROUND]
        error[one.found] = np.select(kinds, order, BOTH)
        target = np.where(kinds[0], own.argmax(axis=1), other.argmax(axis=1))
        meant[one.found] = np.where(kinds[0] | kinds[1], plain[target], -1)
        hit = np.flatnonzero(np.isin(right[one.found], plain))
        nearest[hit] = table[hit, np.searchsorted(plain, right[one.found[hit]])]
        iou[one.found] = nearest
    alone = (error < 0) & ~ignored
    error[alone] = BACKGROUND  # an image without objects
    fine = (right >= 0) | ignored
    error[fine], meant[fine] = -1, -1
    covered, about = np.zeros(g, bool), np.zeros(g, bool)
    covered[right[right >= 0]] = True
    about[meant[meant >= 0]] = True
    there = covered & ~objects.crowd
    missed = ~covered & ~about & ~objects.crowd
    return Outcome(right, ignored, iou, error, meant, there, missed)


@dataclass(frozen=True)
class Curve:
    """Precision and recall when detections below a score are dropped.

    Shapes: S detections that count, best score first.
    """

    score: np.ndarray  # float64 [S]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    positives: int  # objects to be found

    @property
    def best(self) -> int:
        """Returns the place of the largest F1, -1 without detections."""
        return int(self.f1.argmax()) if len(self.f1) else -1

    @property
    def threshold(self) -> float:
        """Returns the score from which on F1 is largest, cut to three digits."""
        if not len(self.f1):
            return 0.0
        return float(np.floor(self.score[self.best] * 1000) / 1000)

    def at(self, score: float) -> tuple[float, float, float]:
        """Returns precision, recall and F1 of the detections from `score` on."""
        n = int((self.score >= score).sum())
        if not n:
            return (0.0, 0.0, 0.0)
        arrays = (self.precision, self.recall, self.f1)
        return tuple(float(a[n - 1]) for a in arrays)  # pyright: ignore


def curve(score: np.ndarray, right: np.ndarray, positives: int) -> Curve:
    """Returns the curve of detections that are right or wrong, in any order."""
    order = np.argsort(-score, kind="stable")
    score, true = score[order], np.cumsum(right[order])
    number = np.arange(1, len(score) + 1)
    # Detections of one score stand or fall together: the last of them counts.
    last = np.searchsorted(-score, -score, side="right") - 1
    true, number = true[last], number[last]
    f1 = 2 * true / np.maximum(number + positives, 1)
    return Curve(score, true / number, true / max(positives, 1), f1, positives)


def curves(
    objects: ObjectTable, found: DetectionTable, outcome: Outcome, classes: int
) -> tuple[Curve, list[Curve]]:
    """Returns the curve of all classes together and that of each class."""
    counted = ~outcome.ignored
    plain = ~objects.crowd

    def of(which: np.ndarray, those: np.ndarray) -> Curve:
        use = counted & which
        return curve(found.score[use], outcome.right[use], int((plain & those).sum()))

    each = [of(found.label == k, objects.label == k) for k in range(classes)]
    everything = np.ones(len(found), bool), np.ones(len(objects), bool)
    return of(*everything), each


def average_precision(score: np.ndarray, right: np.ndarray, positives: int) -> float:
    """Returns COCO's AP: the mean over 101 recalls of the best precision from there."""
    if not positives:
        return 1.0
    order = np.argsort(-score, kind="stable")
    true = np.cumsum(right[order]).astype(float)
    precision = true / np.arange(1, len(true) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    recalls = np.linspace(0, 1, 101)
    return float(best[np.searchsorted(true / positives, recalls)].mean())


@dataclass(frozen=True)
class ErrorSplit:
    """How many errors there are of a kind, and what they cost."""

    counts: dict[str, int]  # by ERRORS; `missed` counts objects
    ap50: float
    gains: dict[str, float]  # AP50 without the errors of one kind, minus `ap50`


def error_split(
    objects: ObjectTable, found: DetectionTable, outcome: Outcome, classes: int
) -> ErrorSplit:
    """Returns the errors by kind, and by how much AP50 rises when one kind is mended.

    Mended means: a localisation or class error finds the object that it meant, unless
    that is found already, and then it is dropped; other wrong detections are dropped;
    missed objects are not asked for.
    """
    positives = np.bincount(objects.label[~objects.crowd], minlength=classes)
    asked = np.flatnonzero(positives)
    label, right = found.label, outcome.right
    keep = ~outcome.ignored

    def ap50(label, right, keep, positives) -> float:
        values = []
        for k in asked:
            use = keep & (label == k)
            value = average_precision(found.score[use], right[use], int(positives[k]))
            values.append(value)
        return float(np.mean(values)) if values else 0.0

    base = ap50(label, right, keep, positives)
    counts, gains = {}, {}
    for kind, name in enumerate(ERRORS):
        if kind == MISSED:
            missed = np.bincount(objects.label[outcome.missed], minlength=classes)
            counts[name] = int(outcome.missed.sum())
            better = ap50(label, right, keep, positives - missed)
        else:
            wrong = outcome.error == kind
            counts[name] = int(wrong.sum())
            mended = _mended(found, outcome, wrong)
            moved = label.copy()
            moved[mended] = objects.label[outcome.meant[mended]]
            better = ap50(moved, right | mended, keep & (~wrong | mended), positives)
        gains[name] = better - base
    return ErrorSplit(counts, base, gains)


def errors_from(
    objects: ObjectTable, found: DetectionTable, outcome: Outcome, threshold: float
) -> dict[str, int]:
    """Returns how many errors there are from a score on; missed: objects not found."""
    use = found.score >= threshold
    counts = np.bincount(outcome.error[use & (outcome.error >= 0)], minlength=MISSED + 1)
    hits = int((use & outcome.right).sum())
    counts[MISSED] = int((~objects.crowd).sum()) - hits
    return dict(zip(ERRORS, counts.tolist(), strict=True))


def _mended(found: DetectionTable, outcome: Outcome, wrong: np.ndarray) -> np.ndarray:
    """Returns which wrong detections become right when they find what they meant."""
    mended = np.zeros(len(wrong), bool)
    places = np.flatnonzero(wrong & (outcome.meant >= 0))
    places = places[~outcome.found[outcome.meant[places]]]
    places = places[np.argsort(-found.score[places], kind="stable")]
    _, first = np.unique(outcome.meant[places], return_index=True)
    mended[places[first]] = True
    return mended


def confusion_matrix(
    objects: ObjectTable,
    found: DetectionTable,
    overlaps: Sequence[ImageOverlap],
    ignored: np.ndarray,
    threshold: float,
    classes: int,
) -> np.ndarray:
    """Returns counts [K + 1, K + 1]: annotated class (rows) by predicted (columns).

    Objects and detections pair up by their overlap, largest first, whatever their
    classes. The last row holds detections of nothing, the last column missed objects.

    Args:
      ignored: bool [N], detections that do not count, see `Outcome`.
      threshold: detections with a lower score are left out.
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for one in overlaps:
        use = (found.score[one.found] >= threshold) & ~ignored[one.found]
        plain = ~objects.crowd[one.objects]
        table = one.iou[use][:, plain]
        theirs = found.label[one.found[use]]
        ours = objects.label[one.objects[plain]]
        same = theirs[:, None] == ours
        d, g = np.nonzero(table >= RIGHT_IOU)
        order = np.lexsort((~same[d, g], -table[d, g]))
        free_d, free_g = np.ones(len(theirs), bool), np.ones(len(ours), bool)
        for i, j in zip(d[order].tolist(), g[order].tolist(), strict=True):
            if free_d[i] and free_g[j]:
                free_d[i] = free_g[j] = False
                matrix[ours[j], theirs[i]] += 1
        matrix[:-1, classes] += np.bincount(ours[free_g], minlength=classes)
        matrix[classes, :-1] += np.bincount(theirs[free_d], minlength=classes)
    return matrix


@dataclass(frozen=True)
class SizeRow:
    """Objects whose area is that of squares with sides in [low, high), pixels."""

    low: float
    high: float
    objects: int
    found: int  # with IoU 0.5 and at least the threshold's score
    mean_iou: float  # of those found; 0 without any


def by_size(
    objects: ObjectTable, found: DetectionTable, outcome: Outcome, threshold: float
) -> list[SizeRow]:
    """Returns a row for each range of `SIDES`, crowds left out."""
    use = outcome.right & (found.score >= threshold)
    iou = np.zeros(len(objects))
    iou[outcome.object[use]] = outcome.iou[use]
    side = np.sqrt(objects.area)
    rows = []
    for low, high in zip(SIDES[:-1], SIDES[1:], strict=True):
        inside = (side >= low) & (side < high) & ~objects.crowd
        hit = inside & (iou > 0)
        mean = float(iou[hit].mean()) if hit.any() else 0.0
        rows.append(SizeRow(low, high, int(inside.sum()), int(hit.sum()), mean))
    return rows


@dataclass(frozen=True)
class Calibration:
    """Does a score of 0.7 mean that 7 of 10 are right? By bins of the score."""

    edges: np.ndarray  # float64 [bins + 1]
    count: np.ndarray  # int64 [bins]
    score: np.ndarray  # float64 [bins], mean; 0 in an empty bin
    right: np.ndarray  # float64 [bins], share of right detections
    error: float  # mean of |score - right|, weighted by count


def calibration(found: DetectionTable, outcome: Outcome, bins: int = 10) -> Calibration:
    """Returns how the share of right detections follows their scores."""
    use = ~outcome.ignored
    score, right = np.clip(found.score[use], 0, 1), outcome.right[use]
    edges = np.linspace(0, 1, bins + 1)
    place = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    per = np.maximum(count, 1)
    mean = np.bincount(place, score, minlength=bins) / per
    share = np.bincount(place, right, minlength=bins) / per
    error = float((count * np.abs(mean - share)).sum() / max(count.sum(), 1))
    return Calibration(edges, count, mean, share, error)


@dataclass(frozen=True)
class ImageRow:
    """One image's detections from a score on."""

    image_id: int
    objects: int
    right: int
    false: int

    @property
    def missed(self) -> int:
        """Returns the number of objects that were not found."""
        return self.objects - self.right

    @property
    def f1(self) -> float:
        """Returns F1; 1 where there is nothing and nothing was found."""
        total = self.objects + self.right + self.false
        return 2 * self.right / total if total else 1.0


def by_image(
    objects: ObjectTable,
    found: DetectionTable,
    outcome: Outcome,
    threshold: float,
    image_ids: list[int],
) -> list[ImageRow]:
    """Returns a row for every image, in the order of `image_ids`."""
    use = (found.score >= threshold) & ~outcome.ignored
    n = len(image_ids)

    def count(images: np.ndarray) -> list[int]:
        return np.bincount(images, minlength=n).tolist()

    columns = (
        count(objects.image[~objects.crowd]),
        count(found.image[use & outcome.right]),
        count(found.image[use & ~outcome.right]),
    )
    return [ImageRow(i, *row) for i, *row in zip(image_ids, *columns, strict=True)]


def worst_first(rows: list[ImageRow]) -> list[ImageRow]:
    """Returns the images that were got wrong, lowest F1 first, then most errors."""
    wrong = [r for r in rows if r.missed + r.false]
    return sorted(wrong, key=lambda r: (r.f1, -(r.missed + r.false), r.image_id))
