import logging

import jax.numpy as jnp
import pytest
import toy
from test_hooks import make_run

from solov2_jax.training.watchdog import LossWatchdog, diagnose

SOUND = {
    "loss__dice_weight": 3.0,
    "train__batch_size": 4,
    "train__log_every": 2,
    "optim__warmup_steps": 100,
    "model__backbone__norm": "gn",
    "init_from": "",
    "input__std": (1.0, 1.0, 1.0),
}


def schedule(step):
    return 0.01


FROZEN = {"model__backbone__norm": "frozen_bn"}
STUCK = {
    "loss_ins": 2.98,
    "mean_iou": 0.004,
    "num_pairs": 20.0,
    "positive_images": 3.5,
    "grad_norm": 2.0,
}


@pytest.mark.parametrize(
    ("means", "changes", "step", "reason"),
    [
        ({"num_pairs": 0.0, "loss_ins": 0.0}, {}, 600, "no object falls on a grid"),
        ({"positive_images": 0.5}, {}, 600, "most images have no object"),
        ({"grad_norm": 5e4}, {}, 600, "the run has diverged"),
        ({"grad_norm": 1e-7}, {}, 600, "the gradient vanishes"),
        ({"mean_iou": 0.0, "loss_ins": 2.9999}, {}, 50, "every mask is empty"),
        ({}, {}, 50, "the warm-up lasts until step 100"),
        (
            {},
            FROZEN,
            600,
            "random weights under a frozen batch norm",
        ),
        ({}, {**FROZEN, "init_from": "r50.npz"}, 600, "look sound"),
        ({}, {}, 600, "look sound"),
    ],
)
def test_the_likeliest_reason_is_named_with_figures(means, changes, step, reason):
    config = toy.toy_config(**{**SOUND, **changes})
    line = diagnose(config, schedule, step, {**STUCK, **means})
    assert reason in line and "\n" not in line
    for figure in ("of at most 3", "mean IoU of pairs 0.00", "of 4 images", "0.01"):
        assert figure in line


def lines_of(losses, patience, caplog, iou=0.004):
    """Returns the steps at which a line came, for a loss per step, logged each 2."""
    caplog.clear()
    run = make_run(total=100)
    hook = LossWatchdog(toy.toy_config(**SOUND, train__watch_steps=patience), schedule)
    hook.before_train(run)
    for loss in losses:
        run.step += 1
        values = {**STUCK, "loss_ins": loss, "mean_iou": iou, "skipped": 0.0}
        metrics = {k: jnp.float32(v) for k, v in values.items()}
        run.window.add(run.step, metrics, [0])
        if run.due(2):
            run.window.fetch()
        hook.after_step(run)
        if run.due(2):
            run.window.clear()
    return [int(m.split(":")[0].removeprefix("step ")) for m in caplog.messages]


def test_a_line_comes_when_nothing_moved_for_long_and_not_at_every_step(caplog):
    caplog.set_level(logging.WARNING, logger="solov2_jax")
    assert lines_of([2.99] * 14, 6, caplog) == [6, 12]
    assert lines_of([2.99] * 14, 0, caplog) == []
    assert lines_of([2.99] * 4 + [2.5] * 4 + [2.99] * 6, 6, caplog) == [14]
    assert lines_of([2.5] * 14, 6, caplog) == []
    assert lines_of([3.0] * 5, 10, caplog, iou=0.0) == [2, 4], "empty masks stay empty"
    assert lines_of([3.0] * 5, 0, caplog, iou=0.0) == []
