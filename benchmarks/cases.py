"""What both programs are given: weights, images, objects and targets, as files.

Weights are the ones of the tests (`tests/golden_weights.py`): random, but scaled so
that a picture has some hundred candidates. They are written under the names that each
side reads, from one set of arrays. Pictures are made here, unless a file is given.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

from solov2_jax.config import load_config, save_config, split_overrides
from solov2_jax.data import rasterize
from solov2_jax.data.images import read_image
from solov2_jax.data.rasterize import stride4_masks
from solov2_jax.data.transforms import resize_image
from solov2_jax.models import build_model
from solov2_jax.rle import rle_encode
from solov2_jax.structs import Batch
from solov2_jax.targets import assign_targets
from solov2_jax.weights import names
from solov2_jax.weights.names import fill, match, skeleton
from tests.golden_weights import golden_weight  # noqa: E402

CACHE = ROOT / ".cache" / "benchmarks"
NUM_CLASSES = 80
# Of the class logits' filters, by depth: some hundred candidates with 80 classes.
CATE_GAIN = {18: 0.85, 34: 0.85, 50: 0.87, 101: 0.87, 152: 0.87}
OBJECTS = 10  # per image, where it is trained on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all benchmarks of the network ask for."""
    parser.add_argument("--config", default="configs/r50_3x.py")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image", help="a picture to use instead of the made one")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Any, Any]:
    """Returns (arguments, config with the "--config.key=value" overrides)."""
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(str(ROOT / args.config), overrides)
    with config.unlocked():
        config.model.num_classes = config.model.num_classes or NUM_CLASSES
    args.overrides = overrides
    return args, config


def describe(args: Any) -> dict[str, Any]:
    """Returns what a result says about its work."""
    return {
        "config": args.config,
        "overrides": args.overrides,
        "size": list(args.size),
        "batch": args.batch,
        "image": "given" if args.image else "made",
    }


def name_of(script: str, args: Any, *more: str) -> str:
    """Returns the name of a result's file."""
    h, w = args.size
    config = Path(args.config).stem
    parts = [script, *more, config, f"{h}x{w}", f"b{args.batch}", args.allocator]
    return "-".join(parts)


def write_case(folder: Path, config: Any, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes config, weights' paths and arrays into a folder, and returns it."""
    save_config(config, folder / "config.json")
    weights = write_weights(config)
    (folder / "weights.json").write_text(json.dumps(weights))
    np.savez(folder / "arrays.npz", **arrays)
    return folder


def write_weights(config: Any) -> dict[str, str]:
    """Returns {"adelaidet": file, "mmdet": file} of the same weights under two names.

    Kept in the cache folder: they depend on the shapes only.
    """
    model = build_model(config, config.model.num_classes)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    ours = {"/".join(k): v for k, v in flatten_dict(shapes).items()}
    empty = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in ours.items()}
    depth = config.model.backbone.depth
    last, gain = "conv2" if depth < 50 else "conv3", CATE_GAIN[depth]
    total = names.to_adelaidet(empty)
    key = "-".join(map(str, (depth, gain, sum(v.size for v in total.values()))))
    paths = {n: CACHE / "weights" / f"{key}-{n}.npz" for n in ("adelaidet", "mmdet")}
    if not all(path.is_file() for path in paths.values()):
        paths["adelaidet"].parent.mkdir(parents=True, exist_ok=True)
        state = {
            k: golden_weight(k, v.shape, last, gain).astype(np.float32) for k, v in total.items()
        }
        np.savez(paths["adelaidet"], **state)
        leaves = names.from_adelaidet(state)
        np.savez(paths["mmdet"], **to_mmdet(leaves))
    return {name: str(path) for name, path in paths.items()}


def to_mmdet(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns mmdetection's state dict of our flat leaves (its counters left out)."""
    state = {}
    for leaf, value in leaves.items():
        for rule in names.MMDET.by_target[skeleton(leaf)]:
            values = match(rule.target, leaf)
            if values is not None:
                kernel = rule.transform == "kernel"
                value = value.transpose(3, 2, 0, 1) if kernel else value
                state[fill(rule.source, values)] = np.ascontiguousarray(value)
                break
        else:
            raise ValueError(f"{leaf} has no name in mmdetection's table")
    return state


def make_images(args: Any) -> np.ndarray:
    """Returns uint8 [B, H, W, 3], RGB: the given picture, or blocks of several scales.

    The others of a batch are the first one, mirrored or turned.
    """
    h, w = args.size
    if args.image:
        image = resize_image(read_image(args.image), h, w)
    else:
        rng, image = np.random.default_rng(0), np.zeros((h, w, 3))
        for block, strength in ((256, 85), (128, 85), (32, 85)):
            shape = (-(-h // block), -(-w // block), 3)
            noise = rng.uniform(0, strength, shape)
            image += np.kron(noise, np.ones((block, block, 1)))[:h, :w]
        image = image.astype(np.uint8)
    views = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    return np.stack([views[i % 4] for i in range(args.batch)])


def pad_images(images: np.ndarray, config: Any) -> np.ndarray:
    """Returns the images in the network's channel order, padded to multiples of 32."""
    if config.input.channel_order == "BGR":
        images = images[..., ::-1]
    pad = [(0, -size % 32) for size in images.shape[1:3]]
    return np.pad(images, [(0, 0), *pad, (0, 0)])


def make_objects(args: Any, config: Any) -> dict[str, np.ndarray]:
    """Returns ellipses with boxes, labels, whole masks and quarter-size masks."""
    h, w = args.size
    rng = np.random.default_rng(0)
    shape = (args.batch, OBJECTS)
    side = rng.uniform(0.1, 0.5, (*shape, 2)) * (w, h)
    corner = rng.uniform(0, 1, side.shape) * ((w, h) - side)
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    padded = (h + -h % 32, w + -w % 32)
    full = np.zeros((*shape, h, w), np.uint8)
    small = np.zeros((*shape, padded[0] // 4, padded[1] // 4), np.uint8)
    centers = np.zeros((*shape, 2), np.float32)
    y, x = np.mgrid[:h, :w]
    for i in np.ndindex(shape):
        (cx, cy), (rx, ry) = corner[i] + side[i] / 2, side[i] / 2
        full[i] = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        everything = np.array([[0, 0, w, h]])
        (runs,) = rle_encode(full[i].astype(bool)[None], everything)
        outline = rasterize.spans_from_rle([runs.encode()], (h, w))
        centers[i] = rasterize.mass_centers(outline, 1)[0][0]
        for _, part in stride4_masks(outline, (h, w)):
            ph, pw = part.pixels.shape
            small[i][part.top : part.top + ph, part.left : part.left + pw] = part.pixels
    labels = rng.integers(0, config.model.num_classes, shape).astype(np.int32)
    return {
        "boxes": boxes,
        "labels": labels,
        "centers": centers,
        "full_masks": full,
        "masks": small,
        "valid": np.ones(shape, bool),
    }


def make_batch(args: Any, config: Any) -> dict[str, np.ndarray]:
    """Returns a `Batch`'s fields, and `full_masks` for who scales them down itself."""
    images = pad_images(make_images(args), config)
    return {
        "image": images,
        "image_size": np.full((args.batch, 2), args.size, np.int32),
        "image_id": np.arange(args.batch, dtype=np.int32),
        **make_objects(args, config),
    }


def add_targets(batch: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Returns our targets of a batch, for a program that does not build them itself."""
    fields = {k: v for k, v in batch.items() if k != "full_masks"}
    targets = assign_targets(
        Batch(**fields),
        num_grids=tuple(config.model.ins_head.num_grids),
        scale_ranges=tuple(map(tuple, config.targets.scale_ranges)),
        sigma=config.targets.sigma,
        num_classes=config.model.num_classes,
        max_pairs=config.targets.max_pairs,
        key=jax.random.key(0),
    )
    return {f"target_{k}": np.asarray(v) for k, v in vars(targets).items()}
