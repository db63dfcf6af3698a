"""How training scales: predicted on paper, checked on emulated CPU devices.

    python benchmarks/scaling.py                            # both parts
    python benchmarks/scaling.py paper --step_seconds 0.06  # a measured step

`paper` needs no device: all-reduce bytes from the parameter tree, published link rates
(`links.py`), and the time of a step on one chip, which is a measured figure if
`--step_seconds` gives one and else what the project aims at. `emulated` compiles and
runs the sharded train step on 1, 2, 4 and 8 CPU devices: what it sends, whether the
losses are equal, what the partitioning costs. Writes results/scaling.json and the
tables of docs/scaling.md.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import markdown
import report
import scaling_tables
from jax_side import ROOT  # first of what needs the repository's path
from links import SYSTEMS, Assumptions, all_reduce_seconds, exposed_seconds

PADDED = (800, 1344)
CHIPS = (8, 16, 32, 64, 128, 256)
STEPS = (0.01, 0.025, 0.05, 0.1, 0.2)  # seconds on one chip
EMULATED = (1, 2, 4, 8)
AS_ACCELERATOR = (2, 8)
# COCO's own figures: train2017 is 18 GB of 118,287 images.
JPEG_BYTES = 18e9 / 118_287


def main(argv: list[str] | None = None) -> None:
    """Does what the arguments ask for."""
    args = parse(argv)
    import jax

    # Before the first use of a device; the paper's part computes nothing.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(EMULATED))
    path = args.results / "scaling.json"
    content = json.loads(path.read_text()) if path.exists() else {"name": "scaling"}
    if args.part in ("paper", "all"):
        content["paper"] = paper(args)
    if args.part in ("emulated", "all"):
        content["emulated"] = emulated(args)
    report.write(content, args.results)
    blocks = scaling_tables.blocks(content)
    print("\n\n".join(f"{name}\n\n{block}" for name, block in blocks.items()))
    if args.doc:
        markdown.fill_file(Path(args.doc), blocks)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", nargs="?", choices=["all", "paper", "emulated"], default="all")
    add("--config", default="configs/r50_3x.py")
    add("--step_seconds", type=float, help="measured on one chip, with --step_images")
    add("--step_images", type=int, default=16, help="images per chip and step")
    add("--step_share", type=float, default=0.4, help="of peak, if nothing is measured")
    add("--images_per_core", type=float, default=25.0, help="a second, decoded")
    add("--objects", type=int, default=100, help="padded mask slots per image")
    add("--emulated_config", default="configs/quickstart.py")
    add("--emulated_size", type=int, nargs=2, default=(64, 64))
    add("--steps", type=int, default=5, help="emulated, after the first")
    add("--results", type=Path, default=harness.RESULTS)
    add("--doc", default=str(ROOT / "docs" / "scaling.md"), help="'' for none")
    return parser.parse_args(argv)


# --- On paper --------------------------------------------------------------------


def paper(args: Any) -> dict[str, Any]:
    """Returns the predictions and all that they rest on."""
    from step_case import train_flops

    from solov2_jax.config import load_config

    config = load_config(str(ROOT / args.config), [])
    flops, given = train_flops(config, *PADDED), Assumptions()
    gradients = gradient_bytes(args.config)
    # What of a step is the backward pass, behind which an all-reduce can hide.
    backward = 1 - flops["forward"] / flops["step"]
    basis = f"{args.step_share:.0%} of the published rate, assumed"
    if args.step_seconds:
        basis = f"{args.step_seconds} s for {args.step_images} images, measured"
    size, rows = gradients["bytes"], []
    for system in SYSTEMS:
        step = args.step_seconds or args.step_images * flops["step"] / (
            args.step_share * system.peak
        )
        rows += predictions(system, step, size, backward, args)
    return {
        "config": args.config,
        "size": list(PADDED),
        "flops_per_image": flops,
        "backward_share": backward,
        "gradients": gradients,
        "step": basis,
        "images_per_core": args.images_per_core,
        "objects": args.objects,
        "assumptions": dataclasses.asdict(given),
        "systems": [dataclasses.asdict(s) for s in SYSTEMS],
        "rows": rows,
        "by_step": {
            s.name: {str(t): efficiencies(s, max(CHIPS), size, t, backward) for t in STEPS}
            for s in SYSTEMS
        },
    }


def predictions(
    system: Any, step: float, size: int, backward: float, args: Any
) -> list[dict[str, Any]]:
    """Returns a row for small and large batches: by chips, and what a host delivers.

    Args:
      step: seconds of a step of `args.step_images` images on one chip.
      size: bytes of the gradients.
      backward: share of a step that is the backward pass.
    """
    rows = []
    for batch in sorted({2, args.step_images}):
        seconds = step * batch / args.step_images
        chips = {str(n): efficiencies(system, n, size, seconds, backward) for n in CHIPS}
        row = {"system": system.name, "images_per_chip": batch, "step_s": seconds}
        row |= {"chips": chips, "host": host_input(system, batch / seconds, args)}
        rows.append(row)
    return rows


def efficiencies(
    system: Any, chips: int, size: int, step: float, backward: float
) -> dict[str, float]:
    """Returns the all-reduce's seconds and shares of the ideal rate.

    "efficiency" is without any overlap, "efficiency_overlapped" with an all-reduce that
    starts as soon as its gradients are there.
    """
    given = Assumptions()
    spent = all_reduce_seconds(size, chips, system, given)
    exposed = exposed_seconds(size, spent, backward * step, given.combine_bytes)
    return {
        "all_reduce_s": spent,
        "efficiency": step / (step + spent),
        "efficiency_overlapped": step / (step + exposed),
    }


def gradient_bytes(path: str) -> dict[str, int]:
    """Returns number and float32 bytes of the trained parameters of a config."""
    import jax
    from step_case import StepCase

    from solov2_jax.config import load_config

    case = StepCase(load_config(str(ROOT / path), []))
    pairs = zip(jax.tree.leaves(case.params), jax.tree.leaves(case.trainable), strict=True)
    trained = [x.size for x, flag in pairs if flag]
    return {"arrays": len(trained), "bytes": 4 * sum(trained)}


def host_input(system: Any, images_per_s: float, args: Any) -> dict[str, float]:
    """Returns what one host must read, decode and send to its chips each second.

    At full efficiency: the most that is asked for.
    """
    h, w = PADDED
    rate = images_per_s * system.chips_per_host
    to_device = 3 * h * w + args.objects * (h // 4) * (w // 4)
    return {
        "images_per_s": rate,
        "decode_cores": rate / args.images_per_core,
        "read_mb_per_s": rate * JPEG_BYTES / 1e6,
        "to_chips_mb_per_s": rate * to_device / 1e6,
    }


# --- On emulated devices ---------------------------------------------------------


def emulated(args: Any) -> dict[str, Any]:
    """Returns what the sharded step sends, its losses and its cost, by devices."""
    from collectives import read_collectives, summed
    from step_case import make_batch

    from solov2_jax.config import load_config

    h, w = args.emulated_size
    config = load_config(str(ROOT / args.emulated_config), [])
    batch = make_batch(max(EMULATED), h, w, config.model.num_classes or 5)
    found: dict[str, Any] = {"cpu": {}, "accelerator": {}}
    for devices in EMULATED:
        compiled, case = compile_step(config, devices, batch)
        row = {"collectives": summed(read_collectives(compiled.as_text()))}
        found["cpu"][str(devices)] = row | timed(compiled, case, batch, args.steps)
        if devices not in AS_ACCELERATOR:
            continue
        # The convolutions of GPU and TPU: their gradients are other arrays.
        with mock.patch("jax.default_backend", lambda: "gpu"):
            compiled, _ = compile_step(config, devices, batch)
        row = {"collectives": summed(read_collectives(compiled.as_text()))}
        found["accelerator"][str(devices)] = row
    return {
        "config": args.emulated_config,
        "size": [h, w],
        "batch": max(EMULATED),
        "gradients": gradient_bytes(args.emulated_config),
        "machine": report.describe_machine(),
        **found,
    }


def compile_step(config: Any, devices: int, batch: Any) -> tuple[Any, Any]:
    """Returns (compiled step, case): on so many devices."""
    from step_case import StepCase

    case = StepCase(config, devices)
    return case.step.lower(case.abstract_state(), case.put(batch)).compile(), case


def timed(compiled: Any, case: Any, batch: Any, steps: int) -> dict[str, Any]:
    """Returns losses of all steps, and seconds of all but the first."""
    import jax

    state, losses, wall, cpu = case.state(), [], [], []
    arrays = case.put(batch)
    for _ in range(steps + 1):
        start, used = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(compiled(state, arrays, case.key))
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        losses.append(float(metrics["loss"]))
    return {
        "losses": losses,
        "seconds": report.summary(wall[1:]),
        "cpu_seconds": report.summary(cpu[1:]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
