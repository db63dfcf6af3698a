"""Several pictures in one, with captions, for notebooks and for `browse_batches`."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from solov2_jax.data.images import read_image
from solov2_jax.inference.draw import draw_prediction, enlarge
from solov2_jax.inference.prediction import Prediction

CAPTION_HEIGHT = 20
GAP = 8  # white pixels between two pictures


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


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """Returns the picture below a line of text."""
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + CAPTION_HEIGHT), "white")
    canvas.paste(Image.fromarray(image), (0, CAPTION_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), text, fill=(20, 20, 20), font=ImageFont.load_default(12))
    return np.asarray(canvas)


def sheet(
    pictures: Sequence[np.ndarray | str | os.PathLike[str]],
    titles: Sequence[str] = (),
    columns: int = 3,
    width: int = 360,
) -> Image.Image:
    """Returns pictures in rows, as one picture that a notebook shows.

    Args:
      pictures: RGB uint8 [H, W, 3], or files.
      titles: a line above each; (): none.
      width: of each in the result, pixels; heights follow.
    """
    if not pictures:
        raise ValueError("no pictures to show")
    panels = []
    for i, picture in enumerate(pictures):
        pixels = picture if isinstance(picture, np.ndarray) else read_image(picture)
        height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
        panel = np.asarray(Image.fromarray(pixels).resize((width, height)))
        panels.append(caption(panel, titles[i]) if titles else panel)
    return Image.fromarray(tile_panels(panels, columns))


def tile_panels(panels: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Returns panels of one width in rows, with white between and below them."""
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    width = panels[0].shape[1]
    size = sum(heights) + GAP * (len(rows) - 1), min(columns, len(panels)) * (width + GAP) - GAP
    canvas = np.full((*size, 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, panel in enumerate(row):
            left = i * (width + GAP)
            canvas[top : top + panel.shape[0], left : left + width] = panel
        top += height + GAP
    return canvas
