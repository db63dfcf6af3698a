"""Pictures -> answers, with a `Predictor`, in batches of equal shapes.

Memory is bounded: masks are pasted a few at a time and kept as run lengths, and a drawn
picture is made small before masks are pasted for it.
"""

import io
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from solov2_jax.data.buckets import Bucket
from solov2_jax.inference.draw import draw_prediction, shrink
from solov2_jax.inference.pasting import paste_detections, rows_on_one_device, scale_points
from solov2_jax.inference.prediction import Prediction, reaches, to_coco_results
from solov2_jax.inference.preprocess import make_batches

log = logging.getLogger(__name__)

# Long side of a drawn picture.
DRAWN_SIDE = 1600
# Masks at the original size that exist at once.
_TOGETHER = 8
# (height, width) that masks are pasted on, ascending, a program each; those of larger
# pictures part by part.
CANVASES = ((128, 128), (512, 512))


@dataclass(frozen=True)
class Job:
    """One request: its picture as the network's input, and what is asked."""

    example: dict[str, np.ndarray]
    score: float | np.ndarray  # least one of a detection, or that of each class [K]
    limit: int  # most detections
    picture: np.ndarray | None = None  # to draw on; None: answer in JSON


class Engine:
    """Answers jobs. Every program is compiled when it is made, so no request waits for one.

    A picture goes into the smallest of `shapes` for the network, and its masks into the
    smallest of `CANVASES` that holds it, or into several of the largest.

    Args:
      shapes: padded (height, width) that images go into; together they hold every one.
      batch_size: most images that a device computes together. With several devices, two
        images and more are split over them.
    """

    def __init__(self, predictor: Any, shapes: Sequence[Bucket], batch_size: int):
        self.predictor = predictor
        self.shapes = tuple(shapes)
        devices = predictor.num_devices
        several = [devices * size for size in batch_sizes(batch_size)]
        self.sizes = tuple(several if devices == 1 else [1, *several])
        self.class_names = predictor.class_names
        for shape in self.shapes:
            self._compile(shape)

    def _compile(self, shape: Bucket) -> None:
        for size in self.sizes:
            batch = {
                "image": np.zeros((size, *shape, 3), np.uint8),
                "image_size": np.full((size, 2), shape, np.int32),
            }
            found = self.predictor.detect(batch)
            soft_masks = row_of(*rows_on_one_device(found.soft_masks, 0))
        log.info("compiling %d programs that paste masks", len(CANVASES))
        for canvas in CANVASES:
            paste_detections(
                soft_masks,
                0,
                np.zeros(1, int),
                np.array(shape),
                canvas,
                self.predictor.mask_threshold,
                canvas=canvas,
                origin=(0, 0),
            )

    def preprocess(
        self, image: np.ndarray, score: float | np.ndarray, limit: int, drawn: bool
    ) -> Job:
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
            for i, image in self._detect(batch, jobs):
                picture = jobs[i].picture
                if picture is None:
                    answers[i] = self._json(image, jobs[i].example["original_size"].tolist())
                else:
                    answers[i] = self._png(image, picture)
        return answers

    def _detect(
        self, batch: dict[str, np.ndarray], jobs: Sequence[Job]
    ) -> Iterator[tuple[int, "PastedDetections"]]:
        """Yields (which job, its detections) of a batch, padding left out."""
        detections = self.predictor.detect(batch)
        found = detections
        *fields, points = jax.device_get((found.scores, found.labels, found.valid, found.keypoints))
        for row, i in enumerate(batch["image_id"].tolist()):
            if i == -1:
                continue
            scores, labels, valid = (field[row] for field in fields)
            kept = np.flatnonzero(valid & reaches(scores, labels, jobs[i].score))
            kept = kept[: jobs[i].limit]
            image = ImageDetections(
                soft_masks=row_of(*rows_on_one_device(detections.soft_masks, row)),
                image_size=jobs[i].example["image_size"],
                threshold=self.predictor.mask_threshold,
                kept=kept,
                scores=scores[kept],
                labels=labels[kept],
                keypoints=None if points is None else points[row][kept],
                skeleton=self.predictor.skeleton,
            )
            yield i, image

    def _png(self, image: "PastedDetections", picture: np.ndarray) -> bytes:
        prediction = image.paste(slice(None), picture.shape[:2])
        drawn = draw_prediction(picture, prediction, self.class_names)
        file = io.BytesIO()
        Image.fromarray(drawn).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def _json(self, image: "PastedDetections", size: Sequence[int]) -> bytes:
        height, width = size
        detections = []
        for start in range(0, len(image.kept), _TOGETHER):
            prediction = image.paste(slice(start, start + _TOGETHER), (height, width))
            results = to_coco_results(prediction, self.predictor.category_ids)
            for result, label in zip(results, prediction.labels.tolist(), strict=True):
                del result["image_id"]
                detections.append({"class_name": self.class_names[label], **result})
        answer = {"height": height, "width": width, "detections": detections}
        return json.dumps(answer).encode()


class PastedDetections(Protocol):
    """The detections of one image that are answered."""

    @property
    def kept(self) -> np.ndarray: ...  # int [n]

    def paste(self, part: slice, size: tuple[int, int]) -> Prediction: ...


@jax.jit
def row_of(batch: jax.Array, row: int | jax.Array) -> jax.Array:
    """Returns one row of a batch, the batch axis kept."""
    return jax.lax.dynamic_slice_in_dim(batch, row, 1)


@dataclass(frozen=True)
class ImageDetections:
    """The n detections of one image that are answered."""

    soft_masks: jax.Array  # [1, D, h4, w4], one program for batches of any size
    image_size: np.ndarray  # (height, width) at the network
    threshold: float
    kept: np.ndarray  # int [n], which of the D
    scores: np.ndarray  # [n]
    labels: np.ndarray  # [n]
    keypoints: np.ndarray | None = None  # [n, J, 3], at the network
    skeleton: tuple[tuple[int, int], ...] = ()

    def paste(self, part: slice, size: tuple[int, int]) -> Prediction:
        """Returns those of a part that have a pixel at a size (height, width)."""
        kept, canvas = self.kept[part], canvas_of(size)
        masks = np.zeros((len(kept), *size), bool)
        boxes = np.zeros((len(kept), 4), np.float32)
        first, end = self._reached(kept, size)
        rows, columns = (range(0, n, side) for n, side in zip(size, canvas, strict=True))
        for y, x in itertools.product(rows, columns):
            inside = np.flatnonzero(
                ((first < np.add((y, x), canvas)) & (end > np.array((y, x)))).all(1)
            )
            if not len(inside):
                continue
            part_masks, part_boxes = paste_detections(
                self.soft_masks,
                0,
                kept[inside],
                self.image_size,
                size,
                self.threshold,
                canvas=canvas,
                origin=(y, x),
            )
            masks[inside, y : y + canvas[0], x : x + canvas[1]] = part_masks
            boxes[inside] = _united(boxes[inside], part_boxes, (x, y))
        nonempty = boxes[:, 2] > boxes[:, 0]
        points = self.keypoints
        if points is not None:
            points = scale_points(points, self.image_size, np.array(size))
        return Prediction(
            masks=masks[nonempty],
            boxes=boxes[nonempty],
            scores=self.scores[part][nonempty],
            labels=self.labels[part][nonempty],
            image_id=0,
            keypoints=None if points is None else points[part][nonempty],
            skeleton=self.skeleton,
        )

    def _reached(self, kept: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first and the end (row, column) that masks may have, [n, 2] each."""
        soft = np.asarray(self.soft_masks)[0, kept] > self.threshold
        scale = 4 * np.array(size) / np.asarray(self.image_size)
        used = [np.asarray(soft.any(axis)) for axis in (2, 1)]  # rows, columns
        first = np.stack([u.argmax(1) - 1.0 for u in used], 1)
        end = np.stack([u.shape[1] - u[:, ::-1].argmax(1) + 1.0 for u in used], 1)
        return first * scale, end * scale


def _united(boxes: np.ndarray, others: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """Returns boxes that hold both, where those without area hold nothing."""
    moved = others + np.array([*shift, *shift], np.float32)
    both = np.concatenate(
        [np.minimum(boxes[:, :2], moved[:, :2]), np.maximum(boxes[:, 2:], moved[:, 2:])], 1
    )
    empty, others_empty = (b[:, 2:3] <= b[:, 0:1] for b in (boxes, others))
    return np.where(others_empty, boxes, np.where(empty, moved, both))


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest canvas that holds a size, else the largest, for its parts."""
    holding = [c for c in CANVASES if c[0] >= size[0] and c[1] >= size[1]]
    return holding[0] if holding else CANVASES[-1]


def batch_sizes(most: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and the largest batch: a program each."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)
