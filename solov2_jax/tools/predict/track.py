"""Objects of a video's frames -> the same number for the same object, by mask IoU.

No motion model and no appearance: an object must overlap itself from one frame to the
next, or to the one in which it comes back.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as rle
from scipy.optimize import linear_sum_assignment

from solov2_jax.inference.prediction import Prediction

MIN_IOU = 0.3
# Frames that an object may be gone.
PATIENCE = 15


@dataclass
class Track:
    """An object that was seen."""

    number: int
    label: int
    mask: Any  # COCO's run lengths, of the last frame that showed it
    last: int  # that frame


class Tracker:
    """Numbers the objects of one video from 0; give it every frame, in order.

    An object and a track of the same class may belong together if their masks' IoU is
    at least `min_iou`; of all such pairings the one with the largest sum of IoU is
    taken (Hungarian method). What is left starts a track.
    """

    def __init__(self, min_iou: float = MIN_IOU, patience: int = PATIENCE):
        self.min_iou, self.patience = min_iou, patience
        self._tracks: list[Track] = []
        self._size: tuple[int, ...] = ()
        self._frame = self._next = 0

    def update(self, prediction: Prediction) -> Prediction:
        """Returns the frame's prediction with `tracks`."""
        size = prediction.masks.shape[1:]
        if size != self._size:  # another picture: no mask has anything to do with it
            self._size, self._tracks = size, []
        masks: list[Any] = [
            {"size": list(size), "counts": counts.encode("ascii")} for counts in prediction.encode()
        ]
        labels = prediction.labels.tolist()
        numbers = np.full(len(masks), -1)
        for found, known in self._pairs(masks, labels):
            track = self._tracks[known]
            track.mask, track.last = masks[found], self._frame
            numbers[found] = track.number
        for found in np.flatnonzero(numbers < 0).tolist():
            numbers[found] = self._next
            track = Track(self._next, labels[found], masks[found], self._frame)
            self._tracks.append(track)
            self._next += 1
        gone = self._frame - self.patience
        self._tracks = [track for track in self._tracks if track.last > gone]
        self._frame += 1
        return replace(prediction, tracks=numbers)

    def _pairs(self, masks: list[Any], labels: list[int]) -> list[tuple[int, int]]:
        """Returns which mask continues which track, as places in both lists."""
        if not masks or not self._tracks:
            return []
        known = [track.mask for track in self._tracks]
        iou = np.asarray(rle.iou(masks, known, [0] * len(known)))
        same = np.array(labels)[:, None] == [track.label for track in self._tracks]
        iou = np.where(same & (iou >= self.min_iou), iou, 0.0)
        rows, columns = linear_sum_assignment(iou, maximize=True)
        pairs = zip(rows.tolist(), columns.tolist(), strict=True)
        return [(row, column) for row, column in pairs if iou[row, column] > 0]
