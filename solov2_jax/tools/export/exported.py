"""An export's folder, run by the format's own runtime."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import InputOptions, make_batches, make_example
from solov2_jax.inference.programs import paste_detections
from solov2_jax.io import InputError, reading
from solov2_jax.tools.export.formats import Runner, find_format
from solov2_jax.tools.export.metadata import file_name, read_metadata


def input_of(metadata: dict[str, Any]) -> InputOptions:
    """Returns how images are prepared for the exported program, which normalises."""
    preprocessing = metadata["preprocessing"]
    return InputOptions(
        channel_order=preprocessing["channel_order"],
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        min_size=preprocessing["min_size"],
        max_size=preprocessing["max_size"],
        buckets=tuple((h, w) for h, w in metadata["files"].values()),
    )


class ExportedPredictor:
    """Predicts with an export's files: an `ImagePredictor` like `Predictor`."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.metadata = read_metadata(folder)
        self.class_names = tuple(self.metadata["classes"]["names"])
        self.category_ids = tuple(self.metadata["classes"]["ids"])
        self.batch = int(self.metadata["batch"])
        self._folder = Path(folder)
        self._format = find_format(self.metadata["format"])
        self._runners: dict[tuple[int, int], Runner] = {}
        self.input = input_of(self.metadata)

    def run(self, image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs of a batch of one exported shape."""
        height, width = image.shape[1:3]
        if (height, width) not in self._runners:
            path = self._folder / file_name((height, width), self.metadata["format"])
            if not path.exists():
                raise InputError(f"{path}: the export has no file for this shape")
            outputs = tuple(self.metadata["outputs"])
            with reading(path, f"an export ({self.metadata['format']})", "Export again"):
                self._runners[height, width] = self._format.read(path, outputs)
        return self._runners[height, width](image, image_size)

    def predict_images(
        self, images: Iterable[np.ndarray | str], batch_size: int = 1
    ) -> Iterator[Prediction]:
        """Yields the prediction of each image, in order; `image_id` counts from 0.

        The export's own batch size rules; `batch_size` is there for the protocol.
        """
        del batch_size
        waiting: list[dict[str, np.ndarray]] = []
        for number, image in enumerate(images):
            waiting.append(make_example(image, number, self.input))
            if len(waiting) == self.batch:
                yield from self._predict(waiting)
                waiting = []
        yield from self._predict(waiting)

    def _predict(self, examples: Sequence[dict[str, np.ndarray]]) -> list[Prediction]:
        done = {}
        for batch in make_batches(examples, self.batch):
            outputs = self.run(batch["image"], batch["image_size"])
            for i, image_id in enumerate(batch["image_id"].tolist()):
                if image_id != -1:
                    done[image_id] = self._at_original(outputs, batch, i)
        return [done[int(example["image_id"])] for example in examples]

    def _at_original(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray], i: int
    ) -> Prediction:
        """Returns the prediction of the batch's i-th image."""
        image_size, original = batch["image_size"][i], batch["original_size"][i]
        kept = np.arange(int(outputs["count"][i]))
        if self.metadata["masks"] == "quarter":
            soft = jnp.asarray(outputs["masks"][i : i + 1])
            threshold = self.metadata["options"]["mask_threshold"]
            masks, boxes = paste_detections(soft, 0, kept, image_size, original, threshold)
        else:
            masks = resize_masks(outputs["masks"][i][kept], image_size, original)
            boxes = tight_boxes(masks)
        nonempty = boxes[:, 2] > boxes[:, 0]
        return Prediction(
            masks=masks[nonempty],
            boxes=boxes[nonempty],
            scores=outputs["scores"][i][kept][nonempty],
            labels=outputs["labels"][i][kept][nonempty],
            image_id=int(batch["image_id"][i]),
            class_names=self.class_names,
        )


def resize_masks(masks: np.ndarray, image_size: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Returns masks of the padded input, uint8 [n, h, w], at the original size, bool.

    The smooth form of a resize of 0 and 1: bilinear, then above a half.
    """
    (h, w), (height, width) = image_size.tolist(), original.tolist()
    large = np.zeros((len(masks), height, width), bool)
    for mask, result in zip(masks, large, strict=True):
        picture = Image.fromarray(mask[:h, :w] * np.uint8(255))
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        result[:] = np.asarray(resized) > 127
    return large


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Returns (x0, y0, x1, y1) of masks, float32 [n, 4]; the ends exclusive."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        columns, rows = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
