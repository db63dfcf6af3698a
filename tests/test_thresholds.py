"""Scores for `--score best`, and the report that a training leaves."""

import importlib
import json
import logging
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import tiny_coco
import tiny_network
import toy

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import FinishedEvaluation
from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.io import InputError
from solov2_jax.tools.cli import predict as predict_command
from solov2_jax.tools.cli import shared
from solov2_jax.tools.predict.outputs import DetectionFilter
from solov2_jax.tools.report.evaluate_run import is_own_validation
from solov2_jax.tools.report.thresholds import (
    NOTHING_RIGHT,
    best_scores,
    carry_thresholds,
    read_thresholds,
    write_thresholds,
)
from solov2_jax.training.loop import train

NAMES, IDS = ("a", "b", "never"), (3, 8, 5)
RNG = np.random.default_rng(3)


def square(place):
    mask = np.zeros((40, 60), bool)
    mask[4:12, 6 * place : 6 * place + 5] = True
    return mask


def evaluator_of(detections):
    """Returns an evaluator of 4 images with 6 objects each, a and b in turn.

    Args:
      detections: (image, place, label, score); a place of 6 and more hits no object.
    """
    annotations = [
        {
            "id": 10 * image + place,
            "image_id": image,
            "category_id": IDS[place % 2],
            "bbox": [6 * place, 4, 5, 8],
            "area": 40,
            "iscrowd": 0,
            "segmentation": tiny_coco.encode_mask(square(place)),
        }
        for image in range(4)
        for place in range(6)
    ]
    truth = {
        "images": [{"id": i, "height": 40, "width": 60, "file_name": f"{i}"} for i in range(4)],
        "categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)],
        "annotations": annotations,
    }
    evaluator = CocoEvaluator(truth, IDS, NAMES)
    for image in range(4):
        chosen = sorted((d for d in detections if d[0] == image), key=lambda d: -d[3])
        packed = MaskCrops([pack(square(d[1])) for d in chosen], (40, 60))  # pyright: ignore
        evaluator.process(
            Prediction(
                masks=packed,
                boxes=packed.boxes(),
                scores=np.array([d[3] for d in chosen], np.float32),
                labels=np.array([d[2] for d in chosen], int),
                image_id=image,
            )
        )
    return evaluator


def random_detections(number):
    """Returns detections of distinct places in each image, right ones with higher scores."""
    rows = []
    for image in range(4):
        for place in RNG.permutation(9)[:number].tolist():
            right = place < 6
            score = RNG.uniform(0.3, 1.0) if right else RNG.uniform(0.05, 0.7)
            rows.append((image, place, place % 2, round(float(score), 3)))
    return rows


def f1_by_hand(detections, label, score):
    kept = [d for d in detections if d[2] == label and d[3] >= score]
    right = sum(d[1] < 6 for d in kept)
    return 2 * right / (len(kept) + 12)


def test_no_other_score_has_a_larger_f1():
    detections = random_detections(8)
    found = best_scores(evaluator_of(detections))
    assert found["images"] == 4 and list(found["classes"]) == ["a", "never", "b"]  # by id
    for label, name in enumerate(NAMES[:2]):
        values = found["classes"][name]
        reached = f1_by_hand(detections, label, values["score"])
        best = max(f1_by_hand(detections, label, d[3]) for d in detections)
        assert reached == pytest.approx(best) and values["f1"] == pytest.approx(best, abs=1e-4)
        assert values["objects"] == 12
    assert found["classes"]["never"] == {
        **{"score": found["all"], "f1": 0.0, "objects": 0},
        "fallback": True,
    }


def test_without_a_right_detection_the_documented_score_is_taken():
    for detections in ([], [(0, 8, 0, 0.9)]):
        found = best_scores(evaluator_of(detections))
        assert found["all"] == NOTHING_RIGHT
        assert {c["score"] for c in found["classes"].values()} == {NOTHING_RIGHT}


def finished(folder, detections, step=None):
    return FinishedEvaluation(
        folder=folder / "eval",
        dataset=tiny_coco.load(folder),
        evaluator=evaluator_of(detections),
        metrics={},
        predictions={},
        milliseconds={},
        checkpoint=None if step is None else (folder, step),
    )


def test_a_run_keeps_them_by_step(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    evaluation = finished(tmp_path, random_detections(8), step=20)
    write_thresholds(replace(evaluation, checkpoint=None))
    assert not (tmp_path / "thresholds.json").exists()
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "20" / "_CHECKPOINT_METADATA").write_text("{}")
    write_thresholds(replace(evaluation, checkpoint=(tmp_path, 10)))  # its checkpoint is gone
    write_thresholds(evaluation)
    write_thresholds(replace(evaluation, checkpoint=(tmp_path, 30)))  # is being saved
    content = json.loads((tmp_path / "thresholds.json").read_text())
    assert "10" not in content["steps"] and content["steps"]["30"]["data"] == "instances.json"
    scores = read_thresholds(tmp_path, 30, NAMES, IDS)
    values = content["steps"]["30"]["classes"]
    assert scores.tolist() == [values[name]["score"] for name in NAMES], "in the labels' order"
    with pytest.raises(InputError, match="no thresholds of step 40.*checkpoint 40` finds them"):
        read_thresholds(tmp_path, 40, NAMES, IDS)
    with pytest.raises(InputError, match="cannot be read as thresholds"):
        read_thresholds(tmp_path, 30, (*NAMES[:2], "other"), IDS)
    (tmp_path / "copy").mkdir()
    assert carry_thresholds(tmp_path, 30, tmp_path / "copy")
    assert (read_thresholds(tmp_path / "copy", 30, NAMES, IDS) == scores).all()
    assert not carry_thresholds(tmp_path, 99, tmp_path / "copy")
    for text in ("", "[]", '{"steps": {"30": 5}}', '{"steps": {"30": {"classes": {}}}}'):
        (tmp_path / "thresholds.json").write_text(text)
        with pytest.raises(InputError, match=r"thresholds.json: cannot be read"):
            read_thresholds(tmp_path, 30, NAMES, IDS)
        write_thresholds(replace(evaluation, checkpoint=(tmp_path, 30)))
        assert (read_thresholds(tmp_path, 30, NAMES, IDS) == scores).all(), "written anew"


def test_a_filter_takes_the_score_of_each_class():
    masks = np.ones((3, 4, 4), bool)
    found = Prediction(
        masks, np.ones((3, 4)), np.array([0.9, 0.6, 0.4]), np.array([1, 0, 0]), 0, ("a", "b")
    )
    least = np.array([0.5, 0.95])
    assert found.above(least).scores.tolist() == [0.6]
    assert DetectionFilter(least)(found).scores.tolist() == [0.6]
    assert found.above(0.6).scores.tolist() == [0.9, 0.6]


def test_only_an_evaluation_as_in_training_counts():
    assert is_own_validation(["--config.eval.batch_size=4"])
    for key in (
        "data.val.images=x",
        "test.nms_pre=9",
        "input.min_size_test=64",
        "eval.max_images=3",
    ):
        assert not is_own_validation([f"--config.{key}"]), key


def test_best_needs_a_run_with_thresholds(tmp_path, monkeypatch):
    def main(*words):
        for flag in predict_command.FLAGS:
            monkeypatch.setattr(flag, "value", flag.value)
        from solov2_jax.tools.cli import flags

        overrides = flags.parse(predict_command.FLAGS, ["--input=x", "--output=y", *words])
        shared.check_model()
        return shared.load_predictor(overrides)

    with pytest.raises(InputError, match="--score best needs --workdir"):
        main("--score=best", "--config=quickstart", "--weights=x.npz")
    with pytest.raises(InputError, match="not of :raw"):
        main("--score=best", "--workdir=x", "--checkpoint=last:raw")
    with pytest.raises(InputError, match="--score=worst must be a number"):
        main("--score=worst", "--workdir=x")
    run = tiny_network.write_workdir(tmp_path, tiny_network.tiny_config())
    predictor = main("--score=best", f"--workdir={run}")
    with pytest.raises(InputError, match=f"no thresholds of step {predictor.step}"):
        shared.least_scores(predictor)
    classes = {name: {"score": 0.25 * (i + 1)} for i, name in enumerate(predictor.class_names)}
    content = {"steps": {str(predictor.step): {"classes": classes}}}
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    scores = shared.least_scores(predictor)
    assert np.asarray(scores)[:2].tolist() == [0.25, 0.5]


# --- During training -----------------------------------------------------------------


def test_a_failing_report_costs_a_line_and_not_the_run(tmp_path, monkeypatch, caplog):
    calls = []

    def record(evaluation):
        calls.append(evaluation.checkpoint)

    def fail(evaluation):
        raise ZeroDivisionError("no ink")

    here = importlib.import_module(__name__)
    monkeypatch.setattr(here, "record", record, raising=False)
    monkeypatch.setattr(here, "fail", fail, raising=False)
    evaluations: deque[FinishedEvaluation] = deque(maxlen=1)

    def evaluate(variables):
        evaluations.append(finished(tmp_path, []))
        return toy.toy_evaluate(variables)

    config = toy.toy_config(train__steps=4, train__eval_every=2)
    config.train.after_evaluation = (f"{__name__}:fail", f"{__name__}:record")
    config.train.after_training = (f"{__name__}:record", f"{__name__}:fail")
    run = tmp_path / "run"
    with caplog.at_level("INFO", logger="solov2_jax"):
        metrics = train(
            config,
            run,
            lambda c, w: toy.toy_task(c, w, evaluate=evaluate, finished=evaluations),
        )
    assert metrics["segm/AP"] is not None
    assert calls == [(run, 2), (run, 4), (run, 4)]
    assert caplog.text.count(f"no report by {__name__}:fail: ZeroDivisionError: no ink") == 3
    assert "ZeroDivisionError" in (run / "train.log").read_text().split("Traceback")[1]
    record_file = run / "eval" / "reported.json"
    assert json.loads(record_file.read_text()) == {"step": 4, "after_training": True}
    build = lambda c, w: toy.toy_task(c, w, evaluate=evaluate, finished=evaluations)  # noqa: E731
    for killed, made_up in (
        (None, []),  # reports were made: nothing is done again
        ('{"step": 4, "after_training": false}', [(run, 4), (run, 4)]),  # before the last ones
        ('{"step": 2, "after_training": false}', [(run, 4), (run, 4)]),  # before any
        ("[", [(run, 4), (run, 4)]),
    ):
        calls.clear()
        evaluations.clear()
        if killed is not None:
            record_file.write_text(killed)
        train(config, run, build)
        assert calls == made_up
    config.train.after_training = ("solov2_jax.tools.report:nothing",)
    with pytest.raises(InputError, match="train.after_training: .*cannot be imported"):
        train(config, tmp_path / "other", toy.toy_task)
    assert not (tmp_path / "other" / "config.json").exists()
