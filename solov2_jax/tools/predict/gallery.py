"""Predictions of several images in one picture, for a look at them in a notebook."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from solov2_jax.data.images import read_image
from solov2_jax.inference.draw import draw_prediction, enlarge
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.drawing import sheet


def gallery(
    images: Iterable[np.ndarray | str | os.PathLike[str]],
    predictions: Iterable[Prediction],
    columns: int = 3,
    width: int = 360,
    color_by: str = "object",
    names: Sequence[str] = (),
) -> Image.Image:
    """Returns the images with their predictions drawn into them, in rows.

    Args:
      images: RGB uint8 [H, W, 3], or files.
      predictions: of these images, in this order, with class names.
      width: of each image in the result, pixels.
      color_by: see `draw.object_colors`.
      names: of the images; (): their files' names.
    """
    pictures, titles = [], []
    for image, prediction in zip(images, predictions, strict=True):
        array = isinstance(image, np.ndarray)
        pixels = image if array else read_image(image)
        name = f"image {len(titles)}" if array else os.path.basename(image)
        name = names[len(titles)] if names else name
        large = enlarge(pixels, prediction)
        picture = draw_prediction(*large, prediction.class_names, color_by)
        number = len(prediction)
        pictures.append(picture)
        titles.append(f"{name}: {number} object{'' if number == 1 else 's'}")
    return sheet(pictures, titles, columns, width)
