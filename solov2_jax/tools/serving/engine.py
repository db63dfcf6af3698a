"""Pictures -> answers, with a `Predictor`, in batches of equal shapes.

Memory is bounded: masks are pasted a few at a time and kept as run lengths, and a drawn
picture is made small before masks are pasted for it.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from PIL import Image

from solov2_jax.data.buckets import Bucket
from solov2_jax.inference.draw import draw_prediction, shrink
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import make_batches
from solov2_jax.inference.programs import paste_detections
from solov2_jax.rle import rle_encode

# Long side of a drawn picture.
DRAWN_SIDE = 1600
# Masks at the original size that exist at once.
_TOGETHER = 8


@dataclass(frozen=True)
class Job:
    """One request: its picture as the network's input, and what is asked."""

    example: dict[str, np.ndarray]
    score: float  # least one of a detection
    limit: int  # most detections
    picture: np.ndarray | None = None  # to draw on; None: answer in JSON


class Engine:
    """Answers jobs. The network's programs are compiled when it is made.

    Pasting is a program for each pair of powers of two that holds a picture: 64.

    Args:
      shapes: padded (height, width) that images go into; together they hold every one.
      batch_size: most images that are computed together.
    """

    def __init__(self, predictor: Any, shapes: Sequence[Bucket], batch_size: int):
        self.predictor = predictor
        self.shapes = tuple(shapes)
        self.sizes = batch_sizes(batch_size)
        self.class_names = predictor.class_names
        for size in self.sizes:
            predictor.compile(self.shapes, size)

    def preprocess(self, image: np.ndarray, score: float, limit: int, drawn: bool) -> Job:
        """Returns a job of a picture, RGB uint8 [H, W, 3]."""
        picture = shrink(image, DRAWN_SIDE) if drawn else None
        return Job(self.predictor.preprocess(image), score, limit, picture)

    def answer(self, jobs: Sequence[Job]) -> list[bytes]:
        """Returns the bodies of the answers: JSON, or a PNG where there is a picture.

        Jobs of one padded shape are computed together.
        """
        examples = [
            {**job.example, "image_id": np.array(i, np.int64)} for i, job in enumerate(jobs)
        ]
        size = next(n for n in self.sizes if n >= len(jobs))
        answers = [b""] * len(jobs)
        for batch in make_batches(examples, size):
            found = self.predictor.detect(batch)
            fields = jax.device_get((found.scores, found.labels, found.valid))
            for row, i in enumerate(batch["image_id"].tolist()):
                if i != -1:
                    scores, labels, valid = (field[row] for field in fields)
                    kept = np.flatnonzero(valid & (scores >= jobs[i].score))
                    one = _Found(found.soft_masks, row, kept[: jobs[i].limit])
                    values = scores[one.kept], labels[one.kept]
                    answers[i] = self._body(jobs[i], one, *values)
        return answers

    def _body(self, job: Job, found: "_Found", scores: np.ndarray, labels: np.ndarray) -> bytes:
        if job.picture is None:
            return self._json(job, found, scores, labels)
        size = job.picture.shape[:2]
        masks, boxes = found.paste(job.example["image_size"], size, self._threshold)
        there = boxes[:, 2] > boxes[:, 0]
        prediction = Prediction(*(masks[there], boxes[there], scores[there], labels[there]), 0)
        drawn = draw_prediction(job.picture, prediction, self.class_names)
        file = io.BytesIO()
        Image.fromarray(drawn).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def _json(self, job: Job, found: "_Found", scores: np.ndarray, labels: np.ndarray) -> bytes:
        height, width = (int(n) for n in job.example["original_size"])
        detections = []
        for start in range(0, len(found.kept), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            some = _Found(found.soft_masks, found.row, found.kept[part])
            masks, boxes = some.paste(job.example["image_size"], (height, width), self._threshold)
            counts = rle_encode(masks, boxes)
            for count, box, score, label in zip(
                counts, boxes, scores[part], labels[part], strict=True
            ):
                if box[2] > box[0]:
                    x0, y0, x1, y1 = (float(v) for v in box)
                    detections.append(
                        {
                            "class_name": self.class_names[int(label)],
                            "category_id": self.predictor.category_ids[int(label)],
                            "score": float(score),
                            "bbox": [x0, y0, x1 - x0, y1 - y0],
                            "segmentation": {"size": [height, width], "counts": count},
                        }
                    )
        answer = {"height": height, "width": width, "detections": detections}
        return json.dumps(answer).encode()

    @property
    def _threshold(self) -> float:
        return self.predictor.mask_threshold


@dataclass(frozen=True)
class _Found:
    """Some detections of one image of a batch, on the device."""

    soft_masks: jax.Array
    row: int
    kept: np.ndarray

    def paste(
        self, image_size: np.ndarray, size: tuple[int, int], threshold: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns masks bool [n, H, W] and boxes [n, 4] at a size."""
        arguments = (self.soft_masks, self.row, self.kept, image_size, size, threshold)
        return paste_detections(*arguments, canvas=canvas_of(size))


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the powers of two that hold a size: few programs for all sizes."""
    height, width = (max(128, 1 << (int(n) - 1).bit_length()) for n in size)
    return height, width


def batch_sizes(most: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and the largest batch: a program each."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)
