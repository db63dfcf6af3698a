"""One run of a study: trained to its end, or until it is hopeless; what came out."""

import logging
import time
from pathlib import Path
from typing import Any

from solov2_jax.checkpoint import less_is_better
from solov2_jax.config import apply_overrides, read_config
from solov2_jax.io import InputError, read_json, write_json
from solov2_jax.tools.study.design import CONFIG, PLAIN, RUNS, Design, Lever, Trial, trial_config
from solov2_jax.tools.study.pace import lengthened, step_seconds
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.loop import train
from solov2_jax.training.metric_files import read_metrics

log = logging.getLogger("solov2_jax")

OUTCOME, SECONDS = "outcome.json", "study/seconds"


class Judge(HookBase):
    """Counts the time that a run takes, and ends it where it is far behind the plain recipe.

    It compares the best evaluation so far with the plain run's of the same seed and fold up to
    the same step, so that a run that resumes decides the same.

    Args:
      folder: of the run; `baseline` of the plain one, None: nothing is judged.
      metric: that counts, of which more is better.
      share: of the plain run's value that must be reached.
      start: share of the run from which on it is judged.
    """

    def __init__(
        self, folder: Path, baseline: Path | None, *, metric: str, share: float, start: float
    ):
        self._own, self._baseline = folder / "metrics.jsonl", baseline
        self._metric, self._share, self._start = metric, share, start
        self._seconds, self._clock = 0.0, 0.0

    def before_train(self, run: Run) -> None:
        lines = [line for line in read_metrics(self._own) if line["step"] <= run.step]
        self._seconds = max((line.get(SECONDS) or 0.0 for line in lines), default=0.0)
        self._clock = time.perf_counter()
        self._judge(run)

    def after_step(self, run: Run) -> None:
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        run.scalars[SECONDS] = self._seconds
        self._judge(run)

    def _judge(self, run: Run) -> None:
        judged = self._share and self._baseline and run.results_step == run.step
        if not judged or run.finished or run.step < self._start * run.total_steps:
            return
        assert self._baseline is not None
        here = best_value(self._own, self._metric, run.step)
        plain = best_value(self._baseline / "metrics.jsonl", self._metric, run.step)
        if plain and (here or 0.0) < self._share * plain:
            run.stop = f"hopeless: {self._metric} {here or 0.0:.4f}, the plain recipe's {plain:.4f}"
            log.info("%s at step %d; the run ends", run.stop, run.step)


def best_value(path: Path, metric: str, step: int) -> float | None:
    """Returns the largest value of a metric up to a step, None where there is none."""
    values = [line.get(metric) for line in read_metrics(path) if line["step"] <= step]
    return max((v for v in values if v is not None), default=None)


def trial_folder(study: Path, trial: Trial) -> Path:
    return study / RUNS / trial.name


def run_trial(study: Path, design: Design, trial: Trial) -> bool:
    """Trains a run, or goes on with it; returns whether it has come to its end."""
    folder = trial_folder(study, trial)
    config = trial_config(study, trial, design.folds)
    if design.equal_time and trial.lever.name != PLAIN:
        recipe = read_config(study / CONFIG)
        own = step_seconds(study, trial.lever.folder, config)
        ratio = step_seconds(study, PLAIN, recipe) / own
        apply_overrides(config, lengthened(config, ratio))
    metric = config.train.best_metric
    plain = Trial(Lever(PLAIN, ()), trial.seed, trial.fold)
    judge = Judge(
        folder,
        None if trial.lever.name == PLAIN or less_is_better(metric) else trial_folder(study, plain),
        metric=metric,
        share=design.hopeless,
        start=design.judge_from,
    )
    results = train(config, folder, hooks=[judge])
    if not results:
        return False
    write_json(_outcome(folder, metric), folder / OUTCOME)
    return True


def _outcome(folder: Path, metric: str) -> dict[str, Any]:
    """Returns the metrics of a finished run's best evaluation, and its time."""
    lines = read_metrics(folder / "metrics.jsonl")
    evaluated = [line for line in lines if line.get(metric) is not None]
    seconds = max((line.get(SECONDS) or 0.0 for line in lines), default=0.0)
    if not evaluated:
        return {"step": lines[-1]["step"], "metrics": {}, "seconds": seconds}
    sign = -1 if less_is_better(metric) else 1
    best = max(evaluated, key=lambda line: sign * line[metric])
    metrics = {k: v for k, v in best.items() if k.startswith(("segm/", "bbox/", "val/"))}
    return {
        "step": best["step"],
        "last_step": lines[-1]["step"],
        "metrics": {metric: best[metric], **metrics},
        "seconds": seconds,
    }


def read_outcome(study: Path, trial: Trial) -> dict[str, Any] | None:
    """Returns what a finished run wrote, None where it is not finished.

    Raises:
      InputError: if the file is damaged.
    """
    path = trial_folder(study, trial) / OUTCOME
    if not path.is_file():
        return None
    content = read_json(path, "the outcome of a study's run", "Delete it: the run goes on then")
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise InputError(f"{path}: holds no outcome; delete it, and the run goes on")
    return content
