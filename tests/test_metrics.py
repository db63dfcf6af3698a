"""Each metric against its public implementation, whose numbers are stored.

`metric_cases.py` makes the cases and stored what lvis-api, boundary_iou_api,
cityscapesscripts and FCIS's program say of them.
"""

import json
import math

import numpy as np
import pytest
from metric_cases import GOLDEN, SEEDS, encode, instances_case, lvis_case, write_cityscapes_case
from pycocotools import mask as coco_mask

from solov2_jax.data.cityscapes import CLASSES
from solov2_jax.evaluation.boundary_eval import boundary, boundary_rle, boundary_width
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import METRICS
from solov2_jax.evaluation.evaluators import OwnEvaluator, make_evaluator
from solov2_jax.inference.prediction import Prediction
from solov2_jax.io import InputError
from solov2_jax.tools.report.cityscapes_results import read_cityscapes_results

EXPECTED = json.loads(GOLDEN.read_text())
TOLERANCE = 1e-12


def evaluated(content, results, metric, **options):
    """Returns the evaluator of results over all images, and its metrics."""
    if isinstance(content, dict):
        categories = {c["id"]: c["name"] for c in content["categories"]}
    else:
        categories = CLASSES
    ids, names = list(categories), list(categories.values())
    evaluator = make_evaluator(content, ids, names, metric=metric, **options)
    if isinstance(results, str):
        results = read_cityscapes_results(results, evaluator.truth)
    evaluator.add_results(results)
    return evaluator, evaluator.evaluate()


def assert_equal(value, expected):
    """Compares a metric; None and -1 stand for undefined."""
    if expected is None or expected == -1:
        assert math.isnan(value)
    else:
        assert value == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_lvis_is_that_of_the_lvis_package(backend):
    for seed in SEEDS:
        _, metrics = evaluated(*lvis_case(seed), "lvis", backend=backend)
        for name, expected in EXPECTED["lvis"][seed].items():
            assert_equal(metrics[name], expected)


def test_boundary_ap_is_that_of_its_authors():
    for seed in SEEDS:
        _, metrics = evaluated(*instances_case(seed, crowds=True), "boundary")
        for name, expected in zip(METRICS, EXPECTED["boundary"][seed], strict=True):
            assert_equal(metrics[f"boundary/{name}"], expected)


def test_cityscapes_ap_is_that_of_cityscapesscripts(tmp_path):
    for seed in SEEDS:
        truth, results = write_cityscapes_case(seed, tmp_path / str(seed))
        _, metrics = evaluated(str(truth), str(results), "auto")
        expected = dict(EXPECTED["cityscapes"][seed])
        assert_equal(metrics["segm/AP"], expected.pop("AP"))
        assert_equal(metrics["segm/AP50"], expected.pop("AP50"))
        for name, value in expected.items():
            assert_equal(metrics[f"segm/AP/{name}"], value)


def test_voc_ap_is_that_of_fcis():
    for seed in SEEDS:
        evaluator, metrics = evaluated(*instances_case(seed, distinct=True), "voc")
        for name, pair in zip(evaluator.class_names, EXPECTED["voc"][seed], strict=True):
            for key, expected in zip(("AP50", "AP70"), pair, strict=True):
                assert_equal(metrics[f"segm/{key}/{name}"], expected)


def test_the_cases_are_not_trivial():
    for kind, name in (("lvis", "segm/APr"), ("cityscapes", "AP50")):
        values = {case[name] for case in EXPECTED[kind]}
        assert len(values) > 10
    assert len({case[0] for case in EXPECTED["boundary"]}) > 10
    assert len({pair[1] for case in EXPECTED["voc"] for pair in case}) > 10
    counts = [len(lvis_case(seed)[1]) for seed in SEEDS]
    assert max(counts) > 300


# --- Boundaries, by hand -----------------------------------------------------------------


def test_a_square_has_a_ring_and_so_has_the_edge_of_the_image():
    square = np.zeros((12, 12), bool)
    square[2:10, 2:10] = True
    ring = square.copy()
    ring[4:8, 4:8] = False
    np.testing.assert_array_equal(boundary(square, 2), ring)
    whole = np.ones((5, 4), bool)
    inside = np.zeros((5, 4), bool)
    inside[1:4, 1:3] = True
    np.testing.assert_array_equal(boundary(whole, 1), ~inside)
    assert boundary_width((480, 640)) == 16 and boundary_width((10, 10)) == 1


def test_boundary_iou_of_two_squares_by_hand():
    # 100 x 100: d = round(2.83) = 3. A square of 20 and the same without a row.
    content = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [],
    }
    masks = np.zeros((2, 100, 100), bool)
    masks[0, 40:60, 40:60] = masks[1, 40:59, 40:60] = True
    rle = [encode(mask) for mask in masks]
    content["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": rle[0], "area": 400}
    ]
    # Rings: 20 * 20 - 14 * 14 = 204 and 19 * 20 - 13 * 14 = 198 pixels. In common are three rows
    # at the top, two of 20 at the bottom, and between them (14 rows) six columns.
    ring = [boundary_rle(r) for r in rle]
    assert coco_mask.area(ring).tolist() == [204, 198]
    common = 3 * 20 + 2 * 20 + 14 * 6
    assert coco_mask.area(coco_mask.merge(ring, intersect=True)) == common
    iou = common / (204 + 198 - common)
    result = {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": rle[1]}
    result["bbox"] = [40, 40, 20, 19]
    _, metrics = evaluated(content, [result], "boundary")
    thresholds = np.linspace(0.5, 0.95, 10)
    assert metrics["boundary/AP"] == pytest.approx((iou >= thresholds).mean())
    assert metrics["segm/AP"] == pytest.approx((380 / 400 >= thresholds).mean())


def test_own_size_ranges_part_the_objects():
    for sides in ((16, 40), (32, 96), (9,)):
        for seed in range(12):
            case = instances_case(seed, crowds=True)
            fast, plain = (
                evaluated(*case, "coco", size_ranges=sides, backend=backend)[1]
                for backend in ("fast", "pycocotools")
            )
            np.testing.assert_equal(fast, plain)
    content, results = instances_case(3)
    _, metrics = evaluated(content, results, "coco", size_ranges=(16, 40))
    assert {"segm/AP_0-16", "segm/AR_16-40", "bbox/AP_40-inf"} <= set(metrics)
    # COCO's own edges give COCO's own numbers.
    _, same = evaluated(content, results, "coco", size_ranges=(32, 96))
    pairs = {"AP_0-32": "APs", "AP_32-96": "APm", "AR_0-32": "ARs"}
    for own, name in pairs.items():
        np.testing.assert_equal(same[f"segm/{own}"], same[f"segm/{name}"])


def test_lvis_beyond_300_adds_metrics():
    content, results = lvis_case(10)
    _, plain = evaluated(content, results, "lvis")
    _, more = evaluated(content, results, "lvis", max_detections=400, size_ranges=(20,))
    assert {"segm/AP@400", "segm/AR@400", "segm/AP_0-20"} <= set(more) - set(plain)
    for name, value in plain.items():
        np.testing.assert_equal(more[name], value)


# --- Which metric, and one's own ---------------------------------------------------------


def test_a_metric_that_disagrees_with_its_files_is_told(caplog, tmp_path):
    content, results = lvis_case(1)
    assert "segm/APr" in evaluated(content, results, "auto")[1]
    assert not caplog.records
    evaluated(content, results, "coco")
    assert "LVIS json" in caplog.text and "data.val.metric = 'lvis'" in caplog.text
    plain, results = instances_case(1)
    with pytest.raises(InputError, match="is no LVIS json"):
        evaluated(plain, results, "lvis")
    with pytest.raises(InputError, match="needs the folder gtFine"):
        evaluated(plain, results, "cityscapes")
    caplog.clear()
    evaluated(*map(str, write_cityscapes_case(1, tmp_path)), "coco")
    assert "void" in caplog.text


class MeanScore:
    """Of every detection; in `reset`, `process`, `evaluate`."""

    def __init__(self, truth, category_ids, class_names):
        self.truth, self.names = truth, class_names

    def reset(self):
        self.scores = []

    def process(self, prediction: Prediction):
        assert prediction.image_id in self.truth.images
        assert prediction.masks.any((1, 2)).all()
        self.scores += prediction.scores.tolist()

    def evaluate(self):
        return {"mean_score": sum(self.scores) / len(self.scores)}


class Fails(MeanScore):
    def evaluate(self):
        raise KeyError("mine")


class Doubled(CocoEvaluator):
    def compute(self):
        return {name: 2 * value for name, value in super().compute().items()}


def test_a_metric_of_ones_own_by_its_import_path():
    content, results = instances_case(2)
    evaluator, metrics = evaluated(content, results, f"{__name__}:MeanScore")
    scores = [r["score"] for r in results]
    assert metrics["mean_score"] == pytest.approx(np.mean(scores))
    assert isinstance(evaluator, OwnEvaluator) and not evaluator.names_known
    _, plain = evaluated(content, results, "coco")
    np.testing.assert_equal({k: metrics[k] for k in plain}, plain)
    _, doubled = evaluated(content, results, f"{__name__}:Doubled")
    assert doubled["segm/AP"] == 2 * plain["segm/AP"]
    with pytest.raises(InputError, match="Fails'.* failed .*mine"):
        evaluated(content, results, f"{__name__}:Fails")
    with pytest.raises(InputError, match="cannot be made of"):
        evaluated(content, results, "builtins:float")
    with pytest.raises(InputError, match="cannot be imported"):
        evaluated(content, results, "nothing.there:Cls")
    with pytest.raises(InputError, match="is no metric"):
        evaluated(content, results, "pascal")
