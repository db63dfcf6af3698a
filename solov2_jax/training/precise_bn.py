"""Statistics of trained batch norms over many batches, instead of a running average."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from solov2_jax.training import sharding
from solov2_jax.training.hooks import HookBase, Run

PyTree = Any

log = logging.getLogger("solov2_jax")


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
      num_batches: that the statistics are taken over.
    """

    def __init__(
        self,
        moments: Callable[[PyTree, PyTree], PyTree],
        batches: Callable[[int], Generator[dict[str, Any], None, None]],
        every: int,
        num_batches: int,
    ):
        self._batches, self._every, self._num_batches = batches, every, num_batches
        self._mesh = sharding.make_mesh()
        copied, split = (
            sharding.replicated(self._mesh),
            sharding.split_by_batch(self._mesh),
        )
        self._moments = jax.jit(moments, in_shardings=(copied, split), out_shardings=copied)

    def after_step(self, run: Run) -> None:
        if not (run.due(self._every) or run.finished):
            return
        log.info("batch norms' statistics over %d batches", self._num_batches)
        state = run.state
        precise = self._precise(state.variables)
        model_state = {name: precise[name] for name in state.model_state}
        ema = None if state.ema is None else self._precise(state.ema)
        run.state = replace(state, model_state=model_state, ema=ema)

    def _precise(self, variables: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns the variables with the statistics of their batch norms replaced."""
        total: PyTree = None
        with contextlib.closing(self._batches(0)) as batches:
            for batch in itertools.islice(batches, self._num_batches):
                arrays = sharding.put_batch(batch, self._mesh)
                sums = _sums(self._moments(variables, arrays))
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        stats: dict[tuple, Any] = {**flatten_dict(variables["batch_stats"])}
        flat: dict[tuple, Any] = {**flatten_dict(total)}
        for path, value in flat.items():
            stats[path] = value / self._num_batches
        for path in [p for p in flat if p[-1] == "var"]:
            stats[path] = stats[path] - jnp.square(stats[(*path[:-1], "mean")])
        return {**variables, "batch_stats": unflatten_dict(stats)}


def _sums(moments: PyTree) -> PyTree:
    """Returns E[x] as "mean" and E[x^2] as "var" of each norm: these can be added."""
    flat: dict[tuple, Any] = {**flatten_dict(moments)}
    squares = {
        path: value + jnp.square(flat[(*path[:-1], "mean")])
        for path, value in flat.items()
        if path[-1] == "var"
    }
    return unflatten_dict({**flat, **squares})
