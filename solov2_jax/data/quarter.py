"""Spans -> masks at a quarter of the size, the resolution that the loss looks at."""

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from solov2_jax.data.masks import Crop
from solov2_jax.data.spans import Size, Spans


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How one side is scaled to a quarter, by two neighbours per target pixel."""

    rank: np.ndarray  # int64 [side + 1], how many pixels before this one are read
    first: np.ndarray  # int32 [new], the weight of the first neighbour, in 1/2048
    second: np.ndarray  # int32 [new]


@lru_cache(maxsize=512)
def _axis(side: int) -> _Axis:
    """Returns the table of a side.

    Source: OpenCV resize.cpp, 8-bit INTER_LINEAR: weights in 1/2048. At this scale a
    position never leaves the image, and no pixel is read twice.
    """
    new = int(side * 0.25 + 0.5)
    position = ((np.arange(new) + 0.5) * (side / max(new, 1)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    part = position - low.astype(np.float32)
    read = np.zeros(side + 1, np.int64)
    read[low + 1] += 1
    read[low + 2] += 1
    return _Axis(
        np.cumsum(read),
        np.rint((np.float32(1) - part) * np.float32(2048)).astype(np.int32),
        np.rint(part * np.float32(2048)).astype(np.int32),
    )


def quarters(spans: Spans, size: Size) -> Iterator[tuple[int, Crop]]:
    """Yields (object, mask scaled to a quarter), sides int(side / 4 + 0.5).

    Equal, bit for bit, to OpenCV's bilinear resize of the whole image's uint8 mask. An
    object of which no pixel is read is left out: its small mask is empty.
    Source: AdelaiDet adet/modeling/solov2/utils.py, imrescale.

    Args:
      size: (height, width) of the image.
    """
    rows, columns = _axis(size[0]), _axis(size[1])
    left = columns.rank[spans.column]
    top, bottom = rows.rank[spans.top], rows.rank[spans.bottom]
    read = np.flatnonzero((columns.rank[spans.column + 1] > left) & (bottom > top))
    if not len(read):
        return
    owner, left, top, bottom = (a[read] for a in (spans.owner, left, top, bottom))
    begin = np.flatnonzero(np.diff(owner, prepend=-1))
    # Rectangles of whole target pixels: two columns and two rows read for each.
    x0 = np.minimum.reduceat(left, begin) // 2
    x1 = np.maximum.reduceat(left, begin) // 2 + 1
    y0 = np.minimum.reduceat(top, begin) // 2
    y1 = (np.maximum.reduceat(bottom, begin) + 1) // 2
    tall = 2 * (y1 - y0)
    ends = np.cumsum(tall * 2 * (x1 - x0))
    starts = ends - tall * 2 * (x1 - x0)
    own = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(owner)))
    place = starts[own] + (left - 2 * x0[own]) * tall[own] - 2 * y0[own]
    steps = np.zeros(ends[-1] + 1, np.int8)
    steps[place + top] += 1
    steps[place + bottom] -= 1
    pixels = np.cumsum(steps, dtype=np.int8).view(np.uint8)
    exact = size[0] % 4 == 0 and size[1] % 4 == 0
    boxes = np.stack([owner[begin], starts, ends, tall, x0, x1, y0, y1], axis=-1)
    for number, a, b, height, *box in boxes.tolist():
        left, right, upper, lower = box
        part = pixels[a:b].reshape(-1, height)
        if exact:
            # Equal weights: at least two of the four pixels in the middle.
            pairs = part[0::2] + part[1::2]
            small = pairs[:, 0::2] + pairs[:, 1::2] >= 2
        else:
            x, y = slice(left, right), slice(upper, lower)
            small = _weigh(part, columns, x, rows, y)
        yield number, Crop(small.view(np.uint8).T, upper, left)


def _weigh(
    part: np.ndarray, columns: _Axis, x: slice, rows: _Axis, y: slice
) -> np.ndarray:
    """Returns the weighted pixels, rounded as OpenCV rounds, bool [x, y]."""
    across = part[0::2] * columns.first[x, None] + part[1::2] * columns.second[x, None]
    across >>= 4
    upper = (across[:, 0::2] * rows.first[y]) >> 16
    lower = (across[:, 1::2] * rows.second[y]) >> 16
    return upper + lower >= 2
