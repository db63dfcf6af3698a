"""Where a run starts from: one rule in three cases, and the log says which."""

import logging
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from solov2_jax import distributed, storage
from solov2_jax.checkpoint import list_steps, move_aside, restore_parts
from solov2_jax.io import InputError, write_json
from solov2_jax.pretrained import read_folder
from solov2_jax.training.build import Task
from solov2_jax.training.step import TrainState
from solov2_jax.weights import convert
from solov2_jax.weights.backbones import suggest_weights
from solov2_jax.weights.hub import is_remote, local_path, open_weights
from solov2_jax.weights.settings import check_settings
from solov2_jax.weights.sources import Weights

log = logging.getLogger("solov2_jax")

PyTree = Any

# Source of the figures: He, Girshick, Dollar, "Rethinking ImageNet Pre-training", 2019.
RANDOM_COST = (
    "init_from is empty: from random weights a detector needs several times the epochs (about 6 "
    "times on COCO's 118,000 images), and with few images it stays far behind (of 1,000 of "
    "COCO's: AP 3.5, from pretrained weights 9.9); give %s"
)


@dataclass(frozen=True)
class Start:
    """The state to start from, and what is to be written down about it."""

    state: TrainState
    position: dict[str, Any]  # of the data, and of the metrics' window
    unreadable: Sequence[int] = ()  # newer checkpoints that could not be read
    report: convert.Report | None = None  # which weights of `init_from` went where

    def record(self, workdir: pathlib.Path) -> None:
        """Moves unreadable checkpoints aside and writes init_from.json."""
        if not distributed.is_primary():
            return
        for step in self.unreadable:
            move_aside(workdir, step)
        if self.report is not None:
            write_json(self.report.to_dict(), workdir / "init_from.json")


def restore(config: Any, workdir: pathlib.Path, task: Task, mesh: Mesh) -> Start:
    """Returns where to start from; writes nothing.

    1. The workdir has checkpoints: resume from the newest readable one.
    2. `init_from` is set: its weights, at step 0.
    3. Otherwise: random weights, at step 0.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    ema = config.optim.ema_decay > 0
    shapes = jax.eval_shape(lambda k: state_of(task.init(k), task.tx, ema=ema), key)
    if distributed.broadcast_from_host0(lambda: list_steps(workdir)):
        restored = restore_parts(workdir, abstract(shapes, mesh).parts())
        assert restored is not None
        check_position(restored.position, task, workdir)
        log.info("start: resumed %s at step %d", workdir, restored.step)
        state = TrainState.from_parts(restored.parts)
        return Start(state, restored.position, restored.unreadable)
    position = {"window": []}
    if config.init_from:

        def init(names: Sequence[str]) -> dict[str, jax.Array]:
            # Only these are drawn: the file's leaves need no random generator.
            def leaves(key: jax.Array) -> dict[str, jax.Array]:
                flat: dict[str, Any] = {**flatten_dict(task.init(key), sep="/")}
                return {name: flat[name] for name in names}

            return draw(leaves, key, mesh)

        variables, report = initial_weights(config, shapes.variables, init)
        build = jax.jit(
            lambda v: state_of(v, task.tx, ema=ema), out_shardings=distributed.replicated(mesh)
        )
        state = build(distributed.copy_to_all(variables, mesh))
        log.info("start: weights of %s, step 0", config.init_from)
        return Start(state, position, report=report)
    state = create_state(task.init, task.tx, key, mesh, ema=ema)
    log.info("start: random weights (seed %d), step 0", config.seed)
    if config.data.name not in config.data.providers:
        log.warning(RANDOM_COST, suggest_weights(config.model.backbone))
    return Start(state, position)


def initial_weights(
    config: Any, shapes: dict[str, PyTree], init: Callable[[Sequence[str]], dict[str, jax.Array]]
) -> tuple[dict[str, PyTree], convert.Report]:
    """Returns (variables with those of `init_from` put in, report of what went where).

    Args:
      shapes: of the variables.
      init: names of leaves -> those leaves as training starts with them; for what the
        file lacks.

    Raises ValueError if the config contradicts what the weights were trained with.
    """
    weights = read_init(config.init_from)
    check_settings(weights.settings, config, weights.path, config.init_from_ignores)
    frozen = config.model.backbone.freeze_at
    if config.data.channels != 3 and frozen:
        log.warning(
            "model.backbone.freeze_at = %d keeps the stem as it is, which RGB pictures made; "
            "--config.model.backbone.freeze_at=0 trains it on data.channels = %d",
            frozen,
            config.data.channels,
        )
    return convert.fit(weights, shapes, init=init)


def read_init(init_from: str) -> Weights:
    """Returns the weights of a file, of another run's workdir or of a name, see `weights.hub`.

    Raises:
      InputError: if there is none of them.
    """
    if not is_remote(init_from):
        source = storage.local_copy(local_path(init_from))
        if source.is_dir():
            return read_folder(source)
        if not source.is_file():
            raise InputError(
                f"init_from = {init_from!r}: no such file or folder; give a weights file, another "
                "run's workdir, a name such as timm/resnet50.a1_in1k or hf:USER/REPO, an https "
                "address, or '' for random weights"
            )
    return open_weights(init_from)


def check_position(position: dict[str, Any], task: Task, workdir: str | pathlib.Path) -> None:
    """Raises if the training data is not what the run was started with."""
    if position.get("data") != task.fingerprint:
        raise InputError(
            f"{workdir} was trained on other data: the images or annotations of "
            "data.train differ from those of its first start. Restore them, or give "
            f"another --workdir (with --config.init_from={workdir} to start from its "
            "weights)"
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
    build = jax.jit(init_fn, out_shardings=distributed.replicated(mesh), compiler_options=options)
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
    copied = distributed.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copied), state)
