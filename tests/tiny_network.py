"""The smallest network, as a config file, a weights file and a workdir of a run."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from solov2_jax.checkpoint import CheckpointManager
from solov2_jax.config import save_config
from solov2_jax.models import build_model
from solov2_jax.training.step import TrainState
from solov2_jax.weights.convert import save_weights
from solov2_jax.weights.settings import settings_of_shapes

NAMES, IDS = ("cat", "dog"), (5, 20)


def tiny_config() -> Any:
    """Returns a config whose network and images are small."""
    config = base.get_config()
    config.model.num_classes = len(NAMES)
    config.model.backbone.depth = 18
    config.model.fpn.channels = 32
    config.model.ins_head.num_convs = 1
    config.model.ins_head.channels = 32
    config.model.ins_head.num_kernels = 32
    config.model.ins_head.num_grids = (6, 5, 4, 3, 2)
    config.model.mask_head.channels = 32
    config.input.min_size_test = 48
    config.input.max_size_test = 64
    config.test.nms_pre = 20
    config.test.max_per_image = 10
    config.test.max_candidates = 64
    config.data.num_workers = 0
    return config


def tiny_variables(config: Any, seed: int = 0) -> dict[str, Any]:
    """Returns random variables that detect something: every score is about a half."""
    model = build_model(config, len(NAMES))
    image = jax.ShapeDtypeStruct((1, 64, 64, config.data.channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if name != "kernel":
            return np.zeros(leaf.shape, np.float32)
        noise = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(noise - noise.mean(tuple(range(leaf.ndim - 1)), keepdims=True))

    return jax.tree_util.tree_map_with_path(values, shapes)


def write_weights(folder: Path, config: Any, seed: int = 0, names: tuple[str, ...] = NAMES) -> str:
    """Writes a weights file that knows its class names, unless (); returns its path."""
    variables = tiny_variables(config, seed)
    flat = jax.tree_util.tree_leaves_with_path(variables)
    arrays = {"/".join(k.key for k in path): leaf for path, leaf in flat}
    settings = settings_of_shapes(arrays) | ({"class_names": list(names)} if names else {})
    path = str(folder / "tiny.safetensors")
    save_weights(path, arrays, settings)
    return path


def write_workdir(folder: Path, config: Any, steps: tuple[int, ...] = (3,)) -> str:
    """Writes a run's folder with a checkpoint for each step, each of other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.json")
    classes = {"names": list(NAMES), "ids": list(IDS)}
    (folder / "classes.json").write_text(json.dumps(classes))
    checkpoints = CheckpointManager(folder, keep=len(steps))
    for step in steps:
        variables = jax.tree.map(jnp.asarray, tiny_variables(config, seed=step))
        state = TrainState(
            step=jnp.asarray(step),
            params=variables["params"],
            model_state={n: v for n, v in variables.items() if n != "params"},
            opt_state=optax.EmptyState(),
        )
        checkpoints.save(step, state.parts(), {"next_step": step})
    checkpoints.close()
    return str(folder)
