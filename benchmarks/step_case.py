"""A train step with everything it needs, made from a config alone: no data set."""

import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import jax_side  # noqa: F401  puts the repository on the path
import numpy as np
from jax.sharding import Mesh

from solov2_jax.models import build_model
from solov2_jax.training import sharding
from solov2_jax.training.build import build_loss, build_optimizer
from solov2_jax.training.optim import trainable_mask
from solov2_jax.training.state import TrainState, abstract, create_state, state_of
from solov2_jax.training.step import TrainStep

NUM_CLASSES = 80  # where the config counts them from annotations
OBJECTS = 10  # per image

PyTree = Any


class StepCase:
    """The train step of a config on a mesh, as `training.loop` makes it.

    Attributes:
      params: shapes of the parameters.
      trainable: a tree of bools like them.
      step: the `TrainStep`.
      key: its third argument, where it is compiled ahead (`step.lower`).
    """

    def __init__(self, config: Any, devices: int | Mesh = 1):
        with config.unlocked():
            config.model.num_classes = config.model.num_classes or NUM_CLASSES
        known = isinstance(devices, Mesh)
        self.config = config
        self.mesh = devices if known else sharding.make_mesh(devices)
        self.model = build_model(config, config.model.num_classes)
        self.params = jax.eval_shape(self._init, jax.random.key(0))["params"]
        backbone = config.model.backbone
        self.trainable = trainable_mask(self.params, backbone.freeze_at, backbone.norm)
        _, self._tx = build_optimizer(config, self.trainable)
        self.key = jax.device_put(jax.random.key(1), sharding.replicated(self.mesh))
        loss_fn = build_loss(config, self.model)
        self.step = TrainStep(loss_fn, self._tx, self.mesh, self.key, self.trainable)

    def _init(self, key: jax.Array) -> dict[str, PyTree]:
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return dict(self.model.lazy_init(key, image))

    def state(self) -> TrainState:
        """Returns the state at step 0, random weights."""
        return create_state(self._init, self._tx, jax.random.key(0), self.mesh)

    def state_of(self, variables: PyTree) -> TrainState:
        """Returns the state at step 0 of given variables."""
        copied = sharding.replicated(self.mesh)
        build = jax.jit(lambda v: state_of(v, self._tx), out_shardings=copied)
        return build(jax.device_put(variables, copied))

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes: enough to compile for."""
        shapes = jax.eval_shape(lambda key: state_of(self._init(key), self._tx), jax.random.key(0))
        return abstract(shapes, self.mesh)

    def put(self, batch: dict[str, np.ndarray]) -> PyTree:
        """Returns a batch on the devices."""
        return sharding.put_batch(batch, self.mesh)


def make_batch(
    batch: int, h: int, w: int, num_classes: int, objects: int = OBJECTS
) -> dict[str, np.ndarray]:
    """Returns noise with boxes between a tenth and half of the image's size."""
    rng = np.random.default_rng(0)
    side = rng.uniform(0.1, 0.5, (batch, objects, 2)) * (w, h)
    corner = rng.uniform(0, 1, side.shape) * ((w, h) - side)
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    y, x = np.mgrid[2:h:4, 2:w:4]
    x0, y0, x1, y1 = (boxes[..., i, None, None] for i in range(4))
    return {
        "image": rng.integers(0, 255, (batch, h, w, 3), dtype=np.uint8),
        "image_size": np.full((batch, 2), (h, w), np.int32),
        "boxes": boxes,
        "labels": rng.integers(0, num_classes, (batch, objects)).astype(np.int32),
        "centers": (boxes[..., :2] + boxes[..., 2:]) / 2,
        "masks": ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).astype(np.uint8),
        "valid": np.ones((batch, objects), bool),
        "image_id": np.arange(batch, dtype=np.int32),
    }


def noise_variables(model: Any, candidates: int = 100) -> PyTree:
    """Returns random weights with about so many candidates in a picture.

    Filters without a mean keep the features' spread; the class logits' spread is then
    0.7, and their bias decides how many are above the usual threshold of 0.1.
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)
    pairs = model.num_classes * sum(g * g for g in model.num_grids)
    share = min(candidates / pairs, 0.5)
    bias = math.log(0.1 / 0.9) - 0.7 * NormalDist().inv_cdf(1 - share)

    def values(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if name != "kernel":
            is_class = path[-2].key == "cate_pred"
            return np.full(leaf.shape, bias if is_class else 0.0, np.float32)
        noise = rng.standard_normal(leaf.shape, np.float32)
        noise -= noise.mean((0, 1, 2), keepdims=True)
        return noise / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(values, shapes)


def train_flops(config: Any, height: int, width: int) -> dict[str, float]:
    """Returns FLOPs of the convolutions for one image: forward, and a whole step.

    A layer that is trained costs three times its forward pass (its output, its
    filter's gradient, its input's gradient); a frozen one is not gone back through.
    """
    from solov2_jax.tools.summary import summarize

    model = build_model(config, config.model.num_classes or NUM_CLASSES)
    rows = summarize(model, height, width, config.model.backbone.freeze_at)
    paths = {row.path for row in rows}
    inner = {path[:i] for path in paths for i in range(len(path))}
    leaves = [row for row in rows if row.path not in inner]
    forward = sum(row.flops for row in leaves)
    trained = sum(row.flops for row in leaves if row.trainable)
    return {"forward": forward, "step": forward + 2 * trained}
