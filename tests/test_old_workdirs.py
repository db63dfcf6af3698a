"""A run's folder from before a config key existed evaluates, predicts and resumes."""

import json
import logging

import pytest
import toy
from tiny_network import tiny_config, write_workdir

from configs import base
from solov2_jax import config as configs
from solov2_jax.checkpoint import list_steps, read_run
from solov2_jax.inference.predictor import Predictor, load_workdir_config
from solov2_jax.training.loop import train

NEWER = ("optim.ema_decay", "optim.schedule", "train.accumulate", "eval.backend")


def make_old(workdir):
    """Removes newer keys from a workdir's config.json."""
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    for key in NEWER:
        group, name = key.split(".")
        del values[group][name]
    path.write_text(json.dumps(values))


def test_it_resumes_and_says_what_was_filled_in(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    make_old(tmp_path)
    caplog.clear()
    train(toy.toy_config(train__steps=3), tmp_path, toy.toy_task)
    lines = [x for x in caplog.messages if "is older than these keys" in x]
    assert len(lines) == 1 and str(tmp_path / "config.json") in lines[0]
    assert "train.accumulate = 1" in lines[0] and "optim.ema_decay = 0.0" in lines[0]
    assert lines[0].count(" = ") == len(NEWER), "and no key that is there"
    assert list_steps(tmp_path)[-1] == 3
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["train"]["accumulate"] == 1
    with pytest.raises(ValueError, match="optim.ema_decay was 0.0, is 0.5"):
        other = toy.toy_config(train__steps=3, optim__ema_decay=0.5)
        make_old(tmp_path)
        train(other, tmp_path, toy.toy_task)


def test_it_predicts_evaluates_and_gives_its_weights(tmp_path):
    config = tiny_config()
    write_workdir(tmp_path, config)
    make_old(tmp_path)
    assert load_workdir_config(tmp_path).to_dict() == config.to_dict()
    assert Predictor.from_workdir(tmp_path).class_names == ("cat", "dog")
    assert read_run(tmp_path).settings["model.num_classes"] == 2


def test_unknown_and_impossible_values_are_errors(tmp_path):
    file = tmp_path / "config.json"
    values = base.get_config().to_dict()
    values["optim"]["lerning_rate"] = 0.1
    file.write_text(json.dumps(values))
    message = "unknown keys: optim.lerning_rate; did you mean optim.learning_rate"
    with pytest.raises(ValueError, match=message):
        configs.read_config(file)
    file.write_text(json.dumps({"optim": {"milestones": "abc"}}))
    with pytest.raises(ValueError, match="optim.milestones = 'abc'"):
        configs.read_config(file)
