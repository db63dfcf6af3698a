"""Prediction -> a picture: translucent masks, contours, class names and scores.

Every object has a colour of its own, or its class's or its track's, and labels look for
a free place at their object, so that forty objects of one class stay apart. PIL and
numpy only.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from solov2_jax.inference.labels import Label, place_labels
from solov2_jax.inference.prediction import Prediction

FILL_OPACITY = 0.4
COLOR_BY = ("object", "class", "track")
# Small pictures are enlarged by a whole factor up to about this height.
MIN_HEIGHT = 256
# Brightness of red, green and blue (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114])
# Font heights in pixels; the largest is a share of the picture's short side.
MIN_FONT, MAX_FONT, FONT_SHARE = 9, 32, 1 / 32


def draw_prediction(
    image: np.ndarray,
    prediction: Prediction,
    class_names: Sequence[str],
    color_by: str = "object",
    labels: bool = True,
) -> np.ndarray:
    """Returns the image with its prediction drawn into it, uint8 [H, W, 3].

    Args:
      image: uint8 [H, W, 3], RGB, at the prediction's size; it is not changed.
      class_names: the names of labels 0..K-1.
      color_by: see `object_colors`.
      labels: write class names, tracks and scores too.
    """
    if image.shape[:2] != prediction.masks.shape[1:]:
        raise ValueError(
            f"the image is {image.shape[:2]} (height, width) and its masks are "
            f"{prediction.masks.shape[1:]}: they belong to different images"
        )
    colors = object_colors(prediction, color_by)
    picture = draw_masks(image, prediction, colors)
    if not labels:
        return picture
    largest = round(min(image.shape[:2]) * FONT_SHARE)
    sizes = (MIN_FONT, min(max(largest, MIN_FONT), MAX_FONT))
    placed = place_labels(prediction, class_names, text_box, sizes)
    return draw_labels(picture, placed, colors)


def enlarge(image: np.ndarray, prediction: Prediction) -> tuple[np.ndarray, Prediction]:
    """Returns a small image and its prediction so large that labels can be read.

    Both as they are, if the image is about `MIN_HEIGHT` pixels high or higher.
    """
    factor = MIN_HEIGHT // image.shape[0]
    if factor < 2:
        return image, prediction
    masks = np.asarray(prediction.masks).repeat(factor, 1).repeat(factor, 2)
    large = replace(prediction, masks=masks, boxes=prediction.boxes * factor)
    return image.repeat(factor, 0).repeat(factor, 1), large


def object_colors(prediction: Prediction, color_by: str) -> np.ndarray:
    """Returns a colour for each object, uint8 [n, 3].

    Args:
      color_by: "object", so that neighbours in the list differ; "class" or "track", so
        that a class or a followed object keeps its colour in all pictures.
    """
    if color_by not in COLOR_BY:
        raise ValueError(f"color_by is {color_by!r}; use one of {', '.join(COLOR_BY)}")
    if color_by == "object":
        return distinct_colors(len(prediction))
    if color_by == "track" and prediction.tracks is None:
        raise ValueError("colours by track need a prediction with tracks")
    numbers = prediction.labels if color_by == "class" else prediction.tracks
    colors = [distinct_color(int(i)) for i in np.asarray(numbers)]
    return np.array(colors, np.uint8).reshape(-1, 3)


def distinct_colors(n: int) -> np.ndarray:
    """Returns n bright RGB colours, uint8 [n, 3]; neighbours differ most."""
    return np.array([distinct_color(i) for i in range(n)], np.uint8).reshape(-1, 3)


@cache
def distinct_color(i: int) -> tuple[int, int, int]:
    """Returns the i-th bright RGB colour.

    The hue moves on by the golden angle; saturation and value alternate, so that hues
    that come round again still look different.
    """
    golden = (math.sqrt(5) - 1) / 2
    tones = ((0.85, 1.0), (0.55, 1.0), (0.95, 0.8))
    rgb = np.array(colorsys.hsv_to_rgb((0.02 + i * golden) % 1, *tones[i % 3]))
    # Deep blue and violet would be lost on dark pictures: mix in white.
    white = max(0.0, (0.4 - rgb @ LUMA) / (1 - rgb @ LUMA))
    red, green, blue = ((rgb + (1 - rgb) * white) * 255).round().astype(int).tolist()
    return red, green, blue


def draw_masks(
    image: np.ndarray, prediction: Prediction, colors: np.ndarray
) -> np.ndarray:
    """Returns the image under translucent masks, large ones below, contours on top.

    Only the pixels inside each object's box are touched.
    """
    picture = image.copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    crops = [prediction.crop(i) for i in range(len(prediction))]
    largest_first = np.argsort([-int(mask.sum()) for _, mask in crops], kind="stable")
    for i in largest_first:
        window, mask = crops[i]
        part = picture[window]
        mixed = part[mask] * (1 - FILL_OPACITY) + colors[i] * FILL_OPACITY
        part[mask] = mixed.round().astype(np.uint8)
    for i in largest_first:
        window, mask = crops[i]
        picture[window][contour(mask, thickness)] = colors[i]
    return picture


def contour(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Returns the mask's pixels within `thickness` (city-block) of its outside.

    The crop's border counts as outside, so an object cut by the picture is closed too.
    """
    inner = np.pad(mask, 1)
    for _ in range(thickness):
        core = inner.copy()
        core[1:] &= inner[:-1]
        core[:-1] &= inner[1:]
        core[:, 1:] &= inner[:, :-1]
        core[:, :-1] &= inner[:, 1:]
        inner = core
    return mask & ~inner[1:-1, 1:-1]


def draw_labels(
    picture: np.ndarray, labels: Sequence[Label], colors: np.ndarray
) -> np.ndarray:
    """Returns the picture with each label in a box of its object's colour."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for label in labels:
        color = colors[label.index]
        x0, y0, x1, y1 = label.box
        box = (x0, y0, x1 - 1, y1 - 1)
        draw.rounded_rectangle(box, radius=2, fill=tuple(color.tolist()))
        left, top, _, _ = font(label.font_size).getbbox(label.text)
        corner = (x0 + margin(label.font_size) - left, y0 + 1 - top)
        ink = (0, 0, 0) if color @ LUMA > 130 else (255, 255, 255)
        draw.text(corner, label.text, font=font(label.font_size), fill=ink)
    return np.asarray(canvas)


def text_box(text: str, size: int) -> tuple[int, int]:
    """Returns the width and height in pixels of a label's box."""
    left, top, right, bottom = font(size).getbbox(text)
    return math.ceil(right - left) + 2 * margin(size), math.ceil(bottom - top) + 3


def margin(size: int) -> int:
    """Returns the space left and right of a label's text, pixels."""
    return max(2, size // 6)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns Pillow's own font at a height in pixels."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType: reinstall it by pip")
    return loaded
