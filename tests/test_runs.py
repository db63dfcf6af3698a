"""Run lengths of masks, character for character those of pycocotools."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as rle

from solov2_jax.rle import rle_decode, rle_encode, rle_from_string, rle_to_strings


def box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def reference(mask):
    return rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode("ascii")


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=200)
def test_equal_to_pycocotools(seed):
    """Any size, full and empty masks, whole columns, noise; boxes tight or wider."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 40, 2)
    masks = np.zeros((rng.integers(0, 4), h, w), bool)
    for mask in masks:
        y, x = np.sort(rng.integers(0, (h + 1, w + 1), (2, 2)), axis=0).T
        noise = rng.random((h, w)) < rng.choice([0.1, 0.5, 1.0])
        mask[slice(*y), slice(*x)] = noise[slice(*y), slice(*x)]
    boxes = np.array([box(m) for m in masks], float).reshape(-1, 4)
    boxes[::2] += rng.uniform(0, 3, boxes[::2].shape) * (-1, -1, 1, 1)
    assert rle_encode(masks, boxes) == [reference(m) for m in masks]


def test_the_way_back():
    """Runs longer than any int16, and the reader of `rle.py`."""
    mask = np.zeros((1, 3000, 2000), bool)
    mask[0, 1000:2990, 700:710] = True
    (text,) = rle_encode(mask, np.array([[700, 1000, 710, 2990]]))
    assert text == reference(mask[0])
    crop = rle_decode(rle_from_string(text.encode()), mask.shape[1:])
    assert crop is not None
    assert (crop.top, crop.left, crop.pixels.shape) == (1000, 700, (1990, 10))


def test_runs_of_extreme_lengths():
    runs = [np.array([0, 1, 2**31 - 2, 1]), np.array([5]), np.array([3, 1, 1, 70000])]
    for text, values in zip(rle_to_strings(runs), runs, strict=True):
        np.testing.assert_array_equal(rle_from_string(text.encode()), values)


def test_pixels_outside_of_the_box_are_an_error():
    mask = np.ones((1, 4, 4), bool)
    with pytest.raises(ValueError, match="detection 0: its mask has pixels outside"):
        rle_encode(mask, np.array([[0, 0, 4, 3]]))
