"""Large images, and small dense objects, in overlapping tiles.

Every tile is one picture of the same size, so the network is compiled once; what the
tiles find is packed at once and merged in the frame of the whole image. Memory grows
with the outlines of the objects, not with their number times the image's pixels.
"""

import abc
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from solov2_jax.data.transforms import resize_image
from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.inference.preprocess import InputOptions, load_image
from solov2_jax.progress import track
from solov2_jax.tools.multiview.merge import (
    COARSE,
    COMPLETE,
    CUT,
    ImageView,
    NmsOptions,
    ViewObject,
    merge,
)

log = logging.getLogger(__name__)

# The whole image is looked at with at most so many pixels, because its masks come as
# bool [n, H, W]: 400 MB for 100 of them.
WHOLE_PIXELS = 4_000_000
# Seconds between two lines of progress.


@runtime_checkable
class PicturePredictor(Protocol):
    """What finds the objects of whole pictures."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def predict_images(
        self, images: Iterable[np.ndarray | str], batch_size: int = 1
    ) -> Iterable[Prediction]: ...


@runtime_checkable
class InputPredictor(PicturePredictor, Protocol):
    """A predictor of single views, which knows what an image is to the network."""

    @property
    def input(self) -> InputOptions: ...


@dataclass(frozen=True)
class TileOptions:
    """How an image is cut.

    Objects up to `overlap * size` pixels high and wide lie whole in some tile.
    """

    size: int  # side of a tile, pixels of the original image
    overlap: float = 0.25  # least share of the size that neighbours have in common
    whole: bool = False  # look at the whole image too, for objects larger than a tile

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"--tile {self.size}: give a side in pixels, such as 512")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(
                f"--tile_overlap {self.overlap}: give a share from 0 to 0.9, such as "
                "0.25; objects larger than the shared part are joined from pieces"
            )


class MultiviewPredictor(abc.ABC):
    """A predictor that looks at each image several times.

    Args:
      predictor: of one view.
    """

    def __init__(self, predictor: InputPredictor, nms: NmsOptions):
        self.predictor, self.nms = predictor, nms
        self.class_names = predictor.class_names
        self.category_ids = predictor.category_ids

    def __call__(self, image: np.ndarray | str) -> Prediction:
        """Returns the prediction of one image: RGB uint8 [H, W, 3], or a path."""
        (prediction,) = self.predict_images([image])
        return prediction

    def predict_images(
        self, images: Iterable[np.ndarray | str], batch_size: int = 1
    ) -> Iterator[Prediction]:
        """Yields the prediction of each image, in order; `image_id` counts from 0.

        Args:
          images: RGB uint8 [H, W, 3], or paths.
          batch_size: tiles computed together; scales and mirrored images are batches anyway.
        """
        for number, image in enumerate(images):
            values = load_image(image, f"image {number}", self.input.pixels)
            yield self._predict(values, number, batch_size)

    @property
    def input(self) -> InputOptions:
        """How an image becomes the network's input."""
        return self.predictor.input

    @abc.abstractmethod
    def _predict(self, image: np.ndarray, number: int, batch_size: int) -> Prediction: ...


class TiledPredictor(MultiviewPredictor):
    """Predicts images tile by tile; `masks` of its predictions are `MaskCrops`.

    Args:
      predictor: of the tiles.
      border: an object that ends within so many pixels of a tile's border is cut by it.
      fill: values of each channel of the tile beyond a smaller image.
    """

    def __init__(
        self,
        predictor: InputPredictor,
        tiles: TileOptions,
        nms: NmsOptions,
        border: int,
        fill: tuple[float, ...],
    ):
        super().__init__(predictor, nms)
        self.tiles, self.border, self.fill = tiles, border, fill

    def _predict(self, image: np.ndarray, number: int, batch_size: int) -> Prediction:
        views = cut(image.shape[0], image.shape[1], self.tiles)
        found: list[ViewObject] = []
        pictures = (self._picture(image, view) for view in views)
        tiles = self.predictor.predict_images(pictures, batch_size)
        counted = track(tiles, f"image {number}", unit="tiles", total=len(views))
        for i, prediction in enumerate(counted):
            found += self._of_tile(prediction, i, views[i], image.shape)
        if self.tiles.whole and len(views) > 1:
            found += self._of_whole(image, len(views))
            everything = (0, 0, *image.shape[:2])
            views.append(ImageView(everything, (0, 0, 0, 0)))
        objects = merge(found, views, self.nms)
        masks = MaskCrops([o.mask for o in objects], image.shape[:2])
        return Prediction(
            masks,
            masks.boxes(),
            np.array([o.score for o in objects], np.float32),
            np.array([o.label for o in objects], np.int32),
            number,
            self.class_names,
        )

    def _picture(self, image: np.ndarray, view: ImageView) -> np.ndarray:
        """Returns a tile's pixels; a smaller image is filled up."""
        y0, x0, y1, x1 = view.window
        part = image[y0:y1, x0:x1]
        size = self.tiles.size
        if part.shape[:2] == (size, size):
            return np.ascontiguousarray(part)
        picture = np.empty((size, size, image.shape[2]), image.dtype)
        picture[:] = self.fill if image.dtype.kind == "f" else np.round(self.fill)
        picture[: part.shape[0], : part.shape[1]] = part
        return picture

    def _of_tile(
        self, prediction: Prediction, index: int, view: ImageView, shape: tuple[int, ...]
    ) -> list[ViewObject]:
        y0, x0, y1, x1 = view.window
        # A side on the image's own border cuts nothing.
        low = [y0 + self.border if y0 else 0, x0 + self.border if x0 else 0]
        high = [y1 - self.border if y1 < shape[0] else y1]
        high.append(x1 - self.border if x1 < shape[1] else x1)
        found = []
        for i in range(len(prediction)):
            mask = pack(prediction.masks[i][: y1 - y0, : x1 - x0], y0, x0)
            if mask is None:  # all in what fills a smaller image up
                continue
            top, left, bottom, right = mask.rectangle
            inside = top >= low[0] and left >= low[1]
            inside = inside and bottom <= high[0] and right <= high[1]
            kind = COMPLETE if inside else CUT
            found.append(_found(prediction, i, mask, index, kind))
        return found

    def _of_whole(self, image: np.ndarray, index: int) -> list[ViewObject]:
        size = image.shape[0], image.shape[1]
        shrink = min(1.0, math.sqrt(WHOLE_PIXELS / (size[0] * size[1])))
        small = max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))
        (prediction,) = self.predictor.predict_images([resize_image(image, *small)])
        found = []
        for i in range(len(prediction)):
            small_mask = Image.fromarray(prediction.masks[i].view(np.uint8))
            large = small_mask.resize((size[1], size[0]), Image.Resampling.NEAREST)
            mask = pack(np.asarray(large).view(bool))
            if mask:
                found.append(_found(prediction, i, mask, index, COARSE))
        return found


def _found(prediction: Prediction, i: int, mask, view: int, kind: int) -> ViewObject:
    score, label = float(prediction.scores[i]), int(prediction.labels[i])
    return ViewObject(mask, score, label, frozenset({view}), kind)


def cut(height: int, width: int, tiles: TileOptions) -> list[ImageView]:
    """Returns the tiles of an image, row by row, evenly spread and inside the image.

    Their cores meet in the middle of what neighbours have in common.
    """
    rows, columns = (_intervals(side, tiles.size, tiles.overlap) for side in (height, width))
    return [
        ImageView((y0, x0, y1, x1), (a, b, c, d))
        for (y0, y1), (a, c) in rows
        for (x0, x1), (b, d) in columns
    ]


def _intervals(
    side: int, size: int, overlap: float
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns the tiles along one axis: (begin, end) of the window and of its core."""
    step = max(1, math.floor(size * (1 - overlap)))
    number = 1 + max(0, math.ceil((side - size) / step))
    begins = np.linspace(0, max(side - size, 0), number).round().astype(int)
    ends = np.minimum(begins + size, side)
    seams = [0, *((begins[1:] + ends[:-1]) // 2).tolist(), side]
    windows = zip(begins.tolist(), ends.tolist(), strict=True)
    return list(zip(windows, zip(seams[:-1], seams[1:], strict=True), strict=True))
