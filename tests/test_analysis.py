"""Analysis of an evaluation on cases small enough to be counted by hand."""

import numpy as np
import pytest
from test_coco_score import random_case
from test_evaluation import HEIGHT, WIDTH, annotation, prediction

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.inference.prediction import to_coco_results
from solov2_jax.tools.report import analysis
from solov2_jax.tools.report.outcomes import outcomes

IDS = (3, 7)
# Objects, 40 x 40 each; the overlap of two moved by m columns is (40 - m) / (40 + m).
A, B, C, D = (0, 0, 40, 40), (50, 0, 90, 40), (100, 0, 140, 40), (0, 60, 40, 100)
CROWD = (50, 60, 150, 110)


def moved(box, columns):
    return (box[0] + columns, box[1], box[2] + columns, box[3])


def outcome_of(annotations, predictions, images=(1, 2)):
    content = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
        "categories": [{"id": i, "name": f"class {i}"} for i in IDS],
        "annotations": annotations,
    }
    evaluator = CocoEvaluator(content, IDS, [f"class {i}" for i in IDS])
    evaluator.add_results([r for p in predictions for r in to_coco_results(p, IDS)])
    return outcomes(evaluator)


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
    predictions = [prediction(1, boxes, labels, scores), prediction(2, [B], [1], [0.3])]
    return outcome_of(annotations, predictions)


def test_what_became_of_every_detection(case):
    by_score = np.argsort(-case.detections.score)
    assert case.right[by_score].tolist() == [True] + 6 * [False]
    assert case.ignored[by_score].tolist() == 4 * [False] + [True, False, False]
    every = np.ones(len(by_score), bool)
    assert case.found_iou(every).tolist() == [1, 0, 0, 0, 0]
    assert case.found_iou(case.detections.score < 0.85).tolist() == [0] * 5


def test_what_each_kind_of_error_costs(case):
    split = analysis.error_split(case)
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
    fixed = (51 + 50 * 2 / 3) / 101
    assert split.gains["localisation"] == pytest.approx((fixed - one) / 2)
    # C found as class 7: recall 1/2 with precision 1 there.
    assert split.gains["class"] == pytest.approx(one / 2)
    # Duplicates come after every right one, and so does the background.
    assert split.gains["duplicate"] == split.gains["background"] == 0
    # D no longer counted: class 7 has C alone, which is still not found.
    assert split.gains["missed"] == 0
    shown = analysis.errors_from(case, 0.65)
    assert shown == {**split.counts, "class": 0, "background": 0, "missed": 3}


@pytest.mark.parametrize("seed", range(8))
def test_ap50_is_cocos(seed):
    content, results = random_case(seed)
    ids = sorted(c["id"] for c in content["categories"])
    evaluator = CocoEvaluator(content, ids, [str(i) for i in ids])
    evaluator.add_results(results)
    outcome = outcomes(evaluator)
    split = analysis.error_split(outcome)
    # Without objects COCO's AP50 does not exist, and here there is nothing to gain.
    expected = np.nan_to_num(evaluator.evaluate()["segm/AP50"], nan=0)
    assert split.ap50 == pytest.approx(expected, abs=1e-12)
    assert split.gains["localisation"] >= 0 and split.gains["missed"] >= 0
    wrong = int((~outcome.right & ~outcome.ignored).sum())
    assert sum(split.counts.values()) - split.counts["missed"] == wrong


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
    everything, each = analysis.curves(case, 2)
    assert [c.positives for c in (everything, *each)] == [4, 2, 2]
    assert [len(c.score) for c in (everything, *each)] == [6, 4, 2]
    assert each[0].threshold == 0.899 and each[0].f1.max() == pytest.approx(2 / 3)


def test_confusion_matrix(case):
    expected = [[1, 0, 1], [1, 0, 1], [2, 2, 0]]
    assert analysis.confusion_matrix(case, 0.0, 2).tolist() == expected
    expected = [[1, 0, 1], [0, 0, 2], [2, 0, 0]]
    assert analysis.confusion_matrix(case, 0.65, 2).tolist() == expected


def test_sizes_scores_and_images(case):
    rows = analysis.by_size(case, 0.35)
    assert [r.objects for r in rows] == [0, 0, 4, 0, 0, 0]
    assert rows[2].found == 1 and rows[2].mean_iou == 1
    assert [rows[0].name, rows[-1].name] == ["0\u201316", "\u2265 192"]
    bins = analysis.calibration(case, num_bins=2)
    assert bins.count.tolist() == [2, 4]  # 0.3 and 0.4; the crowd's 0.5 is left out
    np.testing.assert_allclose(bins.score, [0.35, 0.75])
    np.testing.assert_allclose(bins.right, [0, 0.25])
    assert bins.error == pytest.approx((2 * 0.35 + 4 * 0.5) / 6)
    images = analysis.by_image(case, 0.35, [1, 2])
    first, second = images
    assert (first.objects, first.right, first.false, first.missed) == (4, 1, 4, 3)
    assert first.f1 == pytest.approx(2 / 9) and second.f1 == 1
    assert analysis.worst_first(images) == [first]
    every = analysis.by_image(case, 0.0, [1, 2])
    assert [r.image_id for r in analysis.worst_first(every)] == [2, 1]
