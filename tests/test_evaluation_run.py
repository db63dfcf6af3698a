"""From a data set on disk to metrics.json and predictions.json."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_coco

from configs import base
from solov2_jax import distributed
from solov2_jax.data.buckets import Resize
from solov2_jax.data.pipeline import Reading, eval_batches
from solov2_jax.evaluation import evaluators
from solov2_jax.evaluation.coco import CocoEvaluator, json_metrics
from solov2_jax.evaluation.coco_score import read_ground_truth
from solov2_jax.evaluation.evaluate import StopEvaluation, build_evaluator, build_reports
from solov2_jax.evaluation.evaluate import evaluate as evaluate_all
from solov2_jax.inference.prediction import Prediction
from solov2_jax.training import build
from solov2_jax.training.build import build_evaluate, build_validations

# tiny_coco's objects: image id -> [(label, x, y, side)]; labels by sorted ids 5, 20.
TRUTH = {7: [(0, 10, 8, 20), (1, 30, 20, 12)], 3: [(1, 10, 8, 20)], 9: []}


class Oracle:
    """Predicts the annotated squares of each image, and remembers the shapes."""

    def __init__(self):
        self.shapes = []

    def on_devices(self, devices):
        return self

    def predict_batch(self, batch):
        self.shapes.append(batch["image"].shape)
        rows = zip(batch["image_id"], batch["original_size"], strict=True)
        return [squares(int(i), size) for i, size in rows if i != -1]


def squares(image_id, size):
    objects = TRUTH[image_id]
    masks = np.zeros((len(objects), *size), bool)
    for mask, (_, x, y, side) in zip(masks, objects, strict=True):
        mask[y : y + side, x : x + side] = True
    boxes = [(x, y, x + side, y + side) for _, x, y, side in objects]
    return Prediction(
        masks,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.full(len(objects), 0.7, np.float32),
        np.array([label for label, *_ in objects], np.int64),
        image_id,
    )


@pytest.fixture
def dataset(tmp_path):
    return tiny_coco.load(tmp_path)


def batches_of(dataset, **options):
    resize = Resize(**{"shorts": (48,), "max_size": 64, **options.pop("resize", {})})
    reading = Reading(num_workers=0, num_threads=1)
    return eval_batches(dataset, batch_size=2, resize=resize, reading=reading, **options)


def evaluate(predictor, dataset, batches, out, **options):
    names = dataset.category_ids, dataset.class_names
    evaluator = CocoEvaluator(dataset.annotation_file, *names)
    return evaluate_all(predictor, evaluator, dataset, batches, out, **options)


def test_oracle_scores_1_and_both_files_are_written(dataset, tmp_path, caplog):
    out = tmp_path / "deep" / "eval"
    with caplog.at_level("INFO"):
        metrics = evaluate(Oracle(), dataset, batches_of(dataset), out)
    assert metrics["segm/AP"] == metrics["bbox/AP"] == pytest.approx(1)
    assert {"segm/AP/cat", "segm/AP/dog", "bbox/ARl"} <= set(metrics)
    written = json.loads((out / "metrics.json").read_text())
    assert written == {**json_metrics(metrics), "num_images": 3, "num_predictions": 3}
    results = json.loads((out / "predictions.json").read_text())
    by_image = {i: [r for r in results if r["image_id"] == i] for i in TRUTH}
    assert [r["category_id"] for r in by_image[7]] == [5, 20]
    assert [r["class_name"] for r in by_image[7]] == ["cat", "dog"]
    assert by_image[3][0]["bbox"] == [10, 8, 20, 20]
    mask = np.zeros((64, 48), bool)
    mask[8:28, 10:30] = True
    assert by_image[3][0]["segmentation"] == tiny_coco.encode_mask(mask)
    assert written["segm/APl"] is None and "NaN" not in (out / "metrics.json").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "predictions.json"]
    assert "predicted 3 images" in caplog.text and "3 of 3 images" in caplog.text


def test_part_of_the_images(dataset, tmp_path):
    metrics = evaluate(Oracle(), dataset, batches_of(dataset, max_images=1), tmp_path)
    assert metrics["segm/AP"] == pytest.approx(1)
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 1


def test_two_shapes_hold_every_size(dataset, tmp_path):
    oracle = Oracle()
    resize = {"shorts": (64,), "max_size": 96}
    metrics = evaluate(oracle, dataset, batches_of(dataset, resize=resize), tmp_path)
    assert metrics["segm/AP"] == pytest.approx(1)
    # 48 x 64, 64 x 48 and 40 x 40 with the short side 64; the third is in one of them.
    assert {shape[1:3] for shape in oracle.shapes} == {(64, 96), (96, 64)}


def test_no_predictions_at_all(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Oracle, "predict_batch", lambda self, batch: [])
    with pytest.raises(ValueError, match="no image was processed"):
        evaluate(Oracle(), dataset, batches_of(dataset), tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
    assert not (tmp_path / "metrics.json").exists()


def test_one_evaluator_serves_a_whole_run(dataset, tmp_path):
    """What an earlier evaluation collected is forgotten; its truth is not read again."""
    evaluator = build_evaluator(base.get_config(), dataset)
    Path(dataset.annotation_file).unlink()
    for _ in range(2):
        metrics = evaluate_all(Oracle(), evaluator, dataset, batches_of(dataset), tmp_path)
        assert metrics["segm/AP"] == pytest.approx(1) and len(evaluator.results) == 3


def test_reports_are_called_with_the_evaluation(dataset, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.import_module(__name__), "record", calls.append, raising=False)
    config = base.get_config()
    config.eval.reports = (*config.eval.reports, f"{__name__}:record")
    reports = build_reports(config)
    metrics = evaluate(
        Oracle(), dataset, batches_of(dataset), tmp_path, num_pictures=2, reports=reports
    )
    (evaluation,) = calls
    assert evaluation.metrics == metrics and evaluation.folder == tmp_path
    assert len(evaluation.predictions) == 2 and set(evaluation.milliseconds) == {
        *("data", "compute", "encode")
    }
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 2
    config.eval.reports = ("solov2_jax.tools.report:nothing",)
    with pytest.raises(ValueError, match="eval.reports: .*cannot be imported"):
        build_reports(config)


def test_an_evaluation_ends_when_told_although_the_exception_was_lost(dataset, tmp_path):
    class Told(Oracle):
        def predict_batch(self, batch):
            distributed.request_stop()
            return super().predict_batch(batch)

    told = Told()
    try:
        with pytest.raises(StopEvaluation):
            evaluate(told, dataset, batches_of(dataset), tmp_path / "out")
    finally:
        distributed.request_stop(False)
    assert len(told.shapes) == 1 and len(batches_of(dataset)) == 2
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_images_that_reach_the_limit_of_detections_are_told(dataset, tmp_path, caplog):
    with caplog.at_level("INFO"):
        evaluate(Oracle(), dataset, batches_of(dataset), tmp_path, max_per_image=3)
    assert "as many as are kept" not in caplog.text
    with caplog.at_level("INFO"):
        evaluate(Oracle(), dataset, batches_of(dataset), tmp_path, max_per_image=2)
    # Image 7 has two objects, the others have one and none.
    assert caplog.text.count("1 of 3 images have 2 detections, as many as are kept") == 1
    assert "raise --config.test.max_per_image" in caplog.text


def test_training_reads_the_ground_truth_once(dataset, tmp_path, monkeypatch):
    """At its start, however often it evaluates: a fault there is told before training."""
    reads = []

    def read(*args):
        reads.append(args)
        return read_ground_truth(*args)

    monkeypatch.setattr(evaluators, "read_ground_truth", read)
    monkeypatch.setattr(build, "build_predictor", lambda *args: Oracle())
    config = base.get_config()
    config.input.min_size_test = config.input.max_size_test = 64
    config.data.num_workers, config.eval.batch_size = 0, 2
    evaluate_variables = build_evaluate(config, None, build_validations(config, dataset), tmp_path)
    assert len(reads) == 1
    for _ in range(2):
        assert evaluate_variables({})["segm/AP"] == pytest.approx(1)
    assert len(reads) == 1 and len(list((tmp_path / "eval" / "pictures").iterdir())) == 3
