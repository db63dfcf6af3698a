"""What inference hands to people: plain numpy at the original image's size."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.data.runs import encode_masks
from solov2_jax.inference.crops import MaskCrops, Window


@dataclass(frozen=True)
class Prediction:
    """Detections of one image, best first, in its original frame.

    Shapes: n detections (at most `test.max_per_image`), H W the original image.
    """

    # bool [n, H, W], none of them empty; of a tiled or a very large image they are held
    # packed, and made when they are asked for.
    masks: np.ndarray | MaskCrops
    boxes: np.ndarray  # float32 [n, 4], tight (x0, y0, x1, y1), x1 and y1 exclusive
    scores: np.ndarray  # float32 [n], descending
    labels: np.ndarray  # int [n], 0..K-1
    image_id: int
    class_names: tuple[str, ...] = ()  # of all labels; (): not known
    # int [n], the same number for the same object in a video's frames; None: not asked.
    tracks: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Prediction":
        """Returns the detections whose score is at least `score`."""
        return self.take(np.flatnonzero(self.scores >= score))

    def take(self, chosen: np.ndarray) -> "Prediction":
        """Returns some of the detections, int [k]."""
        return replace(
            self,
            masks=self.masks[chosen],
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            tracks=None if self.tracks is None else self.tracks[chosen],
        )

    def crop(self, index: int) -> tuple[Window, np.ndarray]:
        """Returns the window (rows, columns) of an object and the mask inside it."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.crop(index)
        x0, y0, x1, y1 = self.boxes[index].astype(int).tolist()
        window = slice(y0, y1), slice(x0, x1)
        return window, self.masks[index][window]

    def thinned(self, stride: int) -> np.ndarray:
        """Returns every `stride`-th row and column of the masks, bool [n, h, w]."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.thinned(stride)
        return self.masks[:, ::stride, ::stride]

    def encode(self) -> list[str]:
        """Returns the masks as COCO's compressed run lengths of the whole image."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.encode()
        return encode_masks(self.masks, self.boxes)


def to_coco_results(
    prediction: Prediction, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the prediction in COCO's results format: RLE mask, box as x, y, w, h.

    With `track_id` besides, where objects were followed.
    """
    results = []
    size = list(prediction.masks.shape[1:])
    for i, counts in enumerate(prediction.encode()):
        x0, y0, x1, y1 = (float(v) for v in prediction.boxes[i])
        results.append(
            {
                "image_id": int(prediction.image_id),
                "category_id": int(category_ids[int(prediction.labels[i])]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(prediction.scores[i]),
                "segmentation": {"size": size, "counts": counts},
            }
        )
        if prediction.tracks is not None:
            results[-1]["track_id"] = int(prediction.tracks[i])
    return results


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes COCO results one a line; a kill leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for i, result in enumerate(results):
            file.write(",\n" if i else "\n")
            file.write(json.dumps(result))  # much faster than json.dump
        file.write("\n]\n")
    os.replace(temporary, path)
