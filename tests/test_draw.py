"""Pictures: what is coloured, what is not, and that labels stay readable."""

import numpy as np
import pytest

from solov2_jax.inference.draw import (
    contour,
    distinct_colors,
    draw_prediction,
    place_labels,
    text_box,
)
from solov2_jax.inference.prediction import Prediction

SIZES = (9, 20)


def squares(corners, side, height, width, labels=None):
    """One square object for each (x, y) corner, scores falling from 0.99."""
    n = len(corners)
    masks = np.zeros((n, height, width), bool)
    boxes = np.zeros((n, 4), np.float32)
    for i, (x, y) in enumerate(corners):
        masks[i, y : y + side, x : x + side] = True
        boxes[i] = x, y, min(x + side, width), min(y + side, height)
    scores = np.linspace(0.99, 0.31, n).astype(np.float32)
    labels = np.zeros(n, np.int64) if labels is None else np.array(labels)
    return Prediction(masks, boxes, scores, labels, image_id=1)


def overlaps(a, b):
    """Whether two (x0, y0, x1, y1) share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_objects_get_colours_of_their_own_and_the_rest_is_untouched():
    image = np.full((200, 300, 3), 90, np.uint8)
    p = squares([(20, 60), (180, 60)], 80, 200, 300)
    picture = draw_prediction(image, p, ["thing"])
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert (image == 90).all(), "the input must not be drawn into"
    first, second = picture[130, 30], picture[130, 190]
    assert (first != 90).any() and (second != 90).any() and (first != second).any()
    assert (picture[:, 110:175] == 90).all()
    # The contour is opaque, the inside lets the image through.
    assert (picture[60, 25] == distinct_colors(2)[0]).all()
    assert (picture[135, 40] != distinct_colors(2)[0]).any()


def test_small_object_on_a_large_one_is_seen():
    image = np.zeros((100, 100, 3), np.uint8)
    p = squares([(40, 40), (0, 0)], 20, 100, 100)
    p.masks[1] = True
    p.boxes[1] = 0, 0, 100, 100
    picture = draw_prediction(image, p, ["thing"])
    assert (picture[58, 50] != picture[95, 95]).any()


def test_no_objects_and_another_images_masks():
    image = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    np.testing.assert_array_equal(draw_prediction(image, squares([], 5, 30, 40), ["thing"]), image)
    with pytest.raises(ValueError, match="different images"):
        draw_prediction(image, squares([], 5, 40, 30), ["thing"])


def test_contour_closes_at_the_border_and_keeps_one_pixel_masks():
    mask = np.ones((6, 7), bool)
    line = contour(mask, 1)
    assert line.sum() == 2 * 7 + 2 * 4
    assert not line[1:-1, 1:-1].any()
    assert contour(np.ones((1, 1), bool), 3).all()
    assert contour(np.ones((1, 9), bool), 1).all()


def test_labels_of_fifty_objects_of_one_class_do_not_pile_up():
    corners = [(x, y) for y in range(8, 240, 50) for x in range(4, 250, 25)]
    p = squares(corners, 18, 256, 256)
    labels = place_labels(p, ["nucleus"], text_box, SIZES)
    assert len(labels) == len(p) == 50
    for i, one in enumerate(labels):
        x0, y0, x1, y1 = one.box
        assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256
        near = p.boxes[one.index] + (-3, -3, 3, 3)
        assert overlaps(one.box, near), "a label belongs at its object"
        for other in labels[i + 1 :]:
            assert not overlaps(one.box, other.box)
    # Crowded: scores alone, but the best object tells the class.
    named = [label.index for label in labels if "nucleus" in label.text]
    assert named == [0]
    # The labels leave most of every object in sight.
    hidden = np.zeros((256, 256), bool)
    for label in labels:
        x0, y0, x1, y1 = label.box
        hidden[y0:y1, x0:x1] = True
    assert (p.masks & hidden).sum() < 0.35 * p.masks.sum()


def test_uncrowded_labels_have_name_score_and_a_size_by_their_object():
    p = squares([(300, 30), (30, 30)], 150, 480, 640, labels=[1, 0])
    p.masks[1, 40:], p.masks[1, :, 40:] = False, False
    p.boxes[1] = 30, 30, 40, 40
    small, large = place_labels(p, ["cup", "bus"], text_box, SIZES)
    assert (large.text, small.text) == ("bus 0.99", "cup 0.31")
    assert small.font_size < large.font_size
    x0, y0, x1, y1 = large.box
    assert p.masks[0, y0:y1, x0:x1].all(), "a large object holds its label"


def test_label_stays_inside_the_picture_at_a_corner_and_in_a_tiny_one():
    (label,) = place_labels(squares([(0, 0)], 6, 90, 90), ["thing"], text_box, SIZES)
    assert min(label.box) >= 0
    p = squares([(0, 0)], 2, 4, 5)
    assert place_labels(p, ["thing"], text_box, SIZES) == []
    assert draw_prediction(np.zeros((4, 5, 3), np.uint8), p, ["thing"]).any()


def test_a_hundred_colours_differ():
    colors = distinct_colors(100).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(2) + 999 * np.eye(100)
    assert distance.min() > 5
    neighbours = np.abs(np.diff(colors, axis=0)).sum(1)
    assert neighbours.min() > 150
