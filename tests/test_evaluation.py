"""AP against hand-made cases and against pycocotools' own way from file to metric."""

import copy
import json
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2_jax.evaluation import coco_score
from solov2_jax.evaluation.coco import CocoEvaluator, is_defined, json_metrics
from solov2_jax.evaluation.coco_score import METRICS
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.report.diagnosis import diagnose

HEIGHT, WIDTH = 120, 160
# Category ids that are neither dense nor sorted like the names.
IDS, NAMES = (7, 3), ("square", "bar")


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def prediction(image_id, boxes, labels, scores=None):
    """Rectangles (x0, y0, x1, y1) as the predictions of one image."""
    masks = [rectangle(*box) for box in boxes]
    return Prediction(
        masks=np.array(masks, bool).reshape(-1, HEIGHT, WIDTH),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores or [0.9] * len(boxes), np.float32),
        labels=np.array(labels, np.int64),
        image_id=image_id,
    )


def annotation(number, image_id, category_id, box, **more):
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
        **more,
    }


SMALL, MEDIUM, OTHER = (5, 5, 25, 25), (40, 20, 100, 80), (110, 10, 150, 60)


@pytest.fixture
def truth():
    """Two images; the first annotation's id is 0, which pycocotools cannot match."""
    return {
        "images": [
            {"id": 10, "height": HEIGHT, "width": WIDTH, "file_name": "a.png"},
            {"id": 4, "height": HEIGHT, "width": WIDTH, "file_name": "b.png"},
        ],
        "categories": [{"id": 3, "name": "bar"}, {"id": 7, "name": "square"}],
        "annotations": [
            annotation(0, 10, 7, SMALL),
            annotation(1, 10, 7, MEDIUM),
            annotation(2, 4, 3, OTHER),
        ],
    }


def perfect():
    return [prediction(10, [SMALL, MEDIUM], [0, 0]), prediction(4, [OTHER], [1])]


def collect(truth, predictions, **options):
    evaluator = CocoEvaluator(truth, IDS, NAMES, **options)
    for p in predictions:
        evaluator.process(p)
    return evaluator


def run(truth, predictions, backend="fast"):
    return collect(truth, predictions, backend=backend).evaluate()


def reasons(truth, predictions):
    """Returns the metrics and the lines that say why they are 0."""
    evaluator = collect(truth, predictions)
    metrics = evaluator.evaluate()
    return metrics, "\n".join(diagnose(evaluator, metrics))


def test_perfect_predictions_are_1_where_something_is_annotated(truth):
    metrics = run(truth, perfect())
    for kind in ("segm", "bbox"):
        for name in METRICS:
            if name in ("APl", "ARl"):
                assert np.isnan(metrics[f"{kind}/{name}"])
                continue
            # AR1: one detection of the two on image 10, one of one on image 4.
            expected = 0.75 if name == "AR1" else 1
            assert metrics[f"{kind}/{name}"] == pytest.approx(expected), (kind, name)
    assert metrics["segm/AP/square"] == pytest.approx(1)
    assert metrics["segm/AP/bar"] == pytest.approx(1)


def test_shifted_prediction_passes_the_iou_thresholds_below_its_overlap(truth):
    x0, y0, x1, y1 = MEDIUM
    moved = (x0 + 6, y0, x1 + 6, y1)
    # 54 of 66 columns overlap: IoU 0.818, so 7 of the 10 thresholds 0.5 ... 0.95 pass.
    first = prediction(10, [SMALL, moved], [0, 0], [0.9, 0.8])
    metrics = run(truth, [first, prediction(4, [OTHER], [1])])
    # Above its overlap only SMALL is found, at recall 0.5: 51 of 101 recall points.
    assert metrics["segm/AP/square"] == pytest.approx((7 + 3 * 51 / 101) / 10)
    assert metrics["segm/AP50"] == pytest.approx(1)
    assert metrics["segm/APm"] == pytest.approx((0.7 + 1) / 2)
    assert metrics["segm/AP"] == pytest.approx((metrics["segm/AP/square"] + 1) / 2)


def test_labels_become_the_files_category_ids(truth):
    swapped = [prediction(10, [SMALL, MEDIUM], [1, 1]), prediction(4, [OTHER], [0])]
    assert run(truth, swapped)["segm/AP"] == 0
    evaluator = CocoEvaluator(truth, IDS, NAMES)
    evaluator.process(perfect()[1])
    (result,) = json.loads(json.dumps(evaluator.results))
    assert (result["image_id"], result["category_id"]) == (4, 3)
    assert result["bbox"] == [110, 10, 40, 50]
    assert result["segmentation"]["size"] == [HEIGHT, WIDTH]


def test_no_predictions_give_zero_and_say_why(truth, caplog):
    with caplog.at_level("INFO"):
        metrics = run(truth, [prediction(10, [], []), prediction(4, [], [])])
    assert metrics["segm/AP"] == metrics["bbox/AR100"] == 0
    assert np.isnan(metrics["segm/APl"])
    assert "not one prediction" in caplog.text
    assert "no annotated object is larger than 96 x 96" in caplog.text


def test_zero_says_whether_classes_or_masks_are_wrong(truth):
    swapped = [prediction(10, [SMALL, MEDIUM], [1, 1]), prediction(4, [OTHER], [0])]
    metrics, text = reasons(truth, swapped)
    assert metrics["segm/AP"] == 0
    assert "3 of 3 predictions have a mask IoU of 0.5 or more" in text
    assert "the classes are not" in text
    x0, y0, x1, y1 = SMALL
    half = prediction(10, [(x0 + 10, y0, x1 + 10, y1)], [0])  # IoU 1/3
    metrics, text = reasons(truth, [half, prediction(4, [], [])])
    assert metrics["segm/AP"] == 0
    assert "not one of 1 predictions" in text
    assert "the best has 0.33; weights that are not trained" in text
    assert reasons(truth, perfect())[1] == ""


def test_zero_of_one_size_says_how_near_it_came(truth):
    x0, y0, x1, y1 = SMALL
    half = (x0 + 10, y0, x1 + 10, y1)
    detected = [prediction(10, [half, MEDIUM], [0, 0]), prediction(4, [OTHER], [1])]
    metrics, text = reasons(truth, detected)
    assert metrics["segm/APs"] == 0 < metrics["segm/APm"]
    assert (
        "APs is 0: 1 annotated objects are smaller than 32 x 32 pixels and 1 "
        "predictions are; the largest mask IoU of such an object with a prediction is "
        "0.33" in text
    )


def test_without_objects_every_metric_is_undefined_and_says_so(truth, caplog):
    truth["annotations"] = [annotation(0, 10, 7, SMALL, iscrowd=1)]
    for backend in ("fast", "pycocotools"):
        caplog.clear()
        with caplog.at_level("INFO"):
            metrics = run(truth, perfect(), backend)
        assert len(metrics) == 26 and not any(is_defined(v) for v in metrics.values())
        assert "AP is undefined: the 2 evaluated images have no annotated object" in caplog.text
        assert "only 1 crowd regions" in caplog.text and "AP is 0" not in caplog.text
        assert json.loads(json.dumps(json_metrics(metrics))) == dict.fromkeys(metrics)
    assert reasons(truth, perfect())[1] == ""


def test_what_is_defined():
    assert is_defined(0.0) and is_defined(0.5) and is_defined(-0.5)
    # -1 marks in older files what is null in newer ones.
    assert not any(is_defined(value) for value in (None, float("nan"), -1, -1.0))


def many_objects(count):
    """Returns one image with `count` objects of a class, and perfect predictions."""
    boxes = [(x, y, x + 4, y + 4) for x in range(0, 160, 8) for y in range(0, 120, 8)][:count]
    content = {
        "images": [{"id": 10, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "bar"}],
        "annotations": [annotation(n, 10, 7, box) for n, box in enumerate(boxes)],
    }
    scores = np.linspace(1, 0.5, count).tolist()
    return content, [prediction(10, boxes, [0] * count, scores)]


def test_more_objects_than_ap_counts_are_told(caplog):
    content, predictions = many_objects(150)
    with caplog.at_level("INFO"):
        metrics = run(content, predictions)
    # Of 150 objects 100 can be found: 67 of the 101 recalls are reached.
    assert metrics["segm/AP"] == pytest.approx(67 / 101)
    assert "counts at most 100 detections per image and class, but 1 images have more" in (
        caplog.text
    )
    assert "up to 150" in caplog.text and "eval.max_detections=150" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        run(*many_objects(100))
    assert "counts at most" not in caplog.text


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_more_detections_count_beside_cocos(caplog, backend):
    content, predictions = many_objects(150)
    plain = run(content, predictions, backend)
    evaluator = collect(content, predictions, backend=backend, max_detections=150)
    with caplog.at_level("INFO"):
        metrics = evaluator.evaluate()
    assert metrics["segm/AP@150"] == metrics["bbox/AR@150"] == pytest.approx(1)
    assert np.isnan(metrics["segm/APl@150"])
    np.testing.assert_equal({k: metrics[k] for k in plain}, plain)
    assert list(metrics) == evaluator.metric_names()
    assert "counts at most" not in caplog.text and "AP50@150" in caplog.text


def test_without_hotcoco_pycocotools_computes_the_same(truth, monkeypatch, caplog):
    expected = run(truth, perfect())
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    coco_score.load_hotcoco.cache_clear()
    with caplog.at_level("INFO"):
        np.testing.assert_equal(run(truth, perfect()), expected)
        run(truth, perfect())
    assert caplog.text.count("needs the package hotcoco, which cannot be imported") == 1
    coco_score.load_hotcoco.cache_clear()


def test_results_of_other_categories_are_named(truth, caplog):
    evaluator = CocoEvaluator(truth, IDS, NAMES)
    evaluator.process(perfect()[0])
    results = [{**r, "category_id": 99} for r in evaluator.results]
    other = CocoEvaluator(truth, IDS, NAMES)
    other.add_results(results)
    with caplog.at_level("INFO"):
        assert other.evaluate()["segm/AP"] == 0
    assert "none of the 2 predictions is of these images and categories" in caplog.text


def test_unknown_backend_is_named(truth):
    with pytest.raises(ValueError, match=r"eval.backend is 'faster'"):
        CocoEvaluator(truth, IDS, NAMES, backend="faster")


def test_mask_size_ranges_use_the_masks_area(truth):
    # A thin cross of 236 pixels in a 60 x 60 box: small as a mask, medium as a box.
    cross = np.zeros((HEIGHT, WIDTH), bool)
    cross[50:52, 40:100] = cross[20:80, 70:72] = True
    first = prediction(10, [MEDIUM, SMALL], [0, 0], [0.9, 0.8])
    first.masks[0] = cross
    # It matches nothing, so it costs precision, but only among small objects.
    truth["annotations"] = [annotation(1, 10, 7, SMALL), annotation(2, 4, 3, OTHER)]
    metrics = run(truth, [first, prediction(4, [OTHER], [1])])
    assert metrics["segm/APs"] == pytest.approx(0.5)
    assert metrics["bbox/APs"] == pytest.approx(1)


def test_equals_pycocotools_on_noisy_predictions(truth):
    """The same metrics as writing the results and loading them by the COCO API."""
    rng = np.random.default_rng(0)
    truth["annotations"] = []
    predictions = []
    for image_id in (10, 4):
        boxes, labels = [], []
        for _ in range(12):
            x0, y0 = rng.integers(0, (WIDTH - 60, HEIGHT - 60))
            w, h = rng.integers(8, 60, 2)
            boxes.append((int(x0), int(y0), int(x0 + w), int(y0 + h)))
            labels.append(int(rng.integers(2)))
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            crowd = {"iscrowd": int(i == 0)}
            number = len(truth["annotations"]) + 1
            truth["annotations"].append(annotation(number, image_id, IDS[label], box, **crowd))
        moved = [
            (x0 + int(d), y0, x1, y1)
            for (x0, y0, x1, y1), d in zip(boxes, rng.integers(0, 6, 12), strict=True)
        ]
        scores = np.sort(rng.random(12))[::-1].tolist()
        predictions.append(prediction(image_id, moved, labels, scores))
    metrics = run(truth, predictions)
    np.testing.assert_equal(run(truth, predictions, "pycocotools"), metrics)

    evaluator = CocoEvaluator(truth, IDS, NAMES)
    for p in predictions:
        evaluator.process(p)
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    for kind in ("segm", "bbox"):
        results = copy.deepcopy(evaluator.results)
        for r in results:
            del r["bbox" if kind == "segm" else "segmentation"]
        plain = COCOeval(coco, coco.loadRes(results), kind)
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
        values = [metrics[f"{kind}/{name}"] for name in METRICS]
        np.testing.assert_array_equal(np.nan_to_num(values, nan=-1), plain.stats)
        assert 0.1 < values[0] < 0.9


def test_only_processed_images_count(truth):
    assert np.isnan(run(truth, perfect()[:1])["segm/AP/bar"])
    assert run(truth, perfect()[:1])["segm/AP"] == pytest.approx(1)


def test_objects_without_a_mask_or_with_missing_keys(truth, caplog):
    bare = annotation(5, 4, 3, (10, 70, 40, 100))
    del bare["area"], bare["bbox"], bare["iscrowd"]
    unusable = annotation(6, 4, 3, OTHER, segmentation=[[1, 2, 3, 4]])
    truth["annotations"] += [bare, unusable]
    predictions = perfect()
    predictions[1] = prediction(4, [OTHER, (10, 70, 40, 100)], [1, 1])
    with caplog.at_level("INFO"):
        assert run(truth, predictions)["segm/AP"] == pytest.approx(1)
    assert "1 annotations have no usable mask" in caplog.text


def test_two_classes_of_one_name_keep_their_metrics(truth):
    metrics = CocoEvaluator(truth, IDS, ("thing", "thing"))
    for p in perfect():
        metrics.process(p)
    assert {"segm/AP/thing (7)", "segm/AP/thing (3)"} <= set(metrics.evaluate())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: prediction(99, [], []), "no image has id 99"),
        (lambda: prediction(10, [SMALL], [2]), "label 2 of 2 classes"),
    ],
)
def test_wrong_predictions_are_named(truth, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(truth, [wrong()])


def test_wrong_sizes_ids_and_repeats_are_named(truth):
    with pytest.raises(ValueError, match="predicted twice"):
        run(truth, perfect() + perfect())
    truth["images"][0]["height"] = WIDTH
    with pytest.raises(ValueError, match=r"masks are \(120, 160\)"):
        run(truth, perfect())
    with pytest.raises(ValueError, match="no category has id"):
        CocoEvaluator(truth, (7, 99), NAMES)
    with pytest.raises(ValueError, match="no image was processed"):
        run(truth, [])
    truth["annotations"][0]["image_id"] = 12345
    with pytest.raises(ValueError, match="unknown image: image_id 12345 .annotation 0"):
        CocoEvaluator(truth, IDS, NAMES)
