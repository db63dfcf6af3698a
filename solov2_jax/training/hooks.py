"""What happens around the steps: the base class of hooks, timing, logging.

A hook sees host-side values of the run and changes nothing that is computed.
Source: detectron2/engine/train_loop.py (HookBase) and hooks.py.
"""

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
import optax

from solov2_jax.io import InputError, reason
from solov2_jax.training.metrics import MetricsWindow
from solov2_jax.training.state import TrainState
from solov2_jax.training.step import TrainStep
from solov2_jax.training.writers import WriterBase, call_writers


@dataclass
class Run:
    """A run as hooks see it; only the loop changes `state` and `step`."""

    state: TrainState
    step: int  # steps done
    total_steps: int
    batch_size: int
    step_fn: TrainStep
    window: MetricsWindow
    data_seconds: float = 0.0  # spent waiting for the latest batch
    # Why the run ends before its last step. A hook may set it: the run then ends after
    # this step, with its checkpoint saved.
    stop: str = ""
    interrupted: bool = False  # by a signal: the same command would continue
    evaluating: bool = False  # a signal ends an evaluation without waiting for it
    # What hooks found out since the last line was written; `PeriodicWriter` writes it.
    scalars: dict[str, float] = field(default_factory=dict)
    # Of the latest evaluation, and the step it belongs to. None: undefined.
    results: Mapping[str, float | None] = field(default_factory=dict)
    results_step: int = -1

    def due(self, every: int) -> bool:
        """Returns whether something done `every` steps is to be done now; 0: never."""
        return every > 0 and self.step > 0 and self.step % every == 0

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


class HookBase:
    """Does nothing at any point: derive from it and override what you need.

    `train(config, workdir, hooks=[MyHook()])` calls it after the hooks that are always
    there, so it sees their results. What it raises ends the run, after a checkpoint.

    Attributes:
      transfer_guard: the loop runs under `jax.transfer_guard("disallow")`, which turns
        a hidden copy between host and device into an error; a hook sets its own level.
    """

    transfer_guard = "allow"

    def before_train(self, run: Run) -> None:
        """Called once, before the first step; `run.step` is above 0 in a resumed run."""

    def before_step(self, run: Run) -> None:
        """Called before the batch is fetched."""

    def after_step(self, run: Run) -> None:
        """Called when step number `run.step` is under way, not necessarily computed.

        `run.window.fetch()` waits for it; `run.window.values[-1]` then has its metrics.
        """

    def after_train(self, run: Run) -> None:
        """Called once, after the last step or an early stop, not after an error."""


def call_hooks(hooks: Iterable[HookBase], point: str, run: Run) -> None:
    """Calls one of the four methods of each hook, in order.

    Raises:
      InputError: naming the hook, for an error that does not explain itself.
    """
    for hook in hooks:
        try:
            with jax.transfer_guard(hook.transfer_guard):
                getattr(hook, point)(run)
        except (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError):
            raise  # these explain themselves, or are for whoever runs several processes
        except Exception as error:
            raise InputError(
                f"the hook {type(hook).__name__} failed in {point} at step {run.step}: "
                f"{reason(error)}. Its traceback is in train.log"
            ) from error


class IterationTimer(HookBase):
    """Seconds per step and of waiting for data, images/s, ETA, memory.

    Means over the steps since the last line. Compiling is not counted, nor what hooks
    that come after this one do (saving, evaluating).
    """

    transfer_guard = "disallow"

    def __init__(self, every: int):
        self._every = every
        self._seconds = self._data = self._all_seconds = 0.0
        self._steps = self._all_steps = 0

    def before_step(self, run: Run) -> None:
        self._start = time.perf_counter()

    def after_step(self, run: Run) -> None:
        if run.due(self._every):
            run.window.fetch()  # the clock is read when the devices are done
        seconds = time.perf_counter() - self._start - run.step_fn.compile_seconds
        self._seconds += seconds
        self._all_seconds += seconds
        self._data += run.data_seconds
        self._steps += 1
        self._all_steps += 1
        if run.due(self._every):
            remaining = run.total_steps - run.step
            run.scalars |= {
                "step_seconds": self._seconds / self._steps,
                "data_seconds": self._data / self._steps,
                "images_per_second": run.batch_size * self._steps / self._seconds,
                "eta_seconds": remaining * self._all_seconds / self._all_steps,
                "memory_gb": memory_gb(),
            }
            self._seconds = self._data = 0.0
            self._steps = 0


class LearningRate(HookBase):
    """Logs the rate that the step used; the schedule itself is part of the step.

    Comes after a hook that fetches the metrics, which tell the skipped steps.
    """

    def __init__(self, schedule: optax.Schedule, every: int):
        self._schedule, self._every = schedule, every

    def after_step(self, run: Run) -> None:
        if run.due(self._every):
            # A skipped step leaves the optimiser's count as it was.
            updates = run.step - 1 - run.window.skipped
            run.scalars["learning_rate"] = float(np.asarray(self._schedule(updates)))


class PeriodicWriter(HookBase):
    """Writes the means of the metrics and everything that earlier hooks found out."""

    def __init__(self, writers: Sequence[WriterBase], every: int):
        self._writers, self._every = writers, every

    def after_step(self, run: Run) -> None:
        if not run.due(self._every):
            return
        run.window.fetch()
        counts = {
            "compiles": float(run.step_fn.compiles),
            "recompiles": float(run.step_fn.recompiles),
            "skipped_steps": float(run.window.skipped),
        }
        scalars = {**run.window.means(), **run.scalars, **counts}
        # First: what a writer's error leaves for the next start is a new window.
        run.window.clear()
        run.scalars = {}
        call_writers(self._writers, "write", run.step, scalars)


def memory_gb() -> float:
    """Returns the peak in use: of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
