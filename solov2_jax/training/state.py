"""What a step changes and a checkpoint holds: arrays only, no functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from solov2_jax.training import sharding

PyTree = Any


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


def create_state(
    init_fn: Callable[[jax.Array], dict[str, PyTree]],
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state at step 0, made on the mesh by one program.

    Args:
      init_fn: key -> {"params": ..., other collections}.
      ema: whether it holds a moving average.
    """
    return draw(lambda key: state_of(init_fn(key), tx, ema=ema), key, mesh)


def draw(init_fn: Callable[[jax.Array], PyTree], key: jax.Array, mesh: Mesh) -> PyTree:
    """Returns init_fn(key) on the mesh, by one program that runs once."""
    # Dozens of random generators: on a CPU, optimising them costs three times what it
    # saves.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    build = jax.jit(init_fn, out_shardings=sharding.replicated(mesh), compiler_options=options)
    return build(key)


def state_of(
    variables: dict[str, PyTree], tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Returns the state at step 0 of given variables."""
    assert "transformed" not in variables, "kernels transformed for prediction do not train"
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state={name: tree for name, tree in variables.items() if name != "params"},
        opt_state=tx.init(params),
        # A copy: the state is donated, and no array can be donated twice.
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
    )


def abstract(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns shapes, types and shardings of a state on a mesh."""
    copied = sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copied), state)


@jax.jit
def _leaves_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in leaves]


def first_nonfinite(tree: PyTree) -> str:
    """Returns the name of the first leaf with a NaN or infinity, "" if all are finite.

    A device looks, at its own copy; one bool per leaf comes back.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Copies of this process alone: the others may not be at this step.
    copies = [x.addressable_data(0) if isinstance(x, jax.Array) else x for _, x in leaves]
    finite = jax.device_get(_leaves_finite(copies))
    bad = [path for (path, _), good in zip(leaves, finite, strict=True) if not good]
    return jax.tree_util.keystr(bad[0], simple=True, separator="/") if bad else ""
