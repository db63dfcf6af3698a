"""Test-time augmentation with a network that finds what it is shown, but not evenly."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solov2_jax.data.buckets import derive_buckets
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.preprocess import InputOptions, padded_shape
from solov2_jax.structs import Detections
from solov2_jax.tools.multiview.merge import NmsOptions
from solov2_jax.tools.multiview.tta import (
    AugmentedPredictor,
    TtaOptions,
    fuse_scores,
    group_views,
    scaled,
)

NMS = NmsOptions("matrix", "gaussian", 2.0, 0.5, 0.05)
INPUT = InputOptions("RGB", (0.0,) * 3, (1.0,) * 3, 64, 96, ())
KEPT = 4


class Channels(Predictor):
    """Finds the bright part of each channel; the score tells left from right.

    A channel's class is its number, its score its brightness, weighted to the left.
    Its soft mask leans to one side, so that mirrored views differ.
    """

    def __init__(self, minimum=0, options=INPUT):
        self.input, self.mask_threshold, self.minimum = options, 0.5, minimum
        self.class_names, self.category_ids = ("x", "y", "z"), (1, 2, 3)
        self.shapes = []

    def report_limits(self, detections, index): ...

    def detect(self, batch):
        images = np.asarray(batch["image"], np.float32) / 255
        self.shapes.append(images.shape)
        soft = np.zeros((len(images), KEPT, *(s // 4 for s in images.shape[1:3])))
        scores = np.zeros((len(images), KEPT))
        for b, (image, size) in enumerate(zip(images, batch["image_size"], strict=True)):
            for c in range(3):
                cells = image[..., c].reshape(soft.shape[2], 4, soft.shape[3], 4)
                mean = cells.mean((1, 3))
                soft[b, c] = 0.7 * mean + 0.3 * cells[:, 0, :, 0]
                inside = image[: size[0], : size[1], c]
                weight = np.linspace(1, 0.2, inside.shape[1]) ** 2
                if inside.any() and size[0] >= self.minimum:
                    scores[b, c] = (inside * weight).sum() / inside.sum()
        order = np.argsort(-scores, axis=1, kind="stable")
        scores = np.take_along_axis(scores, order, 1)
        soft = np.take_along_axis(soft, order[..., None, None], 1)
        return Detections(
            jnp.asarray(scores, jnp.float32),
            jnp.asarray(order, jnp.int32),
            jnp.asarray(soft, jnp.float32),
            jnp.asarray(scores > 0),
            jnp.asarray([KEPT] * len(images)),
        )


def picture(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 8, width // 8
    image[h : 3 * h, w : 4 * w, 2] = 255
    image[4 * h : 6 * h, w : 3 * w, 1] = 255
    image[2 * h : 5 * h, 4 * w + 2 : 7 * w, 0] = 255
    return image


def predict(image, predictor=None, **options):
    augmented = AugmentedPredictor(predictor or Channels(), TtaOptions(**options), NMS)
    (prediction,) = augmented.predict_images([image])
    return prediction


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5)])
@pytest.mark.parametrize("size", [(64, 80), (61, 83), (128, 90), (40, 51)])
def test_a_mirrored_image_gives_the_mirrored_result(size, scales):
    image = picture(*size)
    one = predict(image, flip=True, scales=scales)
    two = predict(np.ascontiguousarray(image[:, ::-1]), flip=True, scales=scales)
    assert len(one) == 3
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-6)
    np.testing.assert_array_equal(one.masks, two.masks[..., ::-1])
    # Without augmentation it does not: the network tells left from right.
    plain = predict(image), predict(np.ascontiguousarray(image[:, ::-1]))
    assert not np.allclose(plain[0].scores, plain[1].scores, rtol=0.05)


@pytest.mark.parametrize("size", [(64, 80), (61, 83), (200, 300)])
def test_every_object_is_found_once_where_it_is(size):
    image = picture(*size)
    predictor = Channels()
    prediction = predict(image, predictor, flip=True, scales=(1.0, 2.0))
    # Two scales, two pictures each, and nothing twice.
    assert [shape[0] for shape in predictor.shapes] == [2, 2]
    assert sorted(prediction.labels.tolist()) == [0, 1, 2]
    assert prediction.masks.shape == (3, *size)
    for mask, label, box in zip(prediction.masks, prediction.labels, prediction.boxes, strict=True):
        assert iou(mask, image[..., label] > 0) > 0.8
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_one_view_is_no_augmentation():
    (plain,) = Channels().predict_images([picture(64, 80)])
    prediction = predict(picture(64, 80))
    np.testing.assert_array_equal(prediction.masks, plain.masks)
    np.testing.assert_array_equal(prediction.labels, plain.labels)
    np.testing.assert_allclose(prediction.scores, plain.scores, rtol=1e-6)


def test_scores_are_root_mean_squares_and_a_view_without_the_object_counts_0():
    image = picture(64, 80)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    one, two = (
        dict(zip(p.labels.tolist(), p.scores.tolist(), strict=True))
        for p in (predict(image), predict(mirrored))
    )
    both = predict(image, flip=True)
    for label, score in zip(both.labels.tolist(), both.scores.tolist(), strict=True):
        assert score == pytest.approx(np.hypot(one[label], two[label]) / 2**0.5, rel=1e-5)
    half = predict(image, Channels(minimum=100), scales=(1.0, 2.0))
    for label, score in zip(half.labels.tolist(), half.scores.tolist(), strict=True):
        assert score == pytest.approx(one[label] / 2**0.5, rel=0.05)


def test_an_object_seen_at_one_of_six_scales_keeps_a_sensible_score():
    """The more views see it, the better; one that all see keeps what each gives it."""
    scores = np.full(6, 0.2)
    labels, iou = np.zeros(6, int), np.ones((6, 6))
    fused = []
    for seen in range(1, 7):
        group, views = [np.arange(seen)], np.arange(6)
        (mean,), _ = fuse_scores(group, scores, labels, views, iou, NMS)
        fused.append(float(mean))
    assert fused == sorted(set(fused)) and fused[-1] == pytest.approx(0.2)
    assert fused[0] == pytest.approx(0.2 / 6**0.5) and fused[0] > NMS.update_threshold


@pytest.mark.parametrize("size", [(64, 80), (61, 83), (40, 51)])
def test_objects_at_the_borders_reach_them(size):
    image = np.zeros((*size, 3), np.uint8)
    image[:20, 12:, 0] = 255  # to the right border, where padding begins
    image[30:, :20, 1] = 255
    one = predict(image, flip=True)
    two = predict(np.ascontiguousarray(image[:, ::-1]), flip=True)
    np.testing.assert_array_equal(one.masks, two.masks[..., ::-1])
    for mask, label in zip(one.masks, one.labels, strict=True):
        assert iou(mask, image[..., label] > 0) > 0.85
    masks = dict(zip(one.labels.tolist(), one.masks, strict=True))
    assert masks[0][:15, -1].all() and masks[0][0, 20:].all()
    assert masks[1][-1, :15].all() and masks[1][-5:, 0].all()


def test_nothing_found():
    prediction = predict(np.zeros((64, 80, 3), np.uint8), flip=True, scales=(1.0, 0.5))
    assert len(prediction) == 0 and prediction.masks.shape == (0, 64, 80)


@given(st.integers(0, 10_000))
def test_groups_hold_each_detection_once_one_a_view_and_one_class(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    scores = np.where(rng.random(n) < 0.8, rng.random(n), 0.0)
    labels, views = rng.integers(0, 2, n), np.sort(rng.integers(0, 3, n))
    iou = rng.random((n, n))
    iou = np.maximum(iou, iou.T)
    groups = group_views(scores, labels, views, iou)
    assert sorted(np.concatenate([[], *groups]).tolist()) == np.flatnonzero(scores).tolist()
    for group in groups:
        assert len(set(views[group])) == len(group) and len(set(labels[group])) == 1
        assert (iou[group[0], group[1:]] > 0.5).all()
        assert scores[group[0]] == scores[group].max()


def test_nms_is_between_objects_that_no_view_saw_both():
    scores = np.array([0.8, 0.6, 0.4, 0.2])
    labels, views = np.zeros(4, int), np.array([0, 1, 0, 1])
    iou = np.array([[1, 0.4, 0.4, 0], [0.4, 1, 0, 0.4], [0.4, 0, 1, 0.9], [0, 0.4, 0.9, 1]])
    groups = group_views(scores, labels, views, iou)
    assert [g.tolist() for g in groups] == [[0], [1], [2, 3]]
    means, kept = fuse_scores(groups, scores, labels, views, iou, NMS)
    # 0 and 1 come from two views: 1 decays. 2 and 3 share a view with both.
    both = (0.4**2 / 2 + 0.2**2 / 2) ** 0.5
    want = [0.8 / 2**0.5, both, 0.6 / 2**0.5 * np.exp(-2 * 0.4**2)]
    assert sorted(means.tolist(), reverse=True) == pytest.approx(want)
    assert [g.tolist() for g in kept] == [[0], [2, 3], [1]]


def test_padded_shapes_are_scaled_too():
    options = scaled(replace(INPUT, buckets=((64, 96), (96, 64))), 1.25)
    assert (options.min_size, options.max_size) == (80, 120)
    assert options.buckets == ((96, 128), (128, 96))
    predictor = Channels(options=replace(INPUT, buckets=((96, 96),)))
    predict(picture(64, 80), predictor, scales=(1.0, 0.5))
    assert [shape[1:3] for shape in predictor.shapes] == [(96, 96), (64, 64)]


def test_impossible_scales_are_refused():
    for scales in ((), (0.0,), (-1.0,), (1.0, 1.0), (float("nan"),)):
        with pytest.raises(ValueError, match="--tta"):
            TtaOptions(True, scales)


def test_scaled_shapes_hold_every_image_that_the_shapes_hold():
    """Sides are rounded twice: an image's at scale 1, and at the view's."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        short = int(rng.integers(32, 900))
        options = replace(INPUT, min_size=short, max_size=int(short * rng.uniform(1, 2)))
        sizes = rng.integers(1, 3000, (5, 2)).tolist()
        own = [padded_shape(h, w, "", options)[1] for h, w in sizes]
        shapes = derive_buckets(np.array(own), 2, 0.02)
        view = scaled(replace(options, buckets=shapes), float(rng.uniform(0.1, 3)))
        for h, w in sizes:
            padded_shape(h, w, f"{h} x {w}", view)  # raises if none holds it
