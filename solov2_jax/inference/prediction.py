"""What inference hands to people: plain numpy at the original image's size."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from solov2_jax.inference.crops import MaskCrops, Window


@dataclass(frozen=True)
class Prediction:
    """Detections of one image, best first, in its original frame.

    Shapes: n detections (at most `test.max_per_image`), H W the original image.
    """

    # bool [n, H, W], none of them empty; of a tiled image they are made when asked for.
    masks: np.ndarray | MaskCrops
    boxes: np.ndarray  # float32 [n, 4], tight (x0, y0, x1, y1), x1 and y1 exclusive
    scores: np.ndarray  # float32 [n], descending
    labels: np.ndarray  # int [n], 0..K-1
    image_id: int

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Prediction":
        """Returns the detections whose score is at least `score`."""
        keep = self.scores >= score
        return replace(
            self,
            masks=self.masks[keep],
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
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

    def encode(self, index: int) -> dict[str, Any]:
        """Returns a mask as compressed RLE of the whole image, for json."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.encode(index)
        return encode_mask(self.masks[index])


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Returns a bool [H, W] mask as compressed RLE that json can hold."""
    encoded: Any = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def to_coco_results(
    prediction: Prediction, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the prediction in COCO's results format: RLE mask, box as x, y, w, h.

    Masks are encoded one at a time, so the transposed copy stays one mask large.
    """
    results = []
    for i in range(len(prediction)):
        x0, y0, x1, y1 = (float(v) for v in prediction.boxes[i])
        results.append(
            {
                "image_id": int(prediction.image_id),
                "category_id": int(category_ids[int(prediction.labels[i])]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(prediction.scores[i]),
                "segmentation": prediction.encode(i),
            }
        )
    return results


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes COCO results one a line; a kill leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for i, result in enumerate(results):
            file.write(",\n" if i else "\n")
            json.dump(result, file)
        file.write("\n]\n")
    os.replace(temporary, path)
