"""Tiles with a network that sees what is there: one detection for each bright blob.

So a blob that a tile's border cuts is found in pieces, and must come out whole.
"""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.inference.preprocess import InputOptions
from solov2_jax.nms import mask_nms, matrix_nms
from solov2_jax.tools.multiview import tiling
from solov2_jax.tools.multiview.merge import (
    COMPLETE,
    CUT,
    ImageView,
    NmsOptions,
    ViewObject,
    merge,
    suppress,
)
from solov2_jax.tools.multiview.tiling import TiledPredictor, TileOptions, cut

INPUT = InputOptions("RGB", (0.0,), (1.0,), 32, 64, ())
NMS = NmsOptions("matrix", "gaussian", 2.0, 0.5, 0.05)
HEIGHT, WIDTH, TILE = 100, 130, 48


def components(bright):
    """Returns the 4-connected pieces of a bool [h, w] image."""
    number = np.where(bright, np.arange(bright.size).reshape(bright.shape) + 1, 0)
    while True:
        padded = np.pad(number, 1)
        most = np.maximum.reduce([number, padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:]])
        most = np.where(bright, np.maximum(most, padded[1:-1, :-2]), 0)
        if (most == number).all():
            return [number == i for i in np.unique(number[number > 0])]
        number = most


class Blobs:
    """Finds every connected piece of the red and of the green channel."""

    class_names = ("red", "green")
    category_ids = (1, 2)
    input = INPUT

    def __init__(self, change=lambda mask, tile: mask):
        self.change, self.shapes = change, []

    def predict_images(self, images, batch_size=1):
        for number, image in enumerate(images):
            self.shapes.append(image.shape)
            found = [
                (self.change(mask, number), label)
                for label in (0, 1)
                for mask in components(image[..., label] > 128)
            ]
            found = [(mask, label) for mask, label in found if mask.any()]
            # Scores in no relation to how much of a blob the tile sees.
            scores = [0.5 + (int(m.sum()) * 37 % 100) / 250 for m, _ in found]
            order = np.argsort([-s for s in scores], kind="stable")
            masks = np.zeros((len(found), *image.shape[:2]), bool)
            for mask, i in zip(masks, order, strict=True):
                mask[:] = found[i][0]
            yield Prediction(
                masks,
                np.zeros((len(found), 4), np.float32),
                np.array([scores[i] for i in order], np.float32),
                np.array([found[i][1] for i in order], int),
                number,
            )


def tiled(predictor=None, whole=False, overlap=0.25, size=TILE, border=1):
    tiles = TileOptions(size, overlap, whole)
    return TiledPredictor(predictor or Blobs(), tiles, NMS, border, (0.0, 0.0, 0.0))


def blob(kind, top, left, height, width, shape=(HEIGHT, WIDTH)):
    """A rectangle or an ellipse, cut by the picture's border, bool [H, W]."""
    y, x = (np.arange(s) for s in shape)
    if kind == "rectangle":
        rows, columns = (
            (y >= top) & (y < top + height),
            (x >= left) & (x < left + width),
        )
        return rows[:, None] & columns
    down, along = (2 * (a - b) + 1 for a, b in ((y, top), (x, left)))
    return ((down / height - 1) ** 2)[:, None] + (along / width - 1) ** 2 <= 1


def picture(masks, labels=None):
    image = np.zeros((*masks[0].shape, 3), np.uint8)
    for mask, label in zip(masks, labels or [0] * len(masks), strict=True):
        image[mask, label] = 255
    return image


def predict(image, **options):
    (prediction,) = tiled(**options).predict_images([image])
    return prediction


def assert_same(prediction, masks, labels=None):
    """The prediction's masks are these, each once."""
    labels = labels or [0] * len(masks)
    want = sorted((b, m.tobytes()) for b, m in zip(labels, masks, strict=True))
    pairs = zip(prediction.labels.tolist(), prediction.masks, strict=True)
    assert sorted((b, m.tobytes()) for b, m in pairs) == want


positions = st.tuples(
    st.sampled_from(["rectangle", "ellipse"]),
    st.integers(0, HEIGHT - 2),
    st.integers(0, WIDTH - 2),
    st.integers(1, 99),
    st.integers(1, 129),
)


@given(positions, st.booleans())
def test_a_blob_anywhere_is_one_object(position, whole):
    mask = blob(*position)
    prediction = predict(picture([mask]), whole=whole)
    assert_same(prediction, [mask])
    y, x = np.nonzero(mask)
    box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert prediction.boxes.tolist() == [box]


@pytest.mark.parametrize("shift", range(-14, 15))
def test_at_every_place_of_a_seam(shift):
    _, (first, second, *_) = 0, [v.window for v in cut(HEIGHT, WIDTH, TileOptions(48))]
    left = second[1] + shift
    masks = [blob("ellipse", 30, left, 14, 9), blob("rectangle", 2, left, 5, 25)]
    assert first[3] - second[1] >= 12
    assert_same(predict(picture(masks)), masks)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.25, 0.5]))
def test_many_blobs_of_two_classes_come_out_as_they_are(seed, overlap):
    rng = np.random.default_rng(seed)
    step = int(rng.integers(9, 40))
    masks, labels = [], []
    for top in range(0, HEIGHT, step):
        for left in range(0, WIDTH, step):
            height, width = rng.integers(1, step, 2)
            kind = rng.choice(["rectangle", "ellipse"])
            mask = blob(kind, top, left, height, width)
            if mask.any():
                masks.append(mask)
                labels.append(int(rng.integers(2)))
    prediction = predict(picture(masks, labels), overlap=overlap)
    if overlap:
        assert_same(prediction, masks, labels)
    else:  # neighbours see nothing in common: nothing tells that pieces belong together
        together = np.asarray(prediction.masks).sum(0)
        np.testing.assert_array_equal(together, np.sum(masks, axis=0))
    assert (np.diff(prediction.scores) <= 0).all()


def sloppy(mask, tile):
    """Loses or gains a pixel all around, and a tile's last column, by tile."""
    out = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            moved = np.roll(mask, step, axis)
            edge = [slice(None)] * 2
            edge[axis] = 0 if step == 1 else -1
            moved[tuple(edge)] = mask[tuple(edge)]
            out = out & moved if tile % 2 else out | moved
    if tile % 3 == 0:
        out[:, -1] = False
    return out


@given(
    st.integers(0, HEIGHT - 20),
    st.integers(0, WIDTH - 20),
    st.integers(12, 80),
    st.integers(12, 80),
)
def test_tiles_that_differ_by_a_pixel_still_agree(top, left, height, width):
    mask = blob("ellipse", top, left, height, width)
    prediction = predict(picture([mask]), predictor=Blobs(sloppy), border=2)
    # A sliver in a corner, all of which is that pixel, may be left.
    large = [m for m in prediction.masks if m.sum() > 60]
    assert len(large) == 1
    assert (large[0] & mask).sum() / (large[0] | mask).sum() > 0.7


def test_one_tile_gives_what_the_predictor_gives():
    masks = [blob("ellipse", 3, 4, 20, 20, (48, 48)), blob("rectangle", 30, 0, 9, 40)]
    masks[1] = masks[1][:48, :48]
    (plain,) = Blobs().predict_images([picture(masks)])
    prediction = predict(picture(masks), whole=True)
    np.testing.assert_array_equal(np.asarray(prediction.masks), plain.masks)
    np.testing.assert_array_equal(prediction.scores, plain.scores)


@pytest.mark.parametrize("size", [(20, 30), (20, 130), (100, 30), (1, 1), (48, 48)])
def test_small_images_are_filled_up_and_the_filling_is_no_object(size):
    predictor = Blobs()
    image = np.zeros((*size, 3), np.uint8)
    image[: size[0] // 2 + 1, : size[1] // 2 + 1, 1] = 255
    tiles = TileOptions(TILE, 0.25)
    bright = TiledPredictor(predictor, tiles, NMS, 1, (255.0, 0.0, 0.0))
    (prediction,) = bright.predict_images([image])
    assert set(predictor.shapes) == {(TILE, TILE, 3)}, "one shape: one compilation"
    assert_same(prediction, [image[..., 1] > 0], [1])


def test_the_whole_image_finds_what_no_tile_has_room_for(monkeypatch):
    """A network that sees no object over 40 pixels high in a tile's full size."""
    large = blob("ellipse", 5, 10, 90, 110)

    def small_only(mask, tile):
        seen = mask.any(1).sum() < 40
        return mask if seen else np.zeros_like(mask)

    monkeypatch.setattr(tiling, "WHOLE_PIXELS", 1000)  # 28 x 36 pixels
    assert len(predict(picture([large]), predictor=Blobs(small_only), size=90)) == 0
    found = predict(picture([large]), predictor=Blobs(small_only), size=90, whole=True)
    assert len(found) == 1
    assert (found.masks[0] & large).sum() / (found.masks[0] | large).sum() > 0.85


def test_a_tile_knows_the_outline_better_than_the_whole_image(monkeypatch):
    monkeypatch.setattr(tiling, "WHOLE_PIXELS", 1000)
    masks = [blob("ellipse", 20, 60, 11, 11), blob("ellipse", 60, 20, 10, 12)]
    assert_same(predict(picture(masks), whole=True), masks)


def found(mask, view, kind, score=0.8):
    return ViewObject(pack(mask), score, 0, frozenset({view}), kind)


LEFT, RIGHT = (0, 0, 100, 70), (0, 60, 100, 130)
VIEWS = [ImageView(LEFT, (0, 0, 100, 65)), ImageView(RIGHT, (0, 65, 100, 130))]


def test_touching_objects_stay_two_where_one_view_saw_one():
    upper = blob("rectangle", 20, 50, 20, 20)
    lower = blob("rectangle", 40, 50, 21, 20)
    both = (upper | lower) & (np.arange(WIDTH) >= 60)
    objects = [
        found(upper, 0, COMPLETE, 0.8),
        found(lower, 0, COMPLETE, 0.7),
        found(both, 1, CUT, 0.9),
    ]
    kept = merge(objects, VIEWS, NMS)
    # The cut one agrees with the lower by a hair, and gives its score, not its mask.
    assert [o.mask.area for o in kept] == [420, 400]
    assert kept[0].score == pytest.approx(0.9)


def test_a_bad_piece_of_a_complete_object_goes():
    whole = blob("rectangle", 20, 40, 20, 28)
    piece = blob("rectangle", 32, 60, 8, 7)
    other = blob("rectangle", 32, 66, 8, 30)
    kept = merge([found(whole, 0, COMPLETE), found(piece, 1, CUT, 0.9)], VIEWS, NMS)
    assert [o.mask.area for o in kept] == [whole.sum()]
    kept = merge([found(whole, 0, COMPLETE), found(other, 1, CUT, 0.9)], VIEWS, NMS)
    assert len(kept) == 2, "mostly elsewhere: an object of its own"


def test_other_views_lower_a_doubled_object_and_its_own_view_does_not():
    one, two = blob("rectangle", 20, 60, 20, 10), blob("rectangle", 28, 60, 20, 10)
    pair = [found(one, 0, COMPLETE, 0.8), found(two, 1, COMPLETE, 0.6)]
    iou = 12 / 28
    kept = merge(pair, VIEWS, NMS)
    assert [o.score for o in kept] == pytest.approx([0.8, 0.6 * np.exp(-2 * iou**2)])
    same = [found(one, 0, COMPLETE, 0.8), found(two, 0, COMPLETE, 0.6)]
    assert [o.score for o in merge(same, VIEWS, NMS)] == [0.8, 0.6]
    hard = NmsOptions("mask", "gaussian", 2.0, 0.4, 0.05)
    assert len(merge(pair, VIEWS, hard)) == 1


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_nms_over_pairs_is_the_networks_own(kernel):
    rng = np.random.default_rng(3)
    n = 40
    iou = np.triu(rng.random((n, n)) * (rng.random((n, n)) < 0.2), 1)
    iou[2, 5] = iou[2, 9] = iou[5, 9] = 1.0
    iou = iou.astype(np.float32)
    scores = np.sort(rng.random(n))[::-1].astype(np.float32)
    label = np.zeros(n, np.int32)
    pairs = np.argwhere(iou > 0)
    matrix = NmsOptions("matrix", kernel, 2.0, 0.5, 0.05)
    got = suppress(scores, pairs, iou[tuple(pairs.T)], matrix)
    dense = jnp.asarray(scores), jnp.asarray(label), jnp.asarray(iou)
    want = matrix_nms(*dense, kernel, 2.0)
    np.testing.assert_allclose(got, np.asarray(want), rtol=2e-5, atol=1e-7)
    hard = NmsOptions("mask", kernel, 2.0, 0.5, 0.05)
    got = suppress(scores, pairs, iou[tuple(pairs.T)], hard)
    np.testing.assert_array_equal(got > 0, np.asarray(mask_nms(*dense[1:], 0.5)))


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(10, 90),
    st.floats(0, 0.9),
)
def test_tiles_cover_the_image_and_their_cores_share_no_pixel(h, w, size, overlap):
    views = cut(h, w, TileOptions(size, overlap))
    times = np.zeros((h, w), int)
    for view in views:
        y0, x0, y1, x1 = view.window
        assert 0 <= y0 < y1 <= h and 0 <= x0 < x1 <= w
        assert y1 - y0 == min(size, h) and x1 - x0 == min(size, w)
        a, b, c, d = view.core
        assert y0 <= a <= c <= y1 and x0 <= b <= d <= x1
        times[a:c, b:d] += 1
    assert (times == 1).all()
    lefts = sorted({v.window[1] for v in views})
    shared = [a + size - b for a, b in zip(lefts[:-1], lefts[1:], strict=True)]
    assert all(s >= int(overlap * size) for s in shared)


def test_memory_of_a_large_image_stays_small(monkeypatch):
    """4000 x 4000 with 400 blobs: as bool [n, H, W] it would be 6.4 GB."""
    image = np.zeros((4000, 4000, 3), np.uint8)
    for top in range(0, 4000, 200):
        for left in range(0, 4000, 200):
            image[top + 30 : top + 90, left + 30 : left + 90, 0] = 255

    class Squares(Blobs):
        def predict_images(self, images, batch_size=1):
            for image in images:
                tops = np.flatnonzero(np.diff(image[..., 0].any(1), prepend=False))
                lefts = np.flatnonzero(np.diff(image[..., 0].any(0), prepend=False))
                masks = [
                    np.zeros((1000, 1000), bool)
                    for _ in range((len(tops) + 1) // 2 * ((len(lefts) + 1) // 2))
                ]
                corners = [(y, x) for y in tops[::2] for x in lefts[::2]]
                for mask, (y, x) in zip(masks, corners, strict=True):
                    mask[y : y + 60, x : x + 60] = image[y : y + 60, x : x + 60, 0] > 0
                n = len(masks)
                scores = np.full(n, 0.9, np.float32)
                boxes = np.zeros((n, 4), np.float32)
                yield Prediction(np.array(masks), boxes, scores, np.zeros(n, int), 0)

    tracemalloc.start()
    prediction = predict(image, predictor=Squares(), size=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(prediction.masks, MaskCrops)
    assert prediction.masks.shape == (400, 4000, 4000)
    assert {m.area for m in prediction.masks.packed} == {3600}
    assert peak < 200e6


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="--tile -3"):
        TileOptions(-3)
    with pytest.raises(ValueError, match="--tile_overlap 1.0"):
        TileOptions(48, 1.0)
    with pytest.raises(ValueError, match="must be uint8"):
        predict(np.zeros((4, 4), np.uint8))
