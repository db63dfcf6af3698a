"""What the host costs beside a device: dispatch, transfers, evaluation.

    python benchmarks/device.py --config configs/r50_3x.py --size 800 1344 --batch 16 \
        --config.model.dtype=bfloat16

dispatch: until the call of the train step returns, of the time until its result is there; a
step that the host must wait for in its middle (a conditional that it reads) shows as a
share near 1. transfer: of a batch, alone. overlap: the share of a transfer that is hidden
when each step gets a batch of its own, put while the one before is computed, as in
training, from 0, none, to 1, all of it; noise where a transfer is short beside a step.
evaluation: images a second from pixels to run lengths, next batch
ahead, all local devices. Results go to results/device-....json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import harness
import jax
import numpy as np

from solov2_jax.config import split_overrides
from solov2_jax.distributed import put_batch
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import predict
from solov2_jax.inference.predictor import Predictor


def main(argv: list[str]) -> None:
    """Measures and writes."""
    rest, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/r50_3x.py")
    add("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    add("--batch", type=int, default=16, help="images of a train step")
    add("--eval_batch", type=int, default=4, help="images of a prediction, for each device")
    add("--eval_images", type=int, default=64)
    add("--runs", type=int, default=20)
    add("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args(rest)
    config = cases.read_config(args.config, overrides)
    name = f"device-{Path(args.config).stem}-{'x'.join(map(str, args.size))}-b{args.batch}"
    content = harness.header(f"{name}-{config.model.dtype}") | {
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "train": train(config, args),
        "evaluation": evaluation(config, args),
    }
    for part in ("train", "evaluation"):
        for key, value in content[part].items():
            print(f"{part} {key} {value:.4g}")
    print(f"written: {harness.write(content, args.results)}")


def median_ms(run: Callable[[], Any], runs: int) -> float:
    """Returns the median milliseconds of a call."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def train(config: Any, args: argparse.Namespace) -> dict[str, float]:
    """Returns milliseconds of a step and its parts on one device, see above."""
    step, shapes, mesh = cases.build_step(config)
    rows = cases.make_train_batch(config, tuple(args.size), args.batch)
    batch = put_batch(rows, mesh)
    state, _ = jax.block_until_ready(step(cases.start_state(shapes), batch))
    dispatched, finished = [], []
    for _ in range(args.runs):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        dispatched.append(time.perf_counter() - start)
        jax.block_until_ready((state, metrics))
        finished.append(time.perf_counter() - start)

    def loop(next_batch: Callable[[], Any]) -> float:
        """Returns milliseconds a step of a training loop, one step ahead of the device."""
        nonlocal state
        start, previous = time.perf_counter(), ()
        for _ in range(args.runs):
            state, metrics = step(state, next_batch())
            jax.block_until_ready(previous)
            previous = metrics
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - start) / args.runs

    resident, fed = loop(lambda: batch), loop(lambda: put_batch(rows, mesh))
    transfer = median_ms(lambda: jax.block_until_ready(put_batch(rows, mesh)), args.runs)
    step_ms, dispatch_ms = (1e3 * float(np.median(s)) for s in (finished, dispatched))
    return {
        "step_ms": step_ms,
        "dispatch_ms": dispatch_ms,
        "dispatch_share": dispatch_ms / step_ms,
        "transfer_ms": transfer,
        "loop_resident_ms": resident,
        "loop_fed_ms": fed,
        "overlap": min(1.0, max(0.0, 1 - (fed - resident) / transfer)),
        "images_per_second": 1e3 * args.batch / fed,
    }


def evaluation(config: Any, args: argparse.Namespace) -> dict[str, float]:
    """Returns images a second of an evaluation's prediction and encoding, data excluded."""
    weights = cases.write_weights(config)["adelaidet"]
    predictor = Predictor.from_weights(weights, config).on_devices(jax.local_devices())
    number = args.eval_batch * predictor.num_devices
    fields = cases.make_batch(config, tuple(args.size), number)
    fields["original_size"] = fields["image_size"]
    batches = [
        fields | {"image_id": np.arange(first, first + number, dtype=np.int32)}
        for first in range(1, args.eval_images + 1, number)
    ]
    ids = range(1, len(batches) * number + 1)
    h, w = args.size
    truth = {
        "images": [{"id": i, "height": h, "width": w, "file_name": f"{i}.jpg"} for i in ids],
        "annotations": [],
        "categories": [
            {"id": int(i), "name": name}
            for i, name in zip(predictor.category_ids, predictor.class_names, strict=True)
        ],
    }
    evaluator = CocoEvaluator(truth, predictor.category_ids, predictor.class_names)
    predict(predictor, batches[:1], evaluator)  # compiles
    evaluator.reset()
    start = time.perf_counter()
    predict(predictor, batches, evaluator)
    seconds = time.perf_counter() - start
    images = len(batches) * number
    found = len(evaluator.results) / images
    return {"images_per_second": images / seconds, "detections_per_image": found}


if __name__ == "__main__":
    main(sys.argv[1:])
