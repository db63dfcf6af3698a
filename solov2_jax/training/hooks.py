"""What happens around the steps: the base class of hooks, timing, logging, pictures.

A hook sees host-side values of the run and changes nothing that is computed.
Source: detectron2/engine/train_loop.py (HookBase) and hooks.py.
"""

import contextlib
import itertools
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from solov2_jax import distributed
from solov2_jax.io import InputError, reading
from solov2_jax.progress import Progress
from solov2_jax.training.metrics import MetricsWindow
from solov2_jax.training.step import TrainState, TrainStep
from solov2_jax.training.writers import WriterBase, call_writers
from solov2_jax.user_code import failure

PyTree = Any

log = logging.getLogger("solov2_jax")


@dataclass
class Run:
    """A run as hooks see it; only the loop changes `state` and `step`."""

    state: TrainState
    step: int  # steps done
    total_steps: int
    batch_size: int
    step_fn: TrainStep
    window: MetricsWindow
    config: Any  # resolved; values for your own hooks stand below `config.user`
    data_seconds: float = 0.0  # spent waiting for the latest batch
    # Why the run ends before its last step. A hook may set it: the run then ends after
    # this step, with its checkpoint saved.
    stop: str = ""
    interrupted: bool = False  # by a signal: the same command would continue
    all_stop: bool = False  # every process knows of it
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
                f"{failure(error)}. Its traceback is in train.log"
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


class Pictures(HookBase):
    """Hands an evaluation's pictures, truth left and prediction right, to the writers.

    Comes after the evaluation.

    Args:
      folder: where evaluations leave their pictures, as .jpg.
    """

    transfer_guard = "disallow"

    def __init__(self, folder: pathlib.Path, writers: Sequence[WriterBase]):
        self._folder, self._writers = folder, writers

    def after_step(self, run: Run) -> None:
        if run.results_step != run.step or not self._writers:
            return
        images = {}
        for path in sorted(self._folder.glob("*.jpg")):
            with reading(path, "a picture of the evaluation"), Image.open(path) as image:
                images[f"pictures/{path.stem}"] = np.asarray(image)
        call_writers(self._writers, "write_images", run.step, images)


class Histograms(HookBase):
    """Hands the parameters to the writers, by name."""

    transfer_guard = "disallow"

    def __init__(self, writers: Sequence[WriterBase], every: int):
        self._writers, self._every = writers, every

    def after_step(self, run: Run) -> None:
        if not run.due(self._every):
            return
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(run.state.params))
        name = jax.tree_util.keystr
        arrays = {f"params/{name(k, simple=True, separator='/')}": x for k, x in leaves}
        call_writers(self._writers, "write_histograms", run.step, arrays)


class Profiler(HookBase):
    """Writes a trace of some steps, for TensorBoard's profile plugin or Perfetto.

    Args:
      steps: (first, last) of the steps to trace, both included; (): none.
      folder: where the trace goes.
    """

    transfer_guard = "disallow"

    def __init__(self, steps: Sequence[int], folder: pathlib.Path):
        self._first, self._last = steps or (0, 0)
        self._folder, self._running = folder, False

    def before_step(self, run: Run) -> None:
        if self._last and run.step + 1 == self._first:
            jax.block_until_ready(run.state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after_step(self, run: Run) -> None:
        if self._running and run.step >= self._last:
            self._stop(run)

    def after_train(self, run: Run) -> None:
        if self._running:
            self._stop(run)

    def _stop(self, run: Run) -> None:
        jax.block_until_ready(run.state)
        jax.profiler.stop_trace()
        self._running = False
        log.info("trace of steps %d to %d: %s", self._first, run.step, self._folder)


class PreciseBN(HookBase):
    """Replaces the batch norms' statistics before an evaluation or the last save.

    The one hook that changes the state: what evaluation and prediction use, which no
    training step looks at. Comes before the hooks that save and evaluate.

    Source: detectron2/engine/hooks.py, PreciseBN; fvcore/nn/precise_bn.py,
    update_bn_stats, with the population's variance.

    Args:
      moments: (variables, batch) -> mean and variance at each trained batch norm.
      batches: from a step on; always the first ones are taken, so that a run that
        resumes computes the same.
      every: steps between evaluations; 0: only at the end.
      num_batches: that the statistics are taken over; all, where there are fewer.
    """

    def __init__(
        self,
        moments: Callable[[PyTree, PyTree], PyTree],
        batches: Callable[[int], Generator[dict[str, Any], None, None]],
        every: int,
        num_batches: int,
    ):
        self._batches, self._every, self._num_batches = batches, every, num_batches
        self._mesh = distributed.make_mesh()
        copied, split = distributed.replicated(self._mesh), distributed.split_by_batch(self._mesh)
        self._moments = jax.jit(moments, in_shardings=(copied, split), out_shardings=copied)

    def before_train(self, run: Run) -> None:
        if "batch_stats" not in run.state.model_state:
            raise InputError(
                "train.precise_bn: the network has no batch norm (the backbone's norms are of "
                "another kind); set the key to 0"
            )

    def after_step(self, run: Run) -> None:
        if not (run.due(self._every) or run.finished):
            return
        log.info("batch norms' statistics over up to %d batches", self._num_batches)
        state = run.state
        precise = self._precise(state.variables)
        model_state = {name: precise[name] for name in state.model_state}
        ema = None if state.ema is None else self._precise(state.ema)
        run.state = replace(state, model_state=model_state, ema=ema)

    def _precise(self, variables: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns the variables with the statistics of their batch norms replaced."""
        total: dict[tuple, Any] = {}
        taken = 0
        with contextlib.closing(self._batches(0)) as batches:
            for batch in itertools.islice(batches, self._num_batches):
                taken += 1
                arrays = distributed.put_batch(batch, self._mesh)
                moments: dict[tuple, Any] = {**flatten_dict(self._moments(variables, arrays))}
                for path, value in moments.items():
                    if path[-1] == "var":  # E[x^2] can be added
                        value = value + jnp.square(moments[(*path[:-1], "mean")])
                    total[path] = total[path] + value if path in total else value
        if not taken:
            raise InputError(
                "train.precise_bn: the training data gives no batch; set the key to 0 or "
                "train.steps to 1 at least."
            )
        if not total:
            log.warning("train.precise_bn: every batch norm is frozen; the statistics stay")
            return variables
        stats: dict[tuple, Any] = {**flatten_dict(variables["batch_stats"])}
        stats |= {path: value / taken for path, value in total.items()}
        for path in [p for p in total if p[-1] == "var"]:
            stats[path] = stats[path] - jnp.square(stats[(*path[:-1], "mean")])
        return {**variables, "batch_stats": unflatten_dict(stats)}


class TrainingProgress(HookBase):
    """Shows how far the run is, where standard output is a terminal.

    Args:
      epochs: of the whole run; 0: not known.
    """

    def __init__(self, progress: Progress, epochs: float):
        self._progress, self._epochs = progress, epochs

    def before_train(self, run: Run) -> None:
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        epoch = run.step / max(run.total_steps, 1) * self._epochs
        text = f"epoch {epoch:.1f} of {self._epochs:g}" if self._epochs else ""
        self._progress.update(run.step, text)


def memory_gb() -> float:
    """Returns the peak in use: of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
