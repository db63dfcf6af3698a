"""Objects drawn into pictures, for a look at data: colours, masks, boxes, captions."""

import base64
import colorsys
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from solov2_jax.data.images import read_image
from solov2_jax.rle import Crop

OPACITY = 0.4


def color(index: int) -> tuple[int, int, int]:
    """Returns a bright RGB colour; neighbours differ most."""
    golden = 0.618034
    value = (1.0, 0.8)[index % 2]
    rgb = colorsys.hsv_to_rgb((0.05 + index * golden) % 1, 0.75, value)
    return tuple(round(255 * v) for v in rgb)  # type: ignore[return-value]


def paint(image: np.ndarray, crops: Sequence[Crop | None]) -> np.ndarray:
    """Returns the picture with each mask in its colour, large ones below."""
    picture = image.copy()
    area = [0 if c is None else int((c.pixels > 0).sum()) for c in crops]
    for i in np.argsort(-np.array(area, int), kind="stable").tolist():
        if (crop := crops[i]) is None:
            continue
        mask = crop.pixels > 0
        h, w = mask.shape
        part = picture[crop.top : crop.top + h, crop.left : crop.left + w]
        mask = mask[: part.shape[0], : part.shape[1]]
        tint = np.array(color(i))
        part[mask] = (part[mask] * (1 - OPACITY) + tint * OPACITY).astype(np.uint8)
        part[mask & ~_inner(mask)] = tint
    return picture


def _inner(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels whose four neighbours are in the mask too."""
    padded = np.pad(mask, 1)
    core = padded[1:-1, 1:-1].copy()
    for shifted in (padded[:-2, 1:-1], padded[2:, 1:-1]):
        core &= shifted
    for shifted in (padded[1:-1, :-2], padded[1:-1, 2:]):
        core &= shifted
    return core


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """Returns the picture below a line of text."""
    height = 20
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + height), "white")
    canvas.paste(Image.fromarray(image), (0, height))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), text, fill=(20, 20, 20), font=ImageFont.load_default(12))
    return np.asarray(canvas)


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Returns the picture with its longer side at most so many pixels."""
    factor = longest / max(image.shape[:2])
    if factor >= 1:
        return image
    size = [max(1, round(s * factor)) for s in (image.shape[1], image.shape[0])]
    small = Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BOX)
    return np.asarray(small)


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
    panels = []
    for i, picture in enumerate(pictures):
        pixels = picture if isinstance(picture, np.ndarray) else read_image(picture)
        height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
        panel = Image.fromarray(pixels).resize((width, height))
        panels.append(caption(np.asarray(panel), titles[i]) if titles else panel)
    panels = [np.asarray(panel) for panel in panels]
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    if not rows:
        raise ValueError("no pictures to show")
    gap = 8
    size = (
        min(columns, len(panels)) * (width + gap) - gap,
        sum(heights) + gap * (len(rows) - 1),
    )
    canvas = Image.new("RGB", size, "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, panel in enumerate(row):
            canvas.paste(Image.fromarray(panel), (i * (width + gap), top))
        top += height + gap
    return canvas


def data_url(image: np.ndarray, quality: int = 85) -> str:
    """Returns the picture as text that an HTML page shows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
