"""Answers with an exported network instead of a `Predictor`; the rest is `Engine`'s."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.data.buckets import Bucket
from solov2_jax.inference.prediction import Prediction, reaches
from solov2_jax.tools.export.exported import ExportedPredictor
from solov2_jax.tools.serving.engine import Engine, Job, PastedDetections

log = logging.getLogger(__name__)


class ExportedEngine(Engine):
    """An engine of an export, in batches of its size.

    Args:
      predictor: whose files are read when the engine is made.
    """

    predictor: ExportedPredictor

    def __init__(self, predictor: ExportedPredictor, shapes: Sequence[Bucket], batch_size: int):
        super().__init__(predictor, shapes, batch_size)
        self.sizes = (batch_size,)  # no other is in the files

    def _compile(self, shape: Bucket) -> None:
        log.info("reading the network for images padded to %d x %d", *shape)
        size = self.predictor.batch
        pixels = self.predictor.input.pixels
        image = np.zeros((size, *shape, pixels.channels), pixels.dtype)
        self.predictor.run(image, np.full((size, 2), shape, np.int32))

    def _detect(
        self, batch: dict[str, np.ndarray], jobs: Sequence[Job]
    ) -> Iterator[tuple[int, PastedDetections]]:
        outputs = self.predictor.run(batch["image"], batch["image_size"])
        for row, i in enumerate(batch["image_id"].tolist()):
            if i == -1:
                continue
            count = int(outputs["count"][row])
            scores, labels = outputs["scores"][row][:count], outputs["labels"][row][:count]
            kept = np.flatnonzero(reaches(scores, labels, jobs[i].score))[: jobs[i].limit]
            image_size = batch["image_size"][row]
            yield i, ExportedDetections(self.predictor, outputs, row, kept, image_size=image_size)


@dataclass(frozen=True)
class ExportedDetections:
    """The detections of one image that are answered, as a program gave them."""

    predictor: ExportedPredictor
    outputs: dict[str, np.ndarray]
    row: int
    kept: np.ndarray  # int [n]
    image_size: np.ndarray

    def paste(self, part: slice, size: tuple[int, int]) -> Prediction:
        """Returns those of a part that have a pixel at a size (height, width)."""
        return self.predictor.paste(
            self.outputs,
            self.row,
            self.kept[part],
            image_size=self.image_size,
            original=np.array(size),
        )
