"""Hooks that show what happens: pictures and histograms for the writers, device traces."""

import logging
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from solov2_jax.io import reading
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.writers import WriterBase, call_writers

log = logging.getLogger("solov2_jax")


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
        paths = sorted(self._folder.glob("*.jpg"))
        images = {f"pictures/{p.stem}": _read_picture(p) for p in paths}
        call_writers(self._writers, "write_images", run.step, images)


def _read_picture(path: pathlib.Path) -> np.ndarray:
    with reading(path, "a picture of the evaluation"), Image.open(path) as image:
        return np.asarray(image)


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
