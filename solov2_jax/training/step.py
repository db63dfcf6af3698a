"""The train step, from the gradient to the moving average, in one compiled function.

Device layout is named here, never in models or losses.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solov2_jax.training import sharding
from solov2_jax.training.loss import Loss, Metrics
from solov2_jax.training.state import TrainState

PyTree = Any

log = logging.getLogger("solov2_jax")


def make_update(
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    trainable: PyTree,
    accumulate: int,
    ema_decay: float,
) -> Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]:
    """Returns update(state, batch, key) -> (state after one step, metrics).

    It sees the global batch: the compiler places the all-reduce. A step whose loss or
    gradient is not finite changes `step` only, and its metric `skipped` is 1; the devices
    decide that, the host does not wait. The arguments are those of `TrainStep`.
    """

    def update(state: TrainState, batch: PyTree, key: jax.Array) -> tuple[TrainState, Metrics]:
        # Of the whole batch: the targets, and what the losses' sums are divided by.
        targets, normalizers = loss.assign(batch, jax.random.fold_in(key, state.step))

        def loss_of(params, model_state, batch, targets):
            params = _freeze(params, trainable)
            return loss.compute(params, model_state, batch, targets, normalizers)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        params, model_state = state.params, state.model_state
        if accumulate == 1:
            (value, (metrics, model_state)), grads = gradient(params, model_state, batch, targets)
        else:

            def add(carry, microbatch):
                sums, model_state = carry
                (value, (metrics, model_state)), grads = gradient(params, model_state, *microbatch)
                return (jax.tree.map(jnp.add, sums, (value, metrics, grads)), model_state), None

            microbatches = jax.tree.map(lambda x: _split(x, accumulate, mesh), (batch, targets))
            first = jax.tree.map(lambda x: x[0], microbatches)
            (value, (metrics, _)), grads = jax.eval_shape(gradient, params, model_state, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, metrics, grads))
            carry, _ = jax.lax.scan(add, (zeros, model_state), microbatches)
            (value, metrics, grads), model_state = carry

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def updated() -> TrainState:
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, state.opt_state, params)
                new = replace(state, model_state=model_state, opt_state=opt_state)
                new = replace(new, params=optax.apply_updates(params, updates))
            with jax.named_scope("ema"):
                return replace(new, ema=update_ema(state, new.variables, ema_decay))

        # A branch: selecting each number would read and write the state once more.
        new = jax.lax.cond(finite, updated, lambda: state)
        skipped = 1.0 - finite.astype(jnp.float32)
        metrics = {**metrics, "loss": value, "grad_norm": norm, "skipped": skipped}
        return replace(new, step=state.step + 1), metrics

    return update


def update_ema(state: TrainState, variables: PyTree, decay: float) -> PyTree:
    """Returns the state's moving average after a step to `variables`, None without.

    At step t the decay is at most (1 + t) / (10 + t), so that the first steps, whose
    weights are far from the last ones, are soon forgotten.

    Source: tensorflow/python/training/moving_averages.py, ExponentialMovingAverage.
    """
    if state.ema is None:
        return None
    warm = (1.0 + state.step) / (10.0 + state.step)
    rate = 1.0 - jnp.minimum(decay, warm)
    # In this form what does not change keeps its bits.
    return jax.tree.map(lambda a, x: a + rate * (x - a), state.ema, variables)


def _freeze(params: PyTree, trainable: PyTree) -> PyTree:
    """Returns the parameters; no gradient of a frozen stage is ever computed."""
    stop = jax.lax.stop_gradient
    return jax.tree.map(lambda x, train: x if train else stop(x), params, trainable)


def _split(x: jax.Array, microbatches: int, mesh: Mesh) -> jax.Array:
    """Returns [microbatches, B / microbatches, ...]; each device keeps its own rows."""
    x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "data")))


class TrainStep:
    """step(state, batch) -> (state, metrics), compiled once for each batch shape.

    The state is donated: the one passed in must not be used again.

    Args:
      loss: what is minimised.
      tx: the optimiser.
      mesh: of the devices that share the batch.
      key: of the steps' random numbers; each step folds its own number in.
      trainable: tree of bools; where it is False the gradient is 0.
      accumulate: microbatches that a batch is computed in, one after the other; only the
        order of additions depends on it.
      ema_decay: of the moving average, where the state holds one.

    Attributes:
      compiles: compilations so far.
      recompiles: those of a shape that had been compiled before; anything but 0 is a
        defect, which is why it is counted and logged.
      compile_seconds: what the latest call spent on compiling, 0 mostly.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        key: jax.Array,
        trainable: PyTree,
        accumulate: int = 1,
        ema_decay: float = 0.0,
    ):
        self.compiles = self.recompiles = 0
        self.compile_seconds = 0.0
        self._shapes: set[tuple] = set()
        update = make_update(
            loss=loss,
            tx=tx,
            mesh=mesh,
            trainable=trainable,
            accumulate=accumulate,
            ema_decay=ema_decay,
        )

        def step(state: TrainState, batch: PyTree, key: jax.Array):
            self.compiles += 1  # runs when traced, not when executed
            return update(state, batch, key)

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
