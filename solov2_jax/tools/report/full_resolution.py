"""An evaluation that gives a predictor the files' own pixels, instead of resized ones.

Tiles and scales are made of the original image, so its size must not be lost before.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import open_sized
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.multiview.tiling import PicturePredictor


class FullResolutionBatches:
    """Batches of one image each: image uint8 [1, H, W, 3] RGB, image_id [1].

    Args:
      max_images: only the first ones; 0 for all.
      shard: (i, n) gives every n-th of them from the i-th on.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        max_images: int = 0,
        shard: tuple[int, int] = (0, 1),
    ):
        self._dataset = dataset
        number = min(max_images or len(dataset), len(dataset))
        self._chosen = range(shard[0], number, shard[1])

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        data = self._dataset
        for i in self._chosen:
            size = int(data.heights[i]), int(data.widths[i])
            image = np.asarray(open_sized(data.path(i), *size, data.annotation_file))
            ids = np.array([data.image_ids[i]], np.int64)
            yield {"image": image[None], "image_id": ids}


class FullResolutionPredictor:
    """Predicts batches of `FullResolutionBatches`.

    Args:
      batch_size: views of an image that are computed together.
    """

    def __init__(self, predictor: PicturePredictor, batch_size: int = 1):
        self._predictor, self._batch_size = predictor, batch_size

    def predict_batch(self, batch: Mapping[str, np.ndarray]) -> list[Prediction]:
        """Returns a prediction for each image of the batch."""
        predictions = self._predictor.predict_images(batch["image"], self._batch_size)
        ids = batch["image_id"].tolist()
        return [replace(p, image_id=i) for p, i in zip(predictions, ids, strict=True)]
