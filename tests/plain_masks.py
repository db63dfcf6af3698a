"""Stride-4 masks and mass centres in the plain form: from whole masks' pixels."""

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data import rasterize
from solov2_jax.data.rasterize import stride4_masks


def plain_stride4(mask: np.ndarray) -> np.ndarray:
    """Returns OpenCV's bilinear resize of a uint8 mask to a quarter, fixed point.

    Source: OpenCV resize.cpp: weights in 1/2048, rounded after the columns and after
    the rows; columns beyond the image repeat the last one.
    """
    (y0, y1, wy0, wy1), (x0, x1, wx0, wx1) = (_neighbours(s) for s in mask.shape)
    across = (mask[:, x0].astype(np.int64) * wx0 + mask[:, x1] * wx1) >> 4
    upper = (across[y0] * wy0[:, None]) >> 16
    lower = (across[y1] * wy1[:, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbours(size: int) -> tuple[np.ndarray, ...]:
    new = int(size * 0.25 + 0.5)
    position = ((np.arange(new) + 0.5) * (size / max(new, 1)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(int)
    part = position - low.astype(np.float32)
    weights = [np.rint(p * np.float32(2048)).astype(int) for p in (1 - part, part)]
    return low, np.minimum(low + 1, size - 1), *weights


def plain_center(mask: np.ndarray) -> np.ndarray:
    """Returns the mean (x, y) of a mask's pixels, float32 [2]."""
    y, x = np.nonzero(mask)
    return np.array([x.sum(), y.sum()], np.float32) / np.float32(len(x))


def spans_of(masks: np.ndarray) -> rasterize.Spans:
    """Returns the spans of whole masks, uint8 [n, h, w]."""
    counts = [coco_mask.encode(np.asfortranarray(m))["counts"] for m in masks]
    return rasterize.spans_from_rle(counts, masks.shape[1:])


def stride4_of(found: rasterize.Spans, number: int, size: tuple[int, int]) -> np.ndarray:
    """Returns what `stride4_masks` yields as whole masks, uint8 [n, h4, w4]."""
    out = np.zeros((number, *(int(s * 0.25 + 0.5) for s in size)), np.uint8)
    for i, crop in stride4_masks(found, size):
        h, w = crop.pixels.shape
        out[i, crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
    return out
