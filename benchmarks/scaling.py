"""How training scales: predicted on paper, checked on emulated CPU devices.

    python benchmarks/scaling.py                            # paper and emulated
    python benchmarks/scaling.py paper --step_seconds 0.06  # a measured step

`paper` needs no device: all-reduce bytes from the parameter tree, published link rates
(`systems.json`), and the time of a step on one chip, which is a measured figure if
`--step_seconds` gives one and else what the project aims at. `emulated` compiles and
runs the sharded train step on 1, 2, 4 and 8 CPU devices: what it sends, whether the
losses are equal, what the partitioning costs. Programs compiled for chips that are not
there are `ahead.py`'s. Writes results/scaling.json; `tables.py` puts it into docs/scaling.md.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import hlo
from harness import RESULTS
from scaling_model import (
    PADDED,
    Assumptions,
    System,
    compiled_traffic,
    efficiencies,
    image_seconds,
    load_systems,
)
from scaling_tables import scaling_tables

CHIPS = (8, 16, 32, 64, 128, 256, 512)
STEPS = (0.01, 0.025, 0.05, 0.1, 0.2)  # seconds on one chip
EMULATED, AS_ACCELERATOR = (1, 2, 4, 8), (2, 8)
JPEG_BYTES = 18e9 / 118_287  # COCO train2017: 18 GB of 118,287 images


def main(argv: list[str] | None = None) -> None:
    """Does what the arguments ask for."""
    args = parse(argv)
    import jax

    # Before the first use of a device; paper computes nothing.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(EMULATED))
    content = harness.read(args.results, "scaling")
    if args.part in ("paper", "all"):
        content["paper"] = paper(args, harness.read(args.results, "ahead").get("rows", {}))
    if args.part in ("emulated", "all"):
        content["emulated"] = emulated(args)
    harness.write(content, args.results)
    blocks = scaling_tables(content)
    print("\n\n".join(f"{name}\n\n{block}" for name, block in blocks.items()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", nargs="?", choices=["all", "paper", "emulated"], default="all")
    add("--config", default="configs/r50_3x.py")
    add("--step_seconds", type=float, help="measured on one chip, with --step_images")
    add("--step_images", type=int, default=16, help="images per chip and step")
    add("--step_share", type=float, default=0.5, help="of peak that convolutions reach")
    add("--memory_share", type=float, default=0.75, help="of the memory's rate that is reached")
    add("--images_per_core", type=float, default=25.0, help="a second, decoded")
    add("--objects", type=int, default=100, help="padded mask slots per image")
    add("--emulated_config", default="configs/quickstart.py")
    add("--size", type=int, nargs=2, default=(64, 64), help="emulated, padded")
    add("--steps", type=int, default=5, help="emulated, after the first")
    add("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


# --- On paper ------------------------------------------------------------------------


def paper(args: Any, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the predictions and all that they rest on.

    Args:
      compiled: the rows that `ahead.py` wrote.
    """
    from cases import gradient_bytes, read_config, train_flops

    flops = train_flops(read_config(args.config), *PADDED)
    known = load_systems()
    gradients, systems = gradient_bytes(args.config), known["systems"]
    traffic = known["traffic"] | compiled_traffic(compiled, args.config)
    # What of a step is the backward pass, behind which an all-reduce can hide.
    backward = 1 - flops["forward"] / flops["step"]
    basis = (
        f"arithmetic at {args.step_share:.0%} and memory passes at {args.memory_share:.0%} of the "
        "published rates, assumed"
    )
    if args.step_seconds:
        basis = f"{args.step_seconds} s for {args.step_images} images, measured"
    size, rows, by_step = gradients["bytes"], [], {}
    for system in systems:
        moved = traffic[system["family"]]
        computed = args.step_images * image_seconds(system, flops["step"], moved, args)
        for batch in sorted({2, args.step_images}):
            step = (args.step_seconds or computed) * batch / args.step_images
            chips = {
                str(n): efficiencies(system, n, size, step, backward)
                for n in CHIPS
                if n <= system.get("pod", n)
            }
            row = {"system": system["name"], "images_per_chip": batch, "step_s": step}
            rows.append(row | {"chips": chips, "host": host_input(system, batch / step, args)})
        by_step[system["name"]] = {
            str(t): efficiencies(system, system.get("pod", max(CHIPS)), size, t, backward)
            for t in STEPS
        }
    return {
        "config": args.config,
        "size": list(PADDED),
        "flops_per_image": flops,
        "backward_share": backward,
        "gradients": gradients,
        "step": basis,
        "traffic": traffic,
        "images_per_core": args.images_per_core,
        "objects": args.objects,
        "assumptions": dataclasses.asdict(Assumptions()),
        "systems": systems,
        "rows": rows,
        "by_step": by_step,
    }


def host_input(system: System, images_per_s: float, args: Any) -> dict[str, float]:
    """Returns what one host must read, decode and send to its chips at full efficiency."""
    h, w = PADDED
    rate = images_per_s * system["chips_per_host"]
    to_device = 3 * h * w + args.objects * (h // 4) * (w // 4)
    return {
        "images_per_s": rate,
        "decode_cores": rate / args.images_per_core,
        "read_mb_per_s": rate * JPEG_BYTES / 1e6,
        "to_chips_mb_per_s": rate * to_device / 1e6,
    }


# --- Compiled programs ---------------------------------------------------------------


def emulated(args: Any) -> dict[str, Any]:
    """Returns what the sharded step sends, its losses and its cost, by devices."""
    from cases import build_step, gradient_bytes, make_train_batch, read_config

    from solov2_jax.distributed import make_mesh, put_batch
    from solov2_jax.platforms import portable_forms

    h, w = args.size
    config = read_config(args.emulated_config)
    rows = make_train_batch(config, (h, w), max(EMULATED))
    forms: dict[str, Any] = {"cpu": {}, "accelerator": {}}

    def measure(devices: int, form: str, steps: int) -> None:
        step, shapes, mesh = build_step(config, make_mesh(devices))
        batch = put_batch(rows, mesh)
        compiled = step.lower(shapes, batch).compile()
        row = {"collectives": hlo.read_collectives(compiled.as_text())}
        forms[form][str(devices)] = row | timed(step, shapes, batch, steps)

    for devices in EMULATED:
        measure(devices, "cpu", args.steps)
        if devices in AS_ACCELERATOR:
            # The convolutions of GPU and TPU: their gradients are other arrays.
            with portable_forms():
                measure(devices, "accelerator", 0)
    work = {"config": args.emulated_config, "size": [h, w], "batch": max(EMULATED)}
    gradients = {"gradients": gradient_bytes(args.emulated_config)}
    return work | gradients | {"machine": harness.describe_machine()} | forms


def timed(step: Any, shapes: Any, batch: Any, steps: int) -> dict[str, Any]:
    """Returns losses of all steps, and seconds of all but the first; {} for no steps."""
    import jax
    from cases import start_state

    if not steps:
        return {}
    state, losses, wall, cpu = start_state(shapes), [], [], []
    for _ in range(steps + 1):
        start, used = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(step(state, batch))
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        losses.append(float(metrics["loss"]))
    seconds = {"seconds": harness.summary(wall[1:]), "cpu_seconds": harness.summary(cpu[1:])}
    return {"losses": losses, **seconds}


if __name__ == "__main__":
    main(sys.argv[1:])
