"""Compile time, train step, prediction of one image, and peak memory, on this machine.

    python benchmarks/baseline.py step --config configs/r50_3x.py \
        --size 512 512 --batch 2
    python benchmarks/baseline.py image --config configs/r50_3x.py --size 800 1333 \
        --weights WEIGHTS

One process per measurement, so that each peak memory is its own. Prints one json line.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from solov2_jax.config import load_config
from solov2_jax.inference.predictor import Predictor
from solov2_jax.models import build_model
from solov2_jax.training import sharding
from solov2_jax.training.build import build_loss, build_optimizer
from solov2_jax.training.optim import trainable_mask
from solov2_jax.training.state import create_state
from solov2_jax.training.step import TrainStep

OBJECTS = 10  # per image, of random boxes


def main() -> None:
    """Measures what the arguments ask for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "image"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), required=True)
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--weights", help="of the whole network, for `image`")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    measure = {"step": measure_step, "image": measure_image}[args.what]
    found = measure(config, args)
    found["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(describe(args) | found))


def measure_step(config, args) -> dict[str, float]:
    """Returns seconds of forward, backward and update together."""
    config.model.num_classes = config.model.num_classes or 80
    model, mesh = build_model(config, config.model.num_classes), sharding.make_mesh()
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def init(key):
        return dict(model.lazy_init(key, image))

    params = jax.eval_shape(init, jax.random.key(0))["params"]
    backbone = config.model.backbone
    trainable = trainable_mask(params, backbone.freeze_at, backbone.norm)
    _, tx = build_optimizer(config, trainable)
    state = create_state(init, tx, jax.random.key(0), mesh)
    step = TrainStep(build_loss(config, model), tx, mesh, jax.random.key(0), trainable)
    batch = sharding.put_batch(make_batch(args.batch, *args.size), mesh)
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    first = time.perf_counter() - start
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    assert step.compiles == 1, "recompiled after warm-up"
    pairs = float(metrics["num_pairs"])
    return {"first_call_s": first, "pairs": pairs, **spread(seconds)}


def make_batch(batch: int, h: int, w: int) -> dict[str, np.ndarray]:
    """Returns noise with boxes between a tenth and half of the image's size."""
    rng = np.random.default_rng(0)
    side = rng.uniform(0.1, 0.5, (batch, OBJECTS, 2)) * (w, h)
    corner = rng.uniform(0, 1, side.shape) * ((w, h) - side)
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    y, x = np.mgrid[2:h:4, 2:w:4]
    x0, y0, x1, y1 = (boxes[..., i, None, None] for i in range(4))
    return {
        "image": rng.integers(0, 255, (batch, h, w, 3), dtype=np.uint8),
        "image_size": np.full((batch, 2), (h, w), np.int32),
        "boxes": boxes,
        "labels": rng.integers(0, 80, (batch, OBJECTS)).astype(np.int32),
        "centers": (boxes[..., :2] + boxes[..., 2:]) / 2,
        "masks": ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).astype(np.uint8),
        "valid": np.ones((batch, OBJECTS), bool),
        "image_id": np.arange(batch, dtype=np.int32),
    }


def measure_image(config, args) -> dict[str, float]:
    """Returns seconds from an RGB array to masks of its size, network and all."""
    if not args.weights:
        raise SystemExit("error: `image` needs --weights, so that there are detections")
    predictor = Predictor.from_config(config, args.weights)
    # Blurred noise: structure at several scales, so that something is detected.
    rng = np.random.default_rng(0)
    image = sum(
        np.kron(rng.uniform(0, 85, (8 * n, 8 * n, 3)), np.ones((256 // n, 256 // n, 1)))
        for n in (1, 2, 8)
    )
    h, w = args.size
    image = image[:h, :w].astype(np.uint8)

    def run() -> tuple[float, int]:
        start = time.perf_counter()
        (prediction,) = predictor.predict_images([image])
        return time.perf_counter() - start, len(prediction)

    first, detections = run()
    seconds = [run()[0] for _ in range(args.runs)]
    return {"first_call_s": first, "detections": detections, **spread(seconds)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Returns the median with the fastest and the slowest run."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }


def describe(args) -> dict[str, object]:
    """Returns what was measured, and on what."""
    return {
        "what": args.what,
        "config": args.config,
        "size": args.size,
        "batch": args.batch,
        "runs": args.runs,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu_count": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
