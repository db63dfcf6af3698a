"""How long a step of each lever takes, so that all runs of a study can take the same time."""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from solov2_jax.io import InputError, read_json, reading, write_json
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.loop import train

PACES = "paces"
# Steps that are timed, and those before, which compile and fill the pipeline.
_TIMED, _BEFORE = 24, 8


class _Clock(HookBase):
    """Times the steps of a run, and ends it."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last = 0.0

    def before_train(self, run: Run) -> None:
        self._last = time.perf_counter()

    def after_step(self, run: Run) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) >= _BEFORE + _TIMED:
            run.stop = "its pace is known"


def step_seconds(study: Path, folder: str, config: Any) -> float:
    """Returns the median time of a step, measured once for a study and kept in its folder.

    Args:
      folder: the lever's name as a part of a path.
      config: what its runs train by.
    """
    path = study / PACES / f"{folder}.json"
    if path.is_file():
        content = read_json(path, "the pace of a lever", "Delete it: it is measured again")
        with reading(path, "the pace of a lever", "Delete it: it is measured again"):
            return float(content["step_seconds"])
    trial = study / PACES / folder
    shutil.rmtree(trial, ignore_errors=True)  # of a start that was killed
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.epochs, config.train.steps = 0.0, 2 * (_BEFORE + _TIMED)
        config.train.eval_every = config.train.checkpoint_every = 0
        config.train.eval_epochs, config.train.patience = 0.0, 0
    clock = _Clock()
    train(config, trial, hooks=[clock])
    if len(clock.seconds) < _BEFORE + _TIMED:
        raise InputError(f"{trial}: was stopped before the pace was known")
    seconds = statistics.median(clock.seconds[_BEFORE:])
    write_json({"step_seconds": seconds}, path)
    shutil.rmtree(trial)
    return seconds


def lengthened(config: Any, ratio: float) -> list[str]:
    """Returns the overrides that make a run so many times as long, its milestones with it.

    Shares of the run stay; warm-up and periods in steps do too.
    """
    if config.train.epochs:
        overrides = [f"--config.train.epochs={config.train.epochs * ratio:.6g}"]
    else:
        overrides = [f"--config.train.steps={max(1, round(config.train.steps * ratio))}"]
    if config.optim.schedule == "multistep":
        places = tuple(m if m < 1 else round(m * ratio) for m in config.optim.milestones)
        overrides.append(f"--config.optim.milestones={places!r}")
    return overrides
