"""Objects keep their number from frame to frame; what is chosen is chosen by name."""

import numpy as np
import pytest

from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.predict.outputs import DetectionFilter, parse_classes
from solov2_jax.tools.predict.track import Tracker

SIZE = (60, 100)


def frame(*objects, size=SIZE):
    """Returns a prediction of squares (x, y, side, label), scores falling."""
    masks = np.zeros((len(objects), *size), bool)
    boxes = np.zeros((len(objects), 4), np.float32)
    for i, (x, y, side, _) in enumerate(objects):
        masks[i, y : y + side, x : x + side] = True
        boxes[i] = x, y, min(x + side, size[1]), min(y + side, size[0])
    scores = np.linspace(0.9, 0.5, len(objects)).astype(np.float32)
    labels = np.array([label for *_, label in objects], int)
    return Prediction(masks, boxes, scores, labels, 0, ("a", "b"))


def numbers(tracker, *objects, **options):
    return tracker.update(frame(*objects, **options)).tracks.tolist()


def test_crossing_order_does_not_matter():
    tracker = Tracker()
    assert numbers(tracker, (10, 10, 20, 0), (60, 10, 20, 0)) == [0, 1]
    # The best detection of this frame is the other object.
    assert numbers(tracker, (58, 10, 20, 0), (14, 10, 20, 0)) == [1, 0]
    assert numbers(tracker, (18, 10, 20, 0), (56, 10, 20, 0), (0, 40, 9, 0)) == [
        0,
        1,
        2,
    ]


def test_the_sum_of_overlaps_decides_not_the_best_pair():
    tracker = Tracker(min_iou=0.1)
    numbers(tracker, (10, 10, 20, 0), (24, 10, 20, 0))
    # Greedily the first would take track 1 (IoU 0.74), and the second would be new:
    # it overlaps track 1 alone.
    assert numbers(tracker, (21, 10, 20, 0), (30, 10, 20, 0)) == [0, 1]


def test_a_class_never_continues_another_and_far_is_new():
    tracker = Tracker()
    numbers(tracker, (10, 10, 20, 0))
    assert numbers(tracker, (10, 10, 20, 1)) == [1]
    assert numbers(tracker, (60, 30, 20, 0)) == [2]


def test_an_object_comes_back_within_the_patience_only():
    tracker = Tracker(patience=3)
    numbers(tracker, (10, 10, 20, 0))
    assert numbers(tracker) == [] and numbers(tracker) == []
    assert numbers(tracker, (12, 10, 20, 0)) == [0]
    for _ in range(3):
        numbers(tracker)
    assert numbers(tracker, (12, 10, 20, 0)) == [1]


def test_another_picture_size_starts_anew():
    tracker = Tracker()
    numbers(tracker, (10, 10, 20, 0))
    assert numbers(tracker, (10, 10, 20, 0), size=(80, 80)) == [1]


def test_selection_by_score_class_and_number():
    prediction = frame((0, 0, 9, 0), (20, 0, 9, 1), (40, 0, 9, 0), (60, 0, 9, 1))
    assert len(DetectionFilter(0.6)(prediction)) == 3
    chosen = DetectionFilter(0.0, frozenset({1}))(prediction)
    assert chosen.labels.tolist() == [1, 1] and chosen.names == ["b", "b"]
    best = DetectionFilter(0.0, frozenset({0}), 1)(prediction)
    assert best.boxes.tolist() == [[0, 0, 9, 9]]
    followed = Tracker().update(prediction)
    assert DetectionFilter(0.0, frozenset({1}))(followed).tracks.tolist() == [1, 3]


def test_classes_by_name_or_id():
    names, ids = ("person", "traffic light", "7"), (1, 10, 44)
    assert parse_classes(["person", "10"], names, ids) == {0, 1}
    assert parse_classes(["7"], names, ids) == {2}, "a name goes before an id"
    assert parse_classes(["Traffic Light "], names, ids) == {1}
    assert parse_classes(["", " "], names, ids) is None
    with pytest.raises(ValueError, match="--classes persn: .* did you mean person"):
        parse_classes(["persn"], names, ids)
    with pytest.raises(ValueError, match="--classes 3: no such category id"):
        parse_classes(["3"], names, ids)


def moving(speed, missing, seed):
    """Returns identity switches of squares that cross a picture, some detections missing."""
    rng, tracker, last, switches = np.random.default_rng(seed), Tracker(), {}, 0
    rows, starts = [2, 46], rng.uniform(0, 20, 2)
    for step in range(40):
        x = (starts + speed * step).astype(int)
        shown = np.flatnonzero(rng.random(2) >= missing)
        objects = [(int(x[i]), rows[i], 10, 0) for i in shown]
        for i, number in zip(
            shown.tolist(), numbers(tracker, *objects, size=(60, 700)), strict=True
        ):
            switches += last.get(i, number) != number
            last[i] = number
    return switches


@pytest.mark.parametrize(("speed", "missing"), [(2, 0.15), (14, 0.0)])
def test_missing_and_fast_objects_keep_their_number(speed, missing):
    assert sum(moving(speed, missing, seed) for seed in range(5)) <= 3
