import json
import math
import time

import jax
import jax.numpy as jnp
import pytest
import toy

from solov2_jax import distributed
from solov2_jax.checkpoint import CheckpointManager, less_is_better
from solov2_jax.training.checkpoint_hooks import (
    BestCheckpoint,
    EarlyStop,
    Evaluation,
    PeriodicCheckpoint,
)
from solov2_jax.training.hooks import IterationTimer, LearningRate, PeriodicWriter, Run
from solov2_jax.training.metrics import MetricsWindow
from solov2_jax.training.step import TrainState, TrainStep
from solov2_jax.training.writers import (
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
    WriterBase,
    duration,
)


class FakeCheckpoints(CheckpointManager):
    """Remembers what it was asked to save."""

    def __init__(self, best=None):
        self.saved, self.best = [], best

    def steps(self):
        return self.saved

    def save(self, step, parts, position, *, delete_older=True):
        self.saved.append(step)

    def record_best(self, step, metric, value):
        self.best = {"step": step, "metric": metric, "value": value}

    def check(self):
        pass

    def wait(self):
        pass


class FakeWriter(WriterBase):
    def __init__(self):
        self.lines = []

    def write(self, step, scalars):
        self.lines.append((step, dict(scalars)))


def make_run(step=0, total=10, window=()):
    task, mesh = toy.toy_task(toy.toy_config(), None), distributed.make_mesh(1)
    key = jax.random.key(0)
    step_fn = TrainStep(loss=task.loss, tx=task.tx, mesh=mesh, key=key, trainable=task.trainable)
    state = TrainState(step, {}, {}, ())
    window = MetricsWindow(2, {"window": window})
    config = toy.toy_config()
    return Run(state, step, total, batch_size=4, step_fn=step_fn, window=window, config=config)


def advance(run, hooks, loss=1.0):
    for hook in hooks:
        hook.before_step(run)
    run.step += 1
    run.data_seconds = 0.01
    metrics = {"loss": loss, "grad_norm": 1.0, "skipped": not math.isfinite(loss)}
    metrics = {name: jnp.float32(value) for name, value in metrics.items()}
    run.window.add(run.step, metrics, [run.step, 99])
    for hook in hooks:
        hook.after_step(run)


def saver_of(every, best=None):
    return PeriodicCheckpoint(FakeCheckpoints(best), every, {})


def test_the_writer_gets_means_of_the_window_and_the_other_hooks_values():
    writer, run = FakeWriter(), make_run()
    schedule = lambda step: 0.5 * (step + 1)  # noqa: E731
    hooks = [IterationTimer(2), LearningRate(schedule, 2), PeriodicWriter([writer], 2)]
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        advance(run, hooks, loss)
    assert [step for step, _ in writer.lines] == [2, 4]
    (_, first), (_, second) = writer.lines
    assert (first["loss"], second["loss"]) == (1.5, 3.5)
    assert (first["learning_rate"], second["learning_rate"]) == (1.0, 2.0)
    assert first["images_per_second"] > 0 and first["data_seconds"] == 0.01
    assert first["compiles"] == 0 and first["recompiles"] == 0


def test_a_period_of_0_means_never():
    writer, run, saver = FakeWriter(), make_run(total=100), saver_of(0)
    hooks = [IterationTimer(0), PeriodicWriter([writer], 0), saver]
    for _ in range(20):
        advance(run, hooks)
    assert writer.lines == [] and saver.checkpoints.saved == []


def test_the_timer_does_not_count_what_later_hooks_do():
    class Slow(FakeWriter):
        def write(self, step, scalars):
            time.sleep(0.2)
            super().write(step, scalars)

    writer, run = Slow(), make_run()
    hooks = [IterationTimer(1), PeriodicWriter([writer], 1)]
    for _ in range(2):
        advance(run, hooks)
    assert all(line["step_seconds"] < 0.1 for _, line in writer.lines)


def test_the_mean_iou_is_one_over_all_pairs():
    window = MetricsWindow(1)
    for pairs, iou in ((1.0, 0.9), (3.0, 0.1), (0.0, 0.0)):
        values = {"loss": 1.0, "num_pairs": pairs, "mean_iou": iou, "skipped": 0.0}
        window.add(1, {k: jnp.float32(v) for k, v in values.items()}, [1])
    window.fetch()
    assert window.means()["mean_iou"] == pytest.approx((0.9 + 3 * 0.1) / 4)


def test_a_resumed_window_gives_the_same_mean():
    values = [{"loss": 1.0, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": 1.0}]
    writer, run = FakeWriter(), make_run(step=2, window=values)
    advance(run, [PeriodicWriter([writer], 3)], 6.0)
    assert writer.lines[0][1]["loss"] == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skipped_steps_are_counted_and_too_many_in_a_row_stop(bad, caplog):
    writer, run, saver = FakeWriter(), make_run(total=20), saver_of(2)
    rate = LearningRate(lambda step: step, 1)
    hooks = [IterationTimer(1), rate, PeriodicWriter([writer], 1), saver]
    for loss in (1.0, bad, 3.0, bad):
        advance(run, hooks, loss)
    lines = [line for _, line in writer.lines]
    assert [line.get("loss") for line in lines] == [1.0, None, 3.0, None]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2]
    # The optimiser does not count a skipped step.
    assert [line["learning_rate"] for line in lines] == [0, 0, 1, 1]
    assert f"step 2 is skipped: loss {bad}" in caplog.text and "ids 2, 99" in caplog.text
    assert saver.checkpoints.saved == [3], "made up for after the next good step"
    with pytest.raises(FloatingPointError, match=r"steps 4 to 5: .*ids: 4, 99, 5\."):
        advance(run, hooks, bad)


def test_a_streak_goes_on_after_resuming():
    run = make_run()
    advance(run, [], 1.0)
    advance(run, [], float("nan"))
    run.window.fetch()
    again = MetricsWindow(2, json.loads(json.dumps(run.window.saved())))
    nan = {"loss": jnp.float32("nan"), "grad_norm": jnp.float32(1)}
    again.add(3, {**nan, "skipped": jnp.float32(1)}, [7])
    with pytest.raises(FloatingPointError, match="steps 2 to 3: .* ids: 2, 99, 7"):
        again.fetch()
    assert again.skipped == 2


def test_parameters_that_are_not_finite_are_never_saved():
    run, saver = make_run(), saver_of(2)
    run.state = run.state.replace(params={"fpn": jnp.array([1.0, float("inf")])})
    advance(run, [saver])
    with pytest.raises(FloatingPointError, match="step 2: variables/params/fpn is not finite"):
        advance(run, [saver])  # the loss was finite: it is the update that was not
    assert saver.checkpoints.saved == []


def test_checkpoints_are_saved_periodically_at_the_end_and_once():
    run, saver = make_run(total=5), saver_of(2)
    for _ in range(5):
        advance(run, [saver])
    saver.after_train(run)
    assert saver.checkpoints.saved == [2, 4, 5]


def test_an_early_stop_is_saved():
    run, saver = make_run(total=100), saver_of(50)
    advance(run, [saver])
    saver.after_train(run)
    assert saver.checkpoints.saved == [1]


def evaluation(scores, writer, every=2, written=None):
    calls = iter(scores)
    evaluate = lambda variables: {"segm/AP": next(calls)}  # noqa: E731
    return Evaluation(evaluate, every, [writer], written or {})


def test_evaluates_periodically_and_at_the_end_and_keeps_the_best():
    writer, run, saver = FakeWriter(), make_run(total=7), saver_of(0)
    hooks = [saver, evaluation([0.1, 0.5, 0.3, 0.4], writer)]
    hooks.append(BestCheckpoint(saver, "segm/AP"))
    for _ in range(7):
        advance(run, hooks)
    assert [step for step, _ in writer.lines] == [2, 4, 6, 7]
    best = {"step": 4, "metric": "segm/AP", "value": 0.5}
    assert saver.checkpoints.best == best
    assert saver.checkpoints.saved == [2, 4, 7], "the best ones and the last"
    assert run.results == {"segm/AP": 0.4}


@pytest.mark.parametrize("value", [float("nan"), 0.2])
def test_the_best_of_an_earlier_start_is_not_forgotten(value):
    best = {"step": 1, "metric": "segm/AP", "value": 0.2}
    run, saver = make_run(step=1), saver_of(0, dict(best))
    hooks = [evaluation([value], FakeWriter()), BestCheckpoint(saver, "segm/AP")]
    advance(run, hooks)
    assert saver.checkpoints.best == best


def test_of_a_loss_less_is_better():
    run, saver, scores = make_run(total=9), saver_of(0), iter([3.0, 1.0, 2.0, 1.5])
    evaluate = lambda variables: {"val/loss": next(scores)}  # noqa: E731
    hooks = [saver, Evaluation(evaluate, 2, [], {})]
    hooks.append(BestCheckpoint(saver, "val/loss"))
    for _ in range(8):
        advance(run, hooks)
    assert saver.checkpoints.best == {"step": 4, "metric": "val/loss", "value": 1.0}


@pytest.mark.parametrize(
    "metric", ["segm/AP", "far/segm/AP/blossom", "val/mean_iou", "glossy/bbox/AP"]
)
def test_of_all_but_losses_more_is_better(metric):
    assert not less_is_better(metric)
    for loss in ("val/loss", "val/loss_ins", "raw/val/loss", "my_loss", "far/Loss"):
        assert less_is_better(loss)


def test_training_ends_when_the_best_is_long_ago(caplog):
    caplog.set_level("INFO", logger="solov2_jax")
    run, saver = make_run(total=20), saver_of(0)
    scores = [0.1, 0.5, 0.3, 0.5, 0.9]
    hooks = [saver, evaluation(scores, FakeWriter()), BestCheckpoint(saver, "segm/AP")]
    hooks.append(EarlyStop(saver.checkpoints, 2, 2))
    while not run.stop:
        advance(run, hooks)
    assert run.step == 8 and not run.interrupted
    assert "early stopping after step 8: the best segm/AP is 0.5000 of step 4" in (caplog.text)
    # A run that resumes there decides the same, from what is written.
    again = make_run(step=8, total=20)
    known = evaluation([], FakeWriter(), written={"step": 8, "segm/AP": 0.5})
    for hook in (known, *hooks[2:]):
        hook.before_train(again)
    assert again.stop and again.results == {"segm/AP": 0.5}


def test_an_unknown_best_metric_is_an_error_with_a_suggestion():
    run, saver = make_run(step=1), saver_of(0)
    hooks = [evaluation([0.1], FakeWriter()), BestCheckpoint(saver, "segm/ap")]
    with pytest.raises(ValueError, match="best_metric = 'segm/ap'.*did you mean segm/AP"):
        advance(run, hooks)


def test_an_evaluation_that_a_kill_prevented_is_made_up_for():
    writer, run = FakeWriter(), make_run(step=2)
    evaluation([0.7], writer, written={"step": 2, "loss": 1.0}).before_train(run)
    assert writer.lines == [(2, {"segm/AP": 0.7})]


def test_an_evaluation_that_was_written_is_not_repeated():
    writer, run = FakeWriter(), make_run(step=2)
    evaluation([], writer, written={"step": 2, "segm/AP": 0.7}).before_train(run)
    assert writer.lines == [] and run.results == {"segm/AP": 0.7}
    start = make_run(step=0)
    evaluation([], writer).before_train(start)
    assert start.results_step == -1


def opened(writer, workdir, step):
    """Returns the writer as the loop opens it."""
    writer.check(workdir, step)
    writer.open(workdir, step, {"train": {"steps": 100}})
    return writer


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_is_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = opened(JsonlWriter(), tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    writer = opened(JsonlWriter(), tmp_path, 2)
    assert writer.last == {"step": 2, "loss": 1.0}
    writer.write(2, {"segm/AP": 0.5})  # an evaluation joins its step's line
    writer.write(3, {"loss": float("nan")})
    writer.close()
    assert lines_of(path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0, "segm/AP": 0.5},
        {"step": 3, "loss": None},
    ]
    opened(JsonlWriter(), tmp_path, 0).close()
    assert lines_of(path) == []


def test_tensorboard_writes_event_files(tmp_path):
    for start in (0, 1):
        writer = opened(TensorBoardWriter(), tmp_path, start)
        writer.write(start + 1, {"loss": 1.0, "segm/AP": 0.5})
        writer.close()
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2


def test_console_line(tmp_path, caplog):
    caplog.set_level("INFO", logger="solov2_jax")
    scalars = {
        "loss": 1.5,
        "loss_ins": 1.0,
        "mean_iou": 0.25,
        "learning_rate": 0.01,
        "images_per_second": 2.5,
        "step_seconds": 0.8,
        "data_seconds": 0.1,
        "eta_seconds": 3661.0,
        "memory_gb": 1.2,
        "recompiles": 2.0,
        "skipped_steps": 3.0,
    }
    console = opened(ConsoleWriter(), tmp_path, 0)
    console.write(20, scalars)
    console.write(20, {"segm/AP": 0.5})
    assert len(caplog.messages) == 1
    line = caplog.messages[0]
    parts = (
        "step 20/100",
        "loss 1.5",
        "iou 0.250",
        "lr 0.01",
        "2.50 images/s",
        "step 0.800 s (data 0.100 s)",
    )
    assert all(part in line for part in (*parts, "eta 1:01:01", "SKIPPED 3", "RECOMPILES 2"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "0:05"), (3700, "1:01:40"), (90061, "1 d 1:01:01"), (float("inf"), "?")],
)
def test_duration(seconds, text):
    assert duration(float(seconds)) == text


def test_metrics_wait_on_the_device_but_not_without_end():
    window, metrics = MetricsWindow(1), {"loss": jnp.float32(1), "skipped": 0}
    for step in range(250):
        window.add(step, metrics, [1])
    assert len(window.values) == 200
    for step in range(1000):
        window.add(step, metrics, [1])
    assert len(window.values) == 1000
