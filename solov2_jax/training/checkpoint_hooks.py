"""Hooks that save, evaluate, and keep what was best."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from solov2_jax.checkpoint import CheckpointManager, less_is_better
from solov2_jax.config import suggest
from solov2_jax.evaluation.evaluate import StopEvaluation
from solov2_jax.io import InputError
from solov2_jax.training.build import Evaluate
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.writers import WriterBase, call_writers

PyTree = Any

log = logging.getLogger("solov2_jax")


class PeriodicCheckpoint(HookBase):
    """Saves every so many steps, at the end, and when the run is stopped.

    Not while steps are being skipped: a run that has diverged would push out the
    checkpoints from before. Such a save is made up for after the next good step.

    Args:
      about: what to save about the run beside its arrays, step and metrics' window.
    """

    transfer_guard = "disallow"

    def __init__(self, checkpoints: CheckpointManager, every: int, about: Mapping[str, Any]):
        self.checkpoints, self._every, self._about = checkpoints, every, about
        self._overdue = False

    def after_step(self, run: Run) -> None:
        self.checkpoints.check()
        if not (run.due(self._every) or run.finished or self._overdue):
            return
        run.window.fetch()
        self._overdue = bool(run.window.streak) and not run.finished
        if not self._overdue:
            self.save(run)

    def after_train(self, run: Run) -> None:
        self.save(run)
        self.checkpoints.wait()

    def save(self, run: Run) -> None:
        """Saves the present state unless it is saved; never one that is not finite.

        Raises:
          FloatingPointError: if it is not, which skipping steps cannot repair.
        """
        if run.step in self.checkpoints.steps():
            return
        run.window.fetch()
        parts = run.state.parts()
        if name := first_nonfinite(parts):
            raise FloatingPointError(
                f"step {run.step}: {name} is not finite after the update. The checkpoints "
                "from before are kept, and nothing of this state was saved. Lower "
                "optim.learning_rate, lengthen optim.warmup_steps or set "
                "optim.clip_norm=35, in a new --workdir"
            )
        log.info("saving the checkpoint of step %d", run.step)
        position = {**self._about, "next_step": run.step, **run.window.saved()}
        delete_older = not run.window.streak
        self.checkpoints.save(run.step, parts, position, delete_older=delete_older)

    @contextlib.contextmanager
    def saving_after_error(self, run: Run) -> Iterator[None]:
        """Saves the steps done when an error ends what is inside; logs whether that worked.

        Not where the run has diverged, or other processes take part: they are not at
        this step.
        """
        try:
            yield
        except FloatingPointError:
            raise
        except Exception:
            if jax.process_count() > 1 or run.step == 0:
                raise
            try:
                self.after_train(run)
            # Whatever goes wrong here, the error that ends the run is the one to report.
            except Exception as error:
                text = " ".join(str(error).split())
                log.error("step %d could not be saved before the error below: %s", run.step, text)
            else:
                log.info("the checkpoint of step %d is saved: the same command continues", run.step)
            raise


class Evaluation(HookBase):
    """Evaluates every so many steps and at the end.

    A moving average is evaluated, where there is one; with `raw_weights` the weights
    themselves too, with "raw/" before the names of their metrics. A signal breaks an
    evaluation off; it is made up for when the run resumes.

    Args:
      evaluate: variables -> {"segm/AP": ...}.
      written: the metrics line last written; an evaluation that was due at the step a
        run resumes from, and that is not in it, is made up for.
      metric: named in the log where it is undefined.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        every: int,
        writers: Sequence[WriterBase],
        written: dict[str, Any],
        metric: str = "segm/AP",
        *,
        raw_weights: bool = True,
    ):
        self._evaluate, self._every, self._writers = evaluate, every, writers
        self._written, self._metric = written, metric
        self._raw_weights = raw_weights

    def before_train(self, run: Run) -> None:
        if run.step == 0 or not self._due(run):
            return
        known = {k: v for k, v in self._written.items() if "/" in k}
        if self._written.get("step") == run.step and known:
            run.results, run.results_step = known, run.step
        else:
            self._run(run)

    def after_step(self, run: Run) -> None:
        # Of several processes, all evaluate or none: the others may not know of the signal.
        alone = jax.process_count() == 1
        if self._due(run) and not (run.interrupted and alone):
            self._run(run)

    def _due(self, run: Run) -> bool:
        return run.due(self._every) or run.finished

    def _run(self, run: Run) -> None:
        run.window.fetch()
        log.info("evaluating at step %d", run.step)
        start = time.perf_counter()
        try:
            run.evaluating = True
            averaged, results = run.state.ema is not None, {}
            if self._raw_weights or not averaged:
                results = self._evaluate(run.state.variables)
            if averaged:
                # Last, so that the average's pictures and predictions are those on disk.
                raw = {f"raw/{name}": value for name, value in results.items()}
                results = {**raw, **self._evaluate(run.state.ema)}
        except StopEvaluation:
            log.info("the evaluation of step %d was interrupted", run.step)
            run.stop, run.interrupted = run.stop or "another process", True
            run.all_stop = True
            return
        finally:
            run.evaluating = False
        run.results, run.results_step = defined(results), run.step
        log.info("evaluated in %.1f s", time.perf_counter() - start)
        if self._metric in run.results and run.results[self._metric] is None:
            log.warning(
                "step %d: %s is undefined, because the validation data has no object to "
                "compare with. It does not count for the best checkpoint and is null in "
                "metrics.jsonl",
                run.step,
                self._metric,
            )
        call_writers(self._writers, "write", run.step, run.results)


def defined(results: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns the results with None for -1 (COCO's "undefined") and what is not finite."""
    return {
        name: value if value is not None and math.isfinite(value) and value != -1.0 else None
        for name, value in results.items()
    }


class BestCheckpoint(HookBase):
    """Keeps the checkpoint whose evaluation was best, besides the newest ones."""

    transfer_guard = "disallow"

    def __init__(self, saver: PeriodicCheckpoint, metric: str):
        self._saver, self._metric = saver, metric

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        if run.results_step != run.step:
            return
        check_metric(self._metric, run.results)
        value, best = run.results[self._metric], self._saver.checkpoints.best
        if value is None:
            return
        if best and best["metric"] == self._metric:
            sign = -1 if less_is_better(self._metric) else 1
            if sign * best["value"] >= sign * value:
                return
        self._saver.save(run)
        self._saver.checkpoints.record_best(run.step, self._metric, value)
        log.info("best %s so far: %.4f at step %d", self._metric, value, run.step)


def check_metric(metric: str, names: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises an InputError if `train.best_metric` is not among the evaluation's names."""
    if metric not in names:
        raise InputError(
            f"train.best_metric = {metric!r} is not among the evaluation's metrics"
            f"{suggest(metric, names)}"
        )


class EarlyStop(HookBase):
    """Ends the run when no evaluation was the best for so many of them.

    Comes after `BestCheckpoint`. What it decides follows from the step of the best
    checkpoint, so that a run that resumes decides the same. An undefined metric decides
    nothing.

    Args:
      every: steps between evaluations.
      patience: evaluations; 0: never.
    """

    transfer_guard = "disallow"

    def __init__(self, checkpoints: CheckpointManager, every: int, patience: int):
        self._checkpoints, self._every, self._patience = checkpoints, every, patience

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        best = self._checkpoints.best
        if not self._patience or run.results_step != run.step or best is None:
            return
        if run.results.get(best["metric"]) is None:
            return
        if run.step - best["step"] >= self._patience * self._every and not run.finished:
            run.stop = "early stopping"
            log.info(
                "early stopping after step %d: the best %s is %.4f of step %d, "
                "train.patience = %d evaluations ago",
                run.step,
                best["metric"],
                best["value"],
                best["step"],
                self._patience,
            )


@jax.jit
def _leaves_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in leaves]


def first_nonfinite(tree: PyTree) -> str:
    """Returns the name of the first leaf with a NaN or infinity, "" if all are finite.

    A device looks, at its own copy; one bool per leaf comes back.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Copies of this process alone: the others may not be at this step.
    copies = [x.addressable_data(0) if isinstance(x, jax.Array) else x for _, x in leaves]
    finite = jax.device_get(_leaves_finite(copies))
    bad = [path for (path, _), good in zip(leaves, finite, strict=True) if not good]
    return jax.tree_util.keystr(bad[0], simple=True, separator="/") if bad else ""
