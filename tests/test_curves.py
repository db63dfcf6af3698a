"""Curves of metrics.jsonl: what is in it is drawn, what it lacks is left out."""

import json

import numpy as np
import pytest

from solov2_jax.tools import curves


def write(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_each_kind_of_number_has_its_chart(tmp_path):
    steps = [{"step": 20 * i, "loss": 3 / i, "loss_ins": 2 / i} for i in (1, 2, 3)]
    write(tmp_path, steps)
    one = curves.draw_curves(tmp_path)
    write(tmp_path, [*steps, {"step": 60, "segm/AP": 0.3, "learning_rate": 1e-3}])
    three = curves.draw_curves(tmp_path)
    assert three.height == one.height and three.width == 3 * one.width
    assert np.asarray(one.convert("L")).min() < 60, "something is drawn"


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    write(tmp_path, [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}])
    assert curves._points(curves.read_metrics(tmp_path / "metrics.jsonl"), "loss") == ([2], [1.0])
    curves.draw_curves(tmp_path)


def test_a_run_without_numbers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no line yet"):
        curves.draw_curves(tmp_path)
    write(tmp_path, [])
    with pytest.raises(ValueError, match="no line yet"):
        curves.draw_curves(tmp_path)
