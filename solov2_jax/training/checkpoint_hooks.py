"""Hooks that save, evaluate, and keep what was best."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from solov2_jax.checkpoint import CheckpointManager
from solov2_jax.config import suggest
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.writers import Writer

log = logging.getLogger("solov2_jax")


class PeriodicCheckpoint(HookBase):
    """Saves every so many steps, at the end, and when the run is stopped.

    Args:
      position: what to save beside the arrays, a function of the run.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        every: int,
        position: Callable[[Run], dict[str, Any]],
    ):
        self.checkpoints, self._every, self._position = checkpoints, every, position

    def after_step(self, run: Run) -> None:
        self.checkpoints.check()
        if run.due(self._every) or run.finished:
            self.save(run)

    def after_train(self, run: Run) -> None:
        self.save(run)
        self.checkpoints.wait()

    def save(self, run: Run) -> None:
        """Saves the present state unless it is saved; never one that is not finite."""
        if run.step in self.checkpoints.steps():
            return
        run.window.fetch()
        check_finite(run)
        log.info("saving the checkpoint of step %d", run.step)
        self.checkpoints.save(run.state, self._position(run))


def check_finite(run: Run) -> None:
    """Raises if an update made a parameter infinite: skipping steps cannot mend that.

    Only looked for when the latest step was skipped, which it is from then on.
    """
    if not run.window.streak:
        return
    leaves = jax.tree_util.tree_leaves_with_path(run.state.params)
    bad = [path for path, x in leaves if not np.isfinite(jax.device_get(x)).all()]
    if bad:
        name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise FloatingPointError(
            f"step {run.step}: {len(bad)} parameters are not finite, the first is "
            f"{name}. Nothing of it was saved. Lower optim.learning_rate, lengthen "
            "optim.warmup_steps or set optim.clip_norm=35, in a new --workdir"
        )


class Evaluation(HookBase):
    """Evaluates every so many steps and at the end.

    Of a run with a moving average, the weights themselves are evaluated too, with
    "raw/" before the names of their metrics.

    Args:
      evaluate: variables -> {"segm/AP": ...}.
      written: the metrics line last written; an evaluation that was due at the step a
        run resumes from, and that is not in it, is made up for.
    """

    def __init__(
        self,
        evaluate: Callable[[dict[str, Any]], dict[str, float]],
        every: int,
        writers: Sequence[Writer],
        written: dict[str, Any],
    ):
        self._evaluate, self._every, self._writers = evaluate, every, writers
        self._written = written

    def before_train(self, run: Run) -> None:
        if run.step == 0 or not self._due(run):
            return
        known = {k: v for k, v in self._written.items() if "/" in k}
        if self._written.get("step") == run.step and known:
            run.results, run.results_step = known, run.step
        else:
            self._run(run)

    def after_step(self, run: Run) -> None:
        if self._due(run):
            self._run(run)

    def _due(self, run: Run) -> bool:
        return run.due(self._every) or run.finished

    def _run(self, run: Run) -> None:
        run.window.fetch()
        log.info("evaluating at step %d", run.step)
        start = time.perf_counter()
        run.results = self._evaluate(run.state.variables)
        if run.state.average is not None:
            # Last, so that the average's pictures and predictions are those on disk.
            raw = {f"raw/{name}": value for name, value in run.results.items()}
            run.results = {**raw, **self._evaluate(run.state.average)}
        run.results_step = run.step
        log.info("evaluated in %.1f s", time.perf_counter() - start)
        for writer in self._writers:
            writer.write(run.step, run.results)


class BestCheckpoint(HookBase):
    """Keeps the checkpoint whose evaluation was best, besides the newest ones."""

    def __init__(self, saver: PeriodicCheckpoint, metric: str):
        self._saver, self._metric = saver, metric

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        if run.results_step != run.step:
            return
        if self._metric not in run.results:
            raise ValueError(
                f"train.best_metric = {self._metric!r} is not among the evaluation's "
                f"metrics{suggest(self._metric, run.results)}"
            )
        value, best = run.results[self._metric], self._saver.checkpoints.best
        if value is None or not math.isfinite(value):
            return
        if best and best["metric"] == self._metric:
            sign = -1 if "loss" in self._metric else 1
            if sign * best["value"] >= sign * value:
                return
        self._saver.save(run)
        self._saver.checkpoints.record_best(run.step, self._metric, value)
        log.info("best %s so far: %.4f at step %d", self._metric, value, run.step)


class EarlyStop(HookBase):
    """Ends the run when no evaluation was the best for so many of them.

    Comes after `BestCheckpoint`. What it decides follows from the step of the best
    checkpoint, so that a run that resumes decides the same.

    Args:
      every: steps between evaluations.
      patience: evaluations; 0: never.
    """

    def __init__(self, checkpoints: CheckpointManager, every: int, patience: int):
        self._checkpoints, self._every, self._patience = checkpoints, every, patience

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        best = self._checkpoints.best
        if not self._patience or run.results_step != run.step or best is None:
            return
        if run.step - best["step"] >= self._patience * self._every and not run.finished:
            run.stop = "early stopping"
            log.info(
                "early stopping after step %d: the best %s, %.4f, is that of step %d, "
                "train.patience = %d evaluations ago",
                *(run.step, best["metric"], best["value"], best["step"]),
                self._patience,
            )
