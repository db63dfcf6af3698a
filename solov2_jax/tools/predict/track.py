"""Objects of a video's frames -> the same number for the same object.

Each track predicts where its object is now; detections are assigned to tracks in two
rounds, first by the IoU of their masks, moved with the prediction, then by how near they
are for their size, so that fast objects and those that were missing are found again.

Source: SORT (Bewley et al. 2016), and the distance of the second round after BoT-SORT's
wider gates; masks instead of boxes, a constant velocity with a gain instead of a Kalman
filter, no appearance.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as rle
from scipy.optimize import linear_sum_assignment

from solov2_jax.inference.prediction import Prediction

MIN_IOU = 0.3
# Frames that an object may be gone.
PATIENCE = 30
# Second round: most distance of a detection from the predicted place, in the object's
# own sizes (square root of its box's area); a track without a speed yet may be farther.
REACH, FIRST_REACH = 2.0, 2.5
SIZE_RATIO = 2.0  # most ratio of both sizes
GAIN = 0.5  # share of a new velocity in the average


@dataclass
class Track:
    """An object that was seen."""

    number: int
    label: int
    box: np.ndarray  # (x0, y0, x1, y1) in the last frame that showed it
    last: int  # that frame
    velocity: np.ndarray | None = None  # pixels per frame; None: seen once

    def place(self, frame: int) -> np.ndarray:
        """Returns the box where the object should be in a frame."""
        if self.velocity is None:
            return self.box
        return self.box + np.tile(self.velocity * (frame - self.last), 2)

    def see(self, box: np.ndarray, frame: int) -> None:
        """Takes a detection as the object's next place."""
        moved = (center(box) - center(self.box)) / (frame - self.last)
        before = moved if self.velocity is None else self.velocity
        self.velocity = before + GAIN * (moved - before)
        self.box, self.last = box, frame


class Tracker:
    """Numbers the objects of one video from 0; give it every frame, in order.

    An object never continues a track of another class. Of all assignments of a round the
    one with the largest sum is taken (Hungarian method). What is left starts a track.

    Args:
      min_iou: of a mask and the track's box or mask in the first round.
      patience: frames that an object may be gone.
    """

    def __init__(self, min_iou: float = MIN_IOU, patience: int = PATIENCE):
        self.min_iou, self.patience = min_iou, patience
        self._tracks: list[Track] = []
        self._masks: dict[int, Any] = {}  # by number, the last frame's run lengths
        self._size: tuple[int, ...] = ()
        self._frame = self._next = 0

    def update(self, prediction: Prediction) -> Prediction:
        """Returns the frame's prediction with `tracks`."""
        size = prediction.masks.shape[1:]
        if size != self._size:  # another picture: no mask has anything to do with it
            self._size, self._tracks, self._masks = size, [], {}
        boxes = np.asarray(prediction.boxes, np.float64)
        masks = [
            {"size": list(size), "counts": counts.encode("ascii")} for counts in prediction.encode()
        ]
        labels = prediction.labels.tolist()
        numbers = np.full(len(labels), -1)
        for detection, track in self._assign(boxes, masks, labels):
            self._tracks[track].see(boxes[detection], self._frame)
            numbers[detection] = self._tracks[track].number
        for detection in np.flatnonzero(numbers < 0).tolist():
            numbers[detection] = self._next
            track = Track(self._next, labels[detection], boxes[detection], self._frame)
            self._tracks.append(track)
            self._next += 1
        gone = self._frame - self.patience
        self._tracks = [track for track in self._tracks if track.last > gone]
        self._masks = dict(zip(numbers.tolist(), masks, strict=True))
        self._frame += 1
        return replace(prediction, tracks=numbers)

    def _assign(
        self, boxes: np.ndarray, masks: list[Any], labels: list[int]
    ) -> list[tuple[int, int]]:
        """Returns which detection continues which track, as places in both lists."""
        if not labels or not self._tracks:
            return []
        places = np.array([track.place(self._frame) for track in self._tracks])
        same = np.array(labels)[:, None] == [track.label for track in self._tracks]
        overlap = np.maximum(box_iou(boxes, places), self._mask_iou(masks))
        pairs = best_pairs(np.where(same & (overlap >= self.min_iou), overlap, 0.0))
        near = np.where(same, self._nearness(boxes, places), 0.0)
        for detection, track in pairs:
            near[detection] = near[:, track] = 0.0
        return pairs + best_pairs(near)

    def _mask_iou(self, masks: list[Any]) -> np.ndarray:
        """Returns the IoU of masks with those of the last frame, 0 for tracks not in it."""
        known = [i for i, track in enumerate(self._tracks) if track.number in self._masks]
        iou = np.zeros((len(masks), len(self._tracks)))
        if known:
            before = [self._masks[self._tracks[i].number] for i in known]
            iou[:, known] = rle.iou(masks, before, [0] * len(before))
        return iou

    def _nearness(self, boxes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Returns from 1 at the predicted place to 0 where it is too far or another size."""
        moved = np.hypot(*(center(boxes)[:, None] - center(places)).T).T
        sizes, expected = sides(boxes)[:, None], sides(places)
        slow = np.array([track.velocity is not None for track in self._tracks])
        reach = np.where(slow, REACH, FIRST_REACH) * expected
        ratio = np.maximum(sizes, expected) / np.maximum(np.minimum(sizes, expected), 1e-9)
        return np.where(ratio <= SIZE_RATIO, np.maximum(1 - moved / reach, 0.0), 0.0)


def center(boxes: np.ndarray) -> np.ndarray:
    """Returns the middles of boxes [..., 4], x y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def sides(boxes: np.ndarray) -> np.ndarray:
    """Returns the square roots of boxes' areas, at least 1 pixel."""
    return np.sqrt(np.maximum(np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1), 1.0))


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the IoU of all pairs of boxes, [n, m]."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas, other_areas = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, others))
    return common / np.maximum(areas[:, None] + other_areas - common, 1e-9)


def best_pairs(scores: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs with the largest sum of scores; none of score 0."""
    rows, columns = linear_sum_assignment(scores, maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(row, column) for row, column in pairs if scores[row, column] > 0]
