"""The loss and its gradient: of a batch at once, or summed up over parts of it."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
