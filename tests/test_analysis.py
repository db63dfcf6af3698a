"""Analysis of an evaluation on cases small enough to be counted by hand."""

import numpy as np
import pytest
from test_evaluation import HEIGHT, WIDTH, annotation, prediction
from test_figures import random_case

from solov2_jax.evaluation.coco_accumulate import score_fast
from solov2_jax.evaluation.coco_match import image_overlaps
from solov2_jax.evaluation.coco_tables import make_detections, make_objects
from solov2_jax.evaluation.ground_truth import read_ground_truth
from solov2_jax.inference.prediction import to_coco_results
from solov2_jax.tools.report import analysis

IDS = (3, 7)
# Objects, 40 x 40 each; the overlap of two moved by m columns is (40 - m) / (40 + m).
A, B, C, D = (0, 0, 40, 40), (50, 0, 90, 40), (100, 0, 140, 40), (0, 60, 40, 100)
CROWD = (50, 60, 150, 110)


def moved(box, columns):
    return (box[0] + columns, box[1], box[2] + columns, box[3])


def columns(annotations, predictions, images=(1, 2)):
    content = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
        "categories": [{"id": i, "name": f"class {i}"} for i in IDS],
        "annotations": annotations,
    }
    truth = read_ground_truth(content)
    results = [r for p in predictions for r in to_coco_results(p, IDS)]
    objects = make_objects(truth.annotations, images, IDS)
    return objects, make_detections(results, images, IDS)


@pytest.fixture
def case():
    """One detection of every fate; the boxes say what they are about."""
    annotations = [
        annotation(1, 1, 3, A),  # found, IoU 1, and a second time
        annotation(2, 1, 3, B),  # found too far to the right, IoU 20 / 60
        annotation(3, 1, 7, C),  # found, but as class 3
        annotation(4, 1, 7, D),  # missed
        annotation(5, 1, 3, CROWD, iscrowd=1),
    ]
    boxes = [A, moved(A, 5), moved(B, 20), C, (60, 70, 100, 110), (0, 41, 30, 59)]
    labels = [0, 0, 0, 0, 0, 1]
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    found = [prediction(1, boxes, labels, scores), prediction(2, [B], [1], [0.3])]
    return columns(annotations, found)


def outcome_of(objects, found):
    overlaps = list(image_overlaps(objects, found))
    return overlaps, analysis.outcomes(objects, found, overlaps)


def test_every_fate(case):
    objects, found = case
    _, outcome = outcome_of(objects, found)
    by_score = np.argsort(-found.score)
    names = [(*analysis.ERRORS, "-")[e] for e in outcome.error[by_score]]
    assert names == [*("-", "duplicate", "localisation", "class", "-", "background", "background")]
    assert outcome.right[by_score].tolist() == [True] + 6 * [False]
    assert outcome.ignored[by_score].tolist() == 4 * [False] + [True, False, False]
    expected = [1, 35 / 45, 20 / 60, 1]
    np.testing.assert_allclose(outcome.iou[by_score][:4], expected)
    boxes = objects.boxes.tolist()
    assert boxes[outcome.meant[by_score[2]]][0] == B[0]
    assert boxes[outcome.meant[by_score[3]]][0] == C[0]
    assert [boxes[i][:2] for i in np.flatnonzero(outcome.missed)] == [list(D[:2])]


def test_what_each_kind_of_error_costs(case):
    objects, found = case
    _, outcome = outcome_of(objects, found)
    split = analysis.error_split(objects, found, outcome, 2)
    assert split.counts == {
        "localisation": 1,
        "class": 1,
        "both": 0,
        "duplicate": 1,
        "background": 2,
        "missed": 1,
    }
    # Class 3: 1 of 2 found by the first of 4; class 7: nothing found.
    one = 51 / 101
    assert split.ap50 == pytest.approx(one / 2)
    # The third of four finds the second: precision 2/3 beyond recall 1/2.
    mended = (51 + 50 * 2 / 3) / 101
    assert split.gains["localisation"] == pytest.approx((mended - one) / 2)
    # C found as class 7: recall 1/2 with precision 1 there.
    assert split.gains["class"] == pytest.approx(one / 2)
    # Duplicates come after every right one, and so does the background.
    assert split.gains["duplicate"] == split.gains["background"] == 0
    # D not asked for: class 7 has C alone, which is still not found.
    assert split.gains["missed"] == 0


@pytest.mark.parametrize("seed", range(8))
def test_ap50_is_cocos(seed):
    content, results = random_case(seed)
    truth = read_ground_truth(content)
    ids, categories = sorted(truth.images), sorted(truth.categories)
    objects = make_objects(truth.annotations, ids, categories)
    found = make_detections(results, ids, categories)
    _, outcome = outcome_of(objects, found)
    split = analysis.error_split(objects, found, outcome, len(categories))
    expected = score_fast(objects, found, "segm", len(categories)).figures["AP50"]
    # Without objects COCO's figure does not exist, and here there is nothing to gain.
    assert split.ap50 == pytest.approx(max(expected, 0), abs=1e-12)
    assert split.gains["localisation"] >= 0 and split.gains["missed"] >= 0
    wrong = ~outcome.right & ~outcome.ignored
    assert (outcome.error >= 0).tolist() == wrong.tolist()


def test_curve_and_best_threshold():
    score = np.array([0.9, 0.2, 0.7, 0.7, 0.5])
    right = np.array([True, False, True, False, True])
    found = analysis.curve(score, right, positives=4)
    # Equal scores share the figures of the last of them.
    np.testing.assert_allclose(found.precision, [1, 2 / 3, 2 / 3, 3 / 4, 3 / 5])
    np.testing.assert_allclose(found.recall, [1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4])
    assert found.threshold == 0.5 and found.at(0.5) == pytest.approx((0.75,) * 3)
    assert found.at(0.95) == (0, 0, 0) and found.at(0.0)[0] == pytest.approx(3 / 5)
    nothing = analysis.curve(score[:0], right[:0], positives=4)
    assert nothing.threshold == 0 and nothing.at(0.5) == (0, 0, 0)


def test_curves_leave_out_crowds_and_other_classes(case):
    objects, found = case
    _, outcome = outcome_of(objects, found)
    everything, each = analysis.curves(objects, found, outcome, 2)
    assert [c.positives for c in (everything, *each)] == [4, 2, 2]
    assert [len(c.score) for c in (everything, *each)] == [6, 4, 2]
    assert each[0].threshold == 0.899 and each[0].f1.max() == pytest.approx(2 / 3)


def test_confusion_matrix(case):
    objects, found = case
    overlaps, outcome = outcome_of(objects, found)
    args = objects, found, overlaps, outcome.ignored
    expected = [[1, 0, 1], [1, 0, 1], [2, 2, 0]]
    assert analysis.confusion_matrix(*args, 0.0, 2).tolist() == expected
    expected = [[1, 0, 1], [0, 0, 2], [2, 0, 0]]
    assert analysis.confusion_matrix(*args, 0.65, 2).tolist() == expected


def test_sizes_scores_and_images(case):
    objects, found = case
    _, outcome = outcome_of(objects, found)
    rows = analysis.by_size(objects, found, outcome, 0.35)
    assert [r.objects for r in rows] == [0, 0, 4, 0, 0, 0]
    assert rows[2].found == 1 and rows[2].mean_iou == 1
    bins = analysis.calibration(found, outcome, bins=2)
    assert bins.count.tolist() == [2, 4]  # 0.3 and 0.4; the crowd's 0.5 is left out
    np.testing.assert_allclose(bins.score, [0.35, 0.75])
    np.testing.assert_allclose(bins.right, [0, 0.25])
    assert bins.error == pytest.approx((2 * 0.35 + 4 * 0.5) / 6)
    images = analysis.by_image(objects, found, outcome, 0.35, [1, 2])
    first, second = images
    assert (first.objects, first.right, first.false, first.missed) == (4, 1, 4, 3)
    assert first.f1 == pytest.approx(2 / 9) and second.f1 == 1
    assert analysis.worst_first(images) == [first]
    every = analysis.by_image(objects, found, outcome, 0.0, [1, 2])
    assert [r.image_id for r in analysis.worst_first(every)] == [2, 1]
