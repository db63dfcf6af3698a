"""The compiled train step. Device layout is named here, never in models or losses."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from solov2_jax.training import sharding
from solov2_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, Metrics]]

log = logging.getLogger("solov2_jax")


class TrainStep:
    """step(state, batch) -> (state, metrics), compiled once for each batch shape.

    loss_fn(params, model_state, batch, key) sees the global batch, so its sums and
    means are global: the compiler places the all-reduce, and no code of ours has an
    axis name. The state is donated: the one passed in must not be used again.

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
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        key: jax.Array,
        trainable: PyTree,
    ):
        self.compiles = self.recompiles = 0
        self.compile_seconds = 0.0
        self._shapes: set[tuple] = set()

        def step(state: TrainState, batch: PyTree, key: jax.Array):
            self.compiles += 1  # runs when traced, not when executed
            return _step(state, batch, loss_fn, tx, key, trainable)

        copied, by_batch = sharding.replicated(mesh), sharding.split_by_batch(mesh)
        # An argument: as a constant, each seed would be another program to compile.
        self._key = jax.device_put(key, copied)
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


def _step(state, batch, loss_fn, tx, key, trainable) -> tuple[TrainState, Metrics]:
    def loss_of(params):
        # Stopped here, so that no gradient of a frozen stage is ever computed.
        params = jax.tree.map(
            lambda x, train: x if train else jax.lax.stop_gradient(x), params, trainable
        )
        step_key = jax.random.fold_in(key, state.step)
        return loss_fn(params, state.model_state, batch, step_key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = replace(state, params=params, opt_state=opt_state)
    new = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)
    skipped = 1.0 - finite.astype(jnp.float32)
    metrics = {**metrics, "loss": loss, "grad_norm": norm, "skipped": skipped}
    return replace(new, step=state.step + 1), metrics
