"""The train step: the state of a run, and the compiled function that changes it.

`TrainStep._update` is the whole update, from the gradient to the moving average. Device
layout is named here, never in models or losses.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from solov2_jax import distributed
from solov2_jax.platforms import PlatformOp
from solov2_jax.progress import working
from solov2_jax.training.loss import Loss, Metrics

PyTree = Any

log = logging.getLogger("solov2_jax")


@struct.dataclass
class TrainState:
    """The state of a run after `step` steps."""

    step: Any  # int32 scalar: an array, or its shape or sharding in a tree of those
    params: PyTree
    model_state: PyTree  # the model's other collections: {"batch_stats": ...} or {}
    opt_state: PyTree
    ema: PyTree = None  # exponential moving average of `variables`; None: there is none

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes."""
        return {"params": self.params, **self.model_state}

    def parts(self) -> dict[str, PyTree]:
        """Returns the state as the named parts of a checkpoint."""
        parts = {
            "variables": self.variables,
            "optimizer": {"step": self.step, "opt_state": self.opt_state},
        }
        return parts if self.ema is None else {**parts, "ema": self.ema}

    @classmethod
    def from_parts(cls, parts: Mapping[str, PyTree]) -> "TrainState":
        """Returns the state that a checkpoint's parts hold."""
        variables, optimizer = parts["variables"], parts["optimizer"]
        return cls(
            step=optimizer["step"],
            params=variables["params"],
            model_state={k: v for k, v in variables.items() if k != "params"},
            opt_state=optimizer["opt_state"],
            ema=parts.get("ema"),
        )


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
        order of additions depends on it, and what the devices send does not.
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
        self._ahead: dict[tuple, Future] = {}
        self._loss, self._tx, self._trainable = loss, tx, trainable
        self._accumulate, self._ema_decay, self._mesh = accumulate, ema_decay, mesh
        copied, by_batch = distributed.replicated(mesh), distributed.split_by_batch(mesh)
        # An argument: as constants, each seed would be another program to compile, and a
        # teacher's weights would be a part of it.
        self._inputs = distributed.copy_to_all((key, loss.constants), mesh)
        self._step = jax.jit(
            jax.default_matmul_precision(loss.matmul_precision)(self._update),
            in_shardings=(copied, by_batch, copied),
            out_shardings=(copied, copied),
            donate_argnums=0,
        )

    def _update(self, state: TrainState, batch: PyTree, inputs: tuple[jax.Array, PyTree]):
        """Returns (state after one step, metrics) of a global batch; this is compiled.

        A step whose loss or gradient is not finite changes `step` only, and its metric
        `skipped` is 1; the devices decide that, the host does not wait.
        """
        self.compiles += 1  # runs when traced, not when executed
        # Of the whole batch: the targets, and what the losses' sums are divided by.
        key, constants = inputs
        key = jax.random.fold_in(key, state.step)
        targets, normalizers = self._loss.assign(batch, key, state.step)
        params = state.params
        of_rows = jax.shard_map(
            self._accumulate_gradients,
            mesh=self._mesh,
            in_specs=(P(), P(), P("data"), P("data"), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
        value, metrics, grads, model_state = of_rows(
            params, state.model_state, batch, targets, normalizers, constants
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        new = _update_if(finite, state, grads, model_state, tx=self._tx, ema_decay=self._ema_decay)
        skipped = 1.0 - finite.astype(jnp.float32)
        metrics = {**metrics, "loss": value, "grad_norm": norm, "skipped": skipped}
        return replace(new, step=state.step + 1), metrics

    def _accumulate_gradients(
        self,
        params: PyTree,
        model_state: PyTree,
        batch: PyTree,
        targets: PyTree,
        normalizers: PyTree,
        constants: PyTree,
    ) -> tuple[jax.Array, Metrics, PyTree, PyTree]:
        """Returns (loss, metrics, gradients, model state after it), summed over the microbatches
        and the devices.

        Runs on each device with its own rows. What crosses the devices is one sum of each
        gradient, in the parameters' float32 and after the last microbatch, besides the
        statistics of trained batch norms.
        """

        def loss_of(params, model_state, batch, targets):
            params = _freeze(params, self._trainable)
            return self._loss.compute(params, model_state, batch, targets, normalizers, constants)

        gradient = jax.value_and_grad(loss_of, has_aux=True)

        def add(carry, microbatch):
            sums, model_state = carry
            (value, (metrics, model_state)), grads = gradient(params, model_state, *microbatch)
            return (jax.tree.map(jnp.add, sums, (value, metrics, grads)), model_state), None

        if self._accumulate == 1:
            (value, (metrics, model_state)), grads = gradient(params, model_state, batch, targets)
        else:
            microbatches = jax.tree.map(self._split, (batch, targets))
            first = jax.tree.map(lambda x: x[0], microbatches)
            (value, (metrics, _)), grads = jax.eval_shape(gradient, params, model_state, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, metrics, grads))
            carry, _ = jax.lax.scan(add, (zeros, model_state), microbatches)
            (value, metrics, grads), model_state = carry
        if self._mesh.size > 1:  # the CPU's compiler would keep a sum over one device
            value, metrics = jax.lax.psum((value, metrics), "data")
            add_up = lambda x, train: jax.lax.psum(x, "data") if train else x  # noqa: E731
            grads = jax.tree.map(add_up, grads, self._trainable)
        return value, metrics, grads, model_state

    def _split(self, x: jax.Array) -> jax.Array:
        """Returns a device's rows as [microbatches, rows / microbatches, ...]."""
        return jnp.moveaxis(x.reshape(-1, self._accumulate, *x.shape[1:]), 1, 0)

    def compile_ahead(self, state: TrainState, batches: Iterable[PyTree]) -> None:
        """Compiles for batches of several shapes side by side, and waits for none of them.

        Args:
          state: the one that the next step gets.
          batches: `jax.ShapeDtypeStruct`s with the shardings of the batches to come.
        """
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile_step")
        for batch in batches:
            if (shapes := _shapes_of(batch)) not in self._ahead.keys() | self._shapes:
                log.info("compiling the train step for arrays of %s ...", _largest(shapes))
                self._ahead[shapes] = pool.submit(self._compile, state, batch)
        pool.shutdown(wait=False)

    def _compile(self, state: PyTree, batch: PyTree) -> jax.stages.Compiled:
        start = time.perf_counter()
        program = self.lower(state, batch).compile()
        seconds = time.perf_counter() - start
        log.info("compiled for %s in %.1f s", _largest(_shapes_of(batch)), seconds)
        return program

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Returns the state after one step, and the step's metrics, on the devices."""
        shapes = _shapes_of(batch)
        self.compile_seconds, start = 0.0, time.perf_counter()
        if program := self._ahead.get(shapes):
            waits = not program.done()
            with working("compiling the train step") if waits else contextlib.nullcontext():
                step = program.result()
            self.compile_seconds = time.perf_counter() - start if waits else 0.0
            return step(state, batch, self._inputs)
        known, before = shapes in self._shapes, self.compiles
        if not known:
            log.info("compiling the train step for arrays of %s ...", _largest(shapes))
        with contextlib.nullcontext() if known else working("compiling the train step"):
            result = self._step(state, batch, self._inputs)
        if self.compiles > before:
            self.compile_seconds = time.perf_counter() - start
            log.info("compiled for %s in %.1f s", _largest(shapes), self.compile_seconds)
            if known:
                self.recompiles += 1
                log.warning("recompiled for a shape seen before: %s", _largest(shapes))
        self._shapes.add(shapes)
        return result

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """Returns the step before its compilation, for arrays or for their shapes."""
        return self._step.lower(state, batch, self._inputs)


def _shapes_of(batch: PyTree) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))


def _largest(shapes: tuple[tuple[tuple[int, ...], str], ...]) -> str:
    """Returns the shape with most axes, the images', as text."""
    return "x".join(map(str, max((shape for shape, _ in shapes), key=len)))


def _updated(
    state: TrainState,
    grads: PyTree,
    model_state: PyTree,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Returns the state after the optimiser's step and the moving average's."""
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    new = replace(state, params=params, model_state=model_state, opt_state=opt_state)
    with jax.named_scope("ema"):
        return replace(new, ema=update_ema(state, new.variables, ema_decay))


def _update_in_branch(
    finite: jax.Array,
    state: TrainState,
    grads: PyTree,
    model_state: PyTree,
    *,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Returns the updated state, or, where `finite` is False, the state as it is."""
    # A branch: selecting each number would read and write the state once more.
    return jax.lax.cond(
        finite, lambda: _updated(state, grads, model_state, tx, ema_decay), lambda: state
    )


def _update_by_selecting(
    finite: jax.Array,
    state: TrainState,
    grads: PyTree,
    model_state: PyTree,
    *,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Returns the same without a branch, for which a GPU's host waits."""
    new = _updated(state, grads, model_state, tx, ema_decay)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)


_update_if = PlatformOp("update_if", cpu=_update_in_branch, other=_update_by_selecting)


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
    """Returns the parameters; no gradient is computed of what `optim.trainable_mask` freezes."""
    stop = jax.lax.stop_gradient
    return jax.tree.map(lambda x, train: x if train else stop(x), params, trainable)
