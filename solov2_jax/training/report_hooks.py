"""What is made of a run's evaluations: reports that can fail without harm to the run."""

import logging
import pathlib
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from solov2_jax.evaluation.evaluate import FinishedEvaluation, Report
from solov2_jax.io import import_object, reason
from solov2_jax.training.hooks import HookBase, Run

log = logging.getLogger("solov2_jax")


def load_reports(config_train, key: str) -> dict[str, Report]:
    """Returns the functions that `train.after_evaluation` or `train.after_training` names."""
    return {path: import_object(path, f"train.{key}") for path in config_train[key]}


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
        if run.results_step == run.step and self._finished and self._finished[-1] is not self._seen:
            self._seen = self._finished[-1]
            self._call(self._each, run.step)

    def after_train(self, run: Run) -> None:
        if not run.interrupted and self._seen is not None:
            self._call(self._last, run.results_step)

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
