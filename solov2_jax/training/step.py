"""The compiled train step. Device layout is named here, never in models or losses."""

import logging
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from solov2_jax.training import sharding
from solov2_jax.training.gradients import (
    LossFn,
    Metrics,
    Objective,
    as_objective,
    loss_and_gradient,
)
from solov2_jax.training.state import TrainState

PyTree = Any

log = logging.getLogger("solov2_jax")


class TrainStep:
    """step(state, batch) -> (state, metrics), compiled once for each batch shape.

    loss_fn(params, model_state, batch, key) sees the global batch, so its sums and
    means are global: the compiler places the all-reduce, and no code of ours has an
    axis name. The state is donated: the one passed in must not be used again.

    Args:
      loss: a function, or an objective whose batches can be split.
      accumulate: parts of a batch that are computed one after the other.
      ema_decay: of the moving average, where the state holds one.

    A step whose loss or gradient is not finite changes `step` only, and its metric
    `skipped` is 1; the devices decide that, the host does not wait.

    Attributes:
      compiles: compilations so far.
      recompiles: those of a shape that had been compiled before; anything but 0 is a
        defect, which is why it is counted and logged.
      compile_seconds: what the latest call spent on compiling, 0 mostly.
    """

    def __init__(
        self,
        loss: LossFn | Objective,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        key: jax.Array,
        trainable: PyTree,
        *,
        accumulate: int = 1,
        ema_decay: float = 0.0,
    ):
        self.compiles = self.recompiles = 0
        self.compile_seconds = 0.0
        self._shapes: set[tuple] = set()

        objective = as_objective(loss, accumulate)

        def gradient(state: TrainState, batch: PyTree, key: jax.Array):
            key = jax.random.fold_in(key, state.step)
            given = objective, state.params, state.model_state, batch, key
            options = {"trainable": trainable, "parts": accumulate, "mesh": mesh}
            return loss_and_gradient(*given, **options)

        def step(state: TrainState, batch: PyTree, key: jax.Array):
            self.compiles += 1  # runs when traced, not when executed
            loss, metrics, model_state, grads = gradient(state, batch, key)
            state, norm, skipped = _update(
                state, loss, model_state, grads, tx, ema_decay
            )
            watched = {"loss": loss, "grad_norm": norm, "skipped": skipped}
            return state, {**metrics, **watched}

        copied, by_batch = sharding.replicated(mesh), sharding.split_by_batch(mesh)
        # An argument: as a constant, each seed would be another program to compile.
        self._key = sharding.copy_to_all(key, mesh)
        self._step = jax.jit(
            step,
            in_shardings=(copied, by_batch, copied),
            out_shardings=(copied, copied),
            donate_argnums=0,
        )

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Returns the state after one step, and the step's metrics, on the devices."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))
        known, before = shapes in self._shapes, self.compiles
        name = "x".join(map(str, max((s for s, _ in shapes), key=len)))
        if not known:
            log.info("compiling the train step for arrays of %s ...", name)
        start = time.perf_counter()
        result = self._step(state, batch, self._key)
        self.compile_seconds = 0.0
        if self.compiles > before:
            self.compile_seconds = time.perf_counter() - start
            log.info("compiled for %s in %.1f s", name, self.compile_seconds)
            if known:
                self.recompiles += 1
                log.warning("recompiled for a shape seen before: %s", name)
        self._shapes.add(shapes)
        return result

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """Returns the step before its compilation, for arrays or for their shapes."""
        return self._step.lower(state, batch, self._key)


def _update(
    state: TrainState,
    loss: jax.Array,
    model_state: PyTree,
    grads: PyTree,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Returns (state after the step, norm of the gradient, 1.0 if it was skipped)."""

    def updated() -> TrainState:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = replace(
            state, params=params, opt_state=opt_state, model_state=model_state
        )
        return replace(new, average=moved_average(state, new.variables, ema_decay))

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A branch: selecting each number would read and write the state once more.
    new = jax.lax.cond(finite, updated, lambda: state)
    return replace(new, step=state.step + 1), norm, 1.0 - finite.astype(jnp.float32)


def moved_average(state: TrainState, variables: PyTree, decay: float) -> PyTree:
    """Returns the state's moving average after a step to `variables`, None without.

    At step t the decay is at most (1 + t) / (10 + t), so that the first steps, whose
    weights are far from the last ones, are soon forgotten.

    Source: tensorflow/python/training/moving_averages.py, ExponentialMovingAverage.
    """
    if state.average is None:
        return None
    warm = (1.0 + state.step) / (10.0 + state.step)
    rate = 1.0 - jnp.minimum(decay, warm)
    # In this form what does not change keeps its bits.
    return jax.tree.map(lambda a, x: a + rate * (x - a), state.average, variables)
