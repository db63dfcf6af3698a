"""What is made of a run's evaluations: reports that can fail without harm to the run."""

import json
import logging
import pathlib
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import jax

from solov2_jax.evaluation.evaluate import FinishedEvaluation, Report
from solov2_jax.io import make_folder, reason, write_json
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.user_code import import_function

log = logging.getLogger("solov2_jax")

_RECORD = pathlib.Path("eval", "reported.json")  # the step of the last reports


def load_reports(config_train, key: str) -> dict[str, Report]:
    """Returns the functions that `train.after_evaluation` or `train.after_training` names."""
    return {
        path: import_function(path, f"train.{key}", ("evaluation",)) for path in config_train[key]
    }


def have_reported(workdir: pathlib.Path, step: int, *, finished: bool) -> bool:
    """Returns whether the reports of a step were made before the run was last ended.

    Args:
      finished: whether the step is the last one, which `train.after_training` is about.
    """
    try:
        record = json.loads((workdir / _RECORD).read_text(encoding="utf-8"))
        return record["step"] == step and (record["after_training"] or not finished)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # none, or damaged: they are made again


class Reports(HookBase):
    """Calls functions with each evaluation, and others with the last one.

    What one raises becomes a line of the log. Comes after `Evaluation`. Where several
    processes train, the first one reports, and the others go on.

    Args:
      finished: holds the latest evaluation.
      each, last: functions by name, called after every evaluation and at the end.
    """

    def __init__(
        self,
        finished: deque[FinishedEvaluation],
        workdir: pathlib.Path,
        each: Mapping[str, Report],
        last: Mapping[str, Report],
    ):
        self._finished, self._workdir = finished, workdir
        self._each, self._last = each, last
        self._seen: FinishedEvaluation | None = None

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        if run.results_step != run.step:
            return
        if self._finished and self._finished[-1] is not self._seen:
            self._seen = self._finished[-1]
            self._call(self._each, run.step)
        self._record(run.step, after_training=False)

    def after_train(self, run: Run) -> None:
        if run.interrupted or run.results_step is None:
            return
        if self._seen is not None:
            self._call(self._last, run.results_step)
        self._record(run.results_step, after_training=True)

    def _record(self, step: int, *, after_training: bool) -> None:
        if jax.process_index() == 0:
            make_folder((self._workdir / _RECORD).parent)
            write_json({"step": step, "after_training": after_training}, self._workdir / _RECORD)

    def _call(self, reports: Mapping[str, Report], step: int) -> None:
        assert self._seen is not None
        evaluation = replace(self._seen, checkpoint=(self._workdir, step))
        for name, report in reports.items():
            try:
                report(evaluation)
            # Whatever is wrong with a page, the training it is about has succeeded.
            except Exception as error:
                log.error("step %d: no report by %s: %s", step, name, reason(error))
                # Into train.log only, as what libraries log.
                logging.getLogger("absl").warning("the report by %s", name, exc_info=error)
