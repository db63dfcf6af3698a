"""Objects drawn into pictures, for a look at data: colours, masks, boxes, captions."""

import base64
import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from solov2_jax.data.masks import Crop

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


def data_url(image: np.ndarray, quality: int = 85) -> str:
    """Returns the picture as text that an HTML page shows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
