"""The loss and its gradient: of a batch at once, or summed up over parts of it.

The compiled train step. Device layout is named here, never in models or losses."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solov2_jax.training import sharding
from solov2_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, Metrics]]


@runtime_checkable
class Objective(Protocol):
    """A loss whose sums over parts of a batch's images give the whole batch's.

    Everything that needs the whole batch and no parameters (targets, what a sum is
    divided by) is in `prepare`; the losses and metrics of `part` are then additive.
    """

    def prepare(self, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns (arrays with a row for each image, totals of the batch)."""
        ...

    def part(
        self, params: PyTree, model_state: PyTree, rows: PyTree, totals: PyTree
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        """Returns (loss, (metrics, model state after it)) of some of the rows."""
        ...


class Whole:
    """The objective of a plain function (params, model_state, batch, key) -> loss."""

    def __init__(self, loss_fn: LossFn):
        self._loss_fn = loss_fn

    def prepare(self, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return batch, key

    def part(self, params, model_state, rows, totals):
        loss, metrics = self._loss_fn(params, model_state, rows, totals)
        return loss, (metrics, model_state)


def as_objective(loss: LossFn | Objective, parts: int) -> Objective:
    """Returns `loss` as an objective that a batch can be split for.

    Raises:
      ValueError: for a plain function and more than one part.
    """
    if isinstance(loss, Objective):
        return loss
    if parts > 1:
        raise ValueError(
            f"train.accumulate = {parts}: this loss cannot be summed up over parts of "
            "a batch; set it to 1"
        )
    return Whole(loss)


def loss_and_gradient(
    objective: Objective,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    trainable: PyTree,
    parts: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, Metrics, PyTree, PyTree]:
    """Returns (loss, metrics, model state, gradient) of the whole batch.

    Args:
      trainable: tree of bools; where it is False the gradient is 0.
      parts: the batch's images are seen in so many parts, one after the other; 1: all
        at once. Only the order of additions depends on it.
    """
    rows, totals = objective.prepare(batch, key)

    def loss_of(params, model_state, rows):
        # Stopped here, so that no gradient of a frozen stage is ever computed.
        params = jax.tree.map(
            lambda x, train: x if train else jax.lax.stop_gradient(x), params, trainable
        )
        return objective.part(params, model_state, rows, totals)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        (loss, (metrics, state)), grads = gradient(params, model_state, rows)
        return loss, metrics, state, grads

    def add(carry, rows):
        sums, state = carry
        (loss, (metrics, state)), grads = gradient(params, state, rows)
        return (jax.tree.map(jnp.add, sums, (loss, metrics, grads)), state), None

    rows = jax.tree.map(lambda x: _split(x, parts, mesh), rows)
    first = jax.tree.map(lambda x: x[0], rows)
    (loss, (metrics, _)), grads = jax.eval_shape(gradient, params, model_state, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, grads))
    (sums, state), _ = jax.lax.scan(add, (zeros, model_state), rows)
    loss, metrics, grads = sums
    return loss, metrics, state, grads


def _split(x: jax.Array, parts: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns [parts, B / parts, ...]; each device keeps the rows that it has."""
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "data")))


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
            state, norm, skipped = _update(state, loss, model_state, grads, tx, ema_decay)
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
        new = replace(state, params=params, opt_state=opt_state, model_state=model_state)
        return replace(new, average=update_ema(state, new.variables, ema_decay))

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A branch: selecting each number would read and write the state once more.
    new = jax.lax.cond(finite, updated, lambda: state)
    return replace(new, step=state.step + 1), norm, 1.0 - finite.astype(jnp.float32)


def update_ema(state: TrainState, variables: PyTree, decay: float) -> PyTree:
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
