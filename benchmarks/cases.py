"""What programs are given: weights, images and objects; a train step of a config.

Weights are the ones of the tests (`tests/golden_weights.py`): random, but scaled so
that a picture has some hundred candidates. They are written under the names that each
side reads, from one set of arrays. Pictures are made here, unless a file is given.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from harness import ROOT
from jax.sharding import Mesh

from solov2_jax import distributed
from solov2_jax.config import load_config, save_config
from solov2_jax.data.images import read_image
from solov2_jax.data.transforms import resize_image
from solov2_jax.models import build_model
from solov2_jax.tools.summary import summarize
from solov2_jax.training import memory
from solov2_jax.training.build import build_trainable
from solov2_jax.weights import names, tables
from tests.golden_weights import golden_weight
from tests.plain_masks import plain_center, plain_stride4

CACHE = ROOT / ".cache" / "benchmarks"
NUM_CLASSES = 80  # where the config counts them from annotations
# Of the class logits' filters, by depth: some hundred candidates with 80 classes.
CATE_GAIN = {18: 0.85, 34: 0.85, 50: 0.87, 101: 0.87, 152: 0.87}
OBJECTS = 10  # per image, where it is trained on
PyTree = Any


def read_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Returns a config of this repository with a number of classes."""
    config = load_config(str(ROOT / path), list(overrides))
    with config.unlocked():
        config.model.num_classes = config.model.num_classes or NUM_CLASSES
    return config


def write_case(folder: Path, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes config, weights' paths and arrays into a folder."""
    save_config(config, folder / "config.json")
    (folder / "weights.json").write_text(json.dumps(write_weights(config)))
    np.savez(folder / "arrays.npz", **arrays)


def variable_shapes(model: Any) -> PyTree:
    """Returns the shapes of a network's variables."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def write_weights(config: Any) -> dict[str, str]:
    """Returns {"adelaidet": file, "mmdet": file} of the same weights under two names.

    Kept in the cache folder: they depend on the shapes only.
    """
    shapes = variable_shapes(build_model(config, config.model.num_classes))
    empty = {
        "/".join(path): np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in flatten_dict(shapes).items()
    }
    depth = config.model.backbone.depth
    last, gain = "conv2" if depth < 50 else "conv3", CATE_GAIN[depth]
    zeros = tables.to_adelaidet(empty)
    key = "-".join(map(str, (depth, gain, sum(v.size for v in zeros.values()))))
    paths = {n: CACHE / "weights" / f"{key}-{n}.npz" for n in ("adelaidet", "mmdet")}
    if not all(path.is_file() for path in paths.values()):
        paths["adelaidet"].parent.mkdir(parents=True, exist_ok=True)
        state = {
            k: golden_weight(k, v.shape, last, gain).astype(np.float32) for k, v in zeros.items()
        }
        np.savez(paths["adelaidet"], **state)
        np.savez(paths["mmdet"], **tables.to_mmdet(names.from_names(tables.ADELAIDET, state)[0]))
    return {name: str(path) for name, path in paths.items()}


def make_images(size: tuple[int, int], batch: int, path: str | None = None) -> np.ndarray:
    """Returns uint8 [B, H, W, 3], RGB: the given picture, or blocks of several scales.

    The others of a batch are the first one, mirrored or turned.
    """
    h, w = size
    if path:
        image = resize_image(read_image(path), h, w)
    else:
        rng, image = np.random.default_rng(0), np.zeros((h, w, 3))
        for block, strength in ((256, 85), (128, 85), (32, 85)):
            noise = rng.uniform(0, strength, (-(-h // block), -(-w // block), 3))
            image += np.kron(noise, np.ones((block, block, 1)))[:h, :w]
        image = image.astype(np.uint8)
    turned = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    return np.stack([turned[i % 4] for i in range(batch)])


def make_batch(
    config: Any, size: tuple[int, int], batch: int, path: str | None = None
) -> dict[str, np.ndarray]:
    """Returns a `Batch`'s fields, padded to multiples of 32, without objects."""
    images = make_images(size, batch, path)
    if config.input.channel_order == "BGR":
        images = images[..., ::-1]
    pad = [(0, -side % 32) for side in size]
    return {
        "image": np.pad(images, [(0, 0), *pad, (0, 0)]),
        "image_size": np.full((batch, 2), size, np.int32),
        "image_id": np.arange(batch, dtype=np.int32),
    }


def make_objects(config: Any, size: tuple[int, int], batch: int) -> dict[str, np.ndarray]:
    """Returns ellipses as the other fields of a `Batch`, and as `full_masks`."""
    h, w = size
    rng = np.random.default_rng(0)
    shape = (batch, OBJECTS)
    side = rng.uniform(0.1, 0.5, (*shape, 2)) * (w, h)
    corner = rng.uniform(0, 1, side.shape) * ((w, h) - side)
    full = np.zeros((*shape, h, w), np.uint8)
    small = np.zeros((*shape, (h + -h % 32) // 4, (w + -w % 32) // 4), np.uint8)
    centers = np.zeros((*shape, 2), np.float32)
    y, x = np.mgrid[:h, :w]
    for i in np.ndindex(shape):
        (cx, cy), (rx, ry) = corner[i] + side[i] / 2, side[i] / 2
        full[i] = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        scaled, centers[i] = plain_stride4(full[i]), plain_center(full[i])
        small[i][: scaled.shape[0], : scaled.shape[1]] = scaled
    return {
        "boxes": np.concatenate([corner, corner + side], -1).astype(np.float32),
        "labels": rng.integers(0, config.model.num_classes, shape).astype(np.int32),
        "centers": centers,
        "full_masks": full,
        "masks": small,
        "valid": np.ones(shape, bool),
    }


def make_train_batch(config: Any, size: tuple[int, int], batch: int) -> dict[str, np.ndarray]:
    """Returns a `Batch`'s fields."""
    fields = make_batch(config, size, batch) | make_objects(config, size, batch)
    del fields["full_masks"]
    return fields


def build_step(
    config: Any, mesh: Mesh | None = None, accumulate: int = 1
) -> tuple[Any, PyTree, Mesh]:
    """Returns (train step, shapes of its state, mesh), as a training has them."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.batch_size, config.train.accumulate = 0, accumulate  # 0: every mesh divides it
    return memory.build_step(config, mesh or distributed.make_mesh(1))


def gradient_bytes(path: str) -> dict[str, int]:
    """Returns number and float32 bytes of the trained parameters of a config."""
    config = read_config(path)
    params = variable_shapes(build_model(config, config.model.num_classes))["params"]
    flags = jax.tree.leaves(build_trainable(config, params))
    trained = [x.size for x, flag in zip(jax.tree.leaves(params), flags, strict=True) if flag]
    return {"arrays": len(trained), "bytes": 4 * sum(trained)}


def start_state(shapes: PyTree, variables: PyTree = None) -> PyTree:
    """Returns the state at step 0 of given weights or noise, on the devices.

    By one program, as a training makes its state: arrays placed in another way would
    cost a second compilation of the step.
    """
    variables = variables or noise(shapes.variables)
    parts = {"params": variables["params"]}
    parts["model_state"] = {k: v for k, v in variables.items() if k != "params"}

    def make(parts: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes).replace(**parts)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(parts)


def noise(shapes: PyTree) -> PyTree:
    """Returns random weights under which a picture has candidates.

    Filters without a mean keep the features' spread; the class logits' bias lets few of
    the scores pass the usual threshold of 0.1.
    """
    rng = np.random.default_rng(0)

    def values(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key != "kernel":
            ones = path[-1].key in ("scale", "var")
            value = 1.0 if ones else -4.5 if path[-2].key == "cate_pred" else 0.0
            return np.full(leaf.shape, value, np.float32)
        filters = rng.standard_normal(leaf.shape, np.float32)
        filters -= filters.mean((0, 1, 2), keepdims=True)
        return filters / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(values, shapes)


def train_flops(config: Any, height: int, width: int) -> dict[str, float]:
    """Returns FLOPs of the convolutions for one image: forward, and a whole step.

    A layer that is trained costs three times its forward pass (its output, its
    filter's gradient, its input's gradient); a frozen one is not gone back through.
    """
    model = build_model(config, config.model.num_classes)
    rows = summarize(model, height, width, config.model.backbone.freeze_at)
    inner = {row.path[:i] for row in rows for i in range(len(row.path))}
    leaves = [row for row in rows if row.path not in inner]
    forward = sum(row.flops for row in leaves)
    return {"forward": forward, "step": forward + 2 * sum(r.flops for r in leaves if r.trainable)}
