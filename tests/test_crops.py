"""Packed masks read like the bool [n, H, W] that they stand for."""

import numpy as np
import pytest
import tiny_coco
from hypothesis import given
from hypothesis import strategies as st

from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.prediction import (
    MaskCrops,
    Prediction,
    overlapping_pairs,
    pack,
    to_coco_results,
)

SIZE = (23, 31)


def random_masks(seed, number=5, size=SIZE):
    """Masks of random rectangles with holes; the first touches all four sides."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((number, *size), bool)
    for i, mask in enumerate(masks):
        y0, x0 = (int(rng.integers(0, s)) for s in size) if i else (0, 0)
        y1, x1 = (int(rng.integers(a, s)) + 1 for a, s in zip((y0, x0), size, strict=True))
        y1, x1 = (y1, x1) if i else size
        mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < rng.choice([0.5, 1.0])
        mask[y0, x0] = True
    return masks


def crops_of(masks):
    return MaskCrops([pack(mask) for mask in masks], masks.shape[1:])


def prediction_of(masks, boxes):
    scores = np.linspace(0.9, 0.5, len(masks), dtype=np.float32)
    return Prediction(masks, boxes, scores, np.zeros(len(masks), int), 3)


@given(st.integers(0, 10_000))
def test_reads_like_the_array(seed):
    masks = random_masks(seed)
    crops = crops_of(masks)
    assert crops.shape == masks.shape and len(crops) == len(masks)
    np.testing.assert_array_equal(np.asarray(crops), masks)
    np.testing.assert_array_equal(list(crops), masks)
    np.testing.assert_array_equal(crops[1], masks[1])
    keep = np.array([True, False, True, False, True])
    np.testing.assert_array_equal(np.asarray(crops[keep]), masks[keep])
    np.testing.assert_array_equal(np.asarray(crops[[3, 0]]), masks[[3, 0]])
    np.testing.assert_array_equal(np.asarray(crops[1:3]), masks[1:3])
    for stride in (1, 2, 5):
        want = masks[:, ::stride, ::stride]
        np.testing.assert_array_equal(crops.thinned(stride), want)
    for i, mask in enumerate(masks):
        window, pixels = crops.crop(i)
        np.testing.assert_array_equal(mask[window], pixels)
        assert pixels.sum() == mask.sum() == crops.packed[i].area
    want = [tiny_coco.encode_mask(mask)["counts"] for mask in masks]
    assert crops.encode() == want


def test_what_is_written_and_drawn_is_the_same():
    masks = random_masks(4, number=6, size=(80, 120))
    crops = crops_of(masks)
    dense, packed = (prediction_of(m, crops.boxes()) for m in (masks, crops))
    assert to_coco_results(packed, [7]) == to_coco_results(dense, [7])
    image = np.full((80, 120, 3), 90, np.uint8)
    drawn = [draw_prediction(image, p, ("cell",)) for p in (dense, packed)]
    np.testing.assert_array_equal(*drawn)
    assert len(packed.above(0.7)) == len(packed.above(0.7).masks) == 3


def test_no_mask_at_all():
    crops = MaskCrops([], SIZE)
    assert crops.shape == (0, *SIZE) and crops.boxes().shape == (0, 4)
    assert np.asarray(crops).shape == (0, *SIZE) and list(crops) == []
    assert crops.thinned(4).shape == (0, 6, 8)
    assert pack(np.zeros((3, 4), bool)) is None


def test_a_thousand_masks_of_20000_x_20000_pixels_are_small(monkeypatch):
    size, mask = (20_000, 20_000), np.ones((30, 40), bool)
    places = np.random.default_rng(0).integers(0, 19_000, (1000, 2)).tolist()
    crops = MaskCrops([pack(mask, *place) for place in places], size)
    monkeypatch.setattr(MaskCrops, "_whole", None)  # what makes a mask of 400 MB
    assert sum(len(m.counts) for m in crops.packed) < 100_000
    prediction = Prediction(crops, crops.boxes(), np.ones(1000, np.float32), np.zeros(1000, int), 0)
    results = to_coco_results(prediction, [1])
    assert all(len(r["segmentation"]["counts"]) < 200 for r in results)
    assert {r["bbox"][2] * r["bbox"][3] for r in results} == {1200}


@given(st.integers(0, 10_000), st.integers(0, 12))
def test_overlapping_pairs_are_all_and_only_those(seed, number):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 20, (number, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, (number, 2))], axis=1)
    want = [
        (i, j)
        for i in range(number)
        for j in range(i + 1, number)
        if (np.maximum(boxes[i, :2], boxes[j, :2]) < np.minimum(*boxes[[i, j], 2:])).all()
    ]
    assert overlapping_pairs(boxes).tolist() == [list(pair) for pair in want]


def test_within_reads_any_rectangle():
    mask = random_masks(1)[2]
    packed = pack(mask)
    for y0, x0, y1, x1 in [(0, 0, *SIZE), (5, 6, 9, 30), (20, 0, 23, 4)]:
        np.testing.assert_array_equal(packed.within((y0, x0, y1, x1)), mask[y0:y1, x0:x1])
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(crops_of(mask[None]), copy=False)
