"""How training scales: predicted on paper, checked on emulated CPU devices, compiled ahead.

    python benchmarks/scaling.py                            # paper and emulated
    python benchmarks/scaling.py paper --step_seconds 0.06  # a measured step
    pip install libtpu==0.0.42.1             # or jax-cuda12-plugin, jax-cuda12-pjrt
    python benchmarks/scaling.py ahead --topology tpu:v5e:2x4
    python benchmarks/scaling.py ahead --topology cuda:1x1x8      # hosts x processes x GPUs

`paper` needs no device: all-reduce bytes from the parameter tree, published link rates
(`systems.json`), and the time of a step on one chip, which is a measured figure if
`--step_seconds` gives one and else what the project aims at. `emulated` compiles and
runs the sharded train step on 1, 2, 4 and 8 CPU devices: what it sends, whether the
losses are equal, what the partitioning costs. `ahead` compiles it for GPUs and TPUs that
are not there, from their description; the plug-ins belong into an environment of their
own, because JAX looks for their chips at every start. Writes results/scaling.json;
`tables.py` puts it into docs/scaling.md.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import harness
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
from tables import COLLECTIVES, scaling_tables

CHIPS = (8, 16, 32, 64, 128, 256, 512)
STEPS = (0.01, 0.025, 0.05, 0.1, 0.2)  # seconds on one chip
EMULATED, AS_ACCELERATOR = (1, 2, 4, 8), (2, 8)
JPEG_BYTES = 18e9 / 118_287  # COCO train2017: 18 GB of 118,287 images


def main(argv: list[str] | None = None) -> None:
    """Does what the arguments ask for."""
    args = parse(argv)
    import jax

    # Before the first use of a device; paper and ahead compute nothing.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(EMULATED))
    content = harness.read(args.results, "scaling")
    if args.part in ("paper", "all"):
        content["paper"] = paper(args, content.get("ahead", {}))
    if args.part in ("emulated", "all"):
        content["emulated"] = emulated(args)
    if args.part == "ahead":
        label, row = ahead(args)
        content.setdefault("ahead", {})[label] = row
    harness.write(content, args.results)
    blocks = scaling_tables(content)
    print("\n\n".join(f"{name}\n\n{block}" for name, block in blocks.items()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", nargs="?", choices=["all", "paper", "emulated", "ahead"], default="all")
    add("--config", default="configs/r50_3x.py")
    add("--step_seconds", type=float, help="measured on one chip, with --step_images")
    add("--step_images", type=int, default=16, help="images per chip and step")
    add("--step_share", type=float, default=0.5, help="of peak that convolutions reach")
    add("--memory_share", type=float, default=0.75, help="of the memory's rate that is reached")
    add("--images_per_core", type=float, default=25.0, help="a second, decoded")
    add("--objects", type=int, default=100, help="padded mask slots per image")
    add("--emulated_config", default="configs/quickstart.py")
    add("--size", type=int, nargs=2, help="padded; emulated 64 64, ahead 800 1344")
    add("--steps", type=int, default=5, help="emulated, after the first")
    add("--topology", default="cuda:1x1x8", help="ahead: cuda:1x1x8, tpu:v5e:2x4, tpu:v4:2x2x2")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="ahead")
    add("--images", type=int, default=2, help="ahead, per chip")
    add("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


# --- On paper ------------------------------------------------------------------------


def paper(args: Any, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the predictions and all that they rest on.

    Args:
      compiled: what `ahead` wrote.
    """
    from cases import read_config, train_flops

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


def gradient_bytes(path: str) -> dict[str, int]:
    """Returns number and float32 bytes of the trained parameters of a config."""
    import jax
    from cases import build_model, read_config, variable_shapes

    from solov2_jax.training.build import build_trainable

    config = read_config(path)
    params = variable_shapes(build_model(config, config.model.num_classes))["params"]
    flags = jax.tree.leaves(build_trainable(config, params))
    trained = [x.size for x, flag in zip(jax.tree.leaves(params), flags, strict=True) if flag]
    return {"arrays": len(trained), "bytes": 4 * sum(trained)}


# --- Compiled programs ---------------------------------------------------------------


def read_collectives(text: str) -> list[dict[str, Any]]:
    """Returns operations between devices in a compiled program's text, summed by kind.

    Several arrays in one operation mean that the compiler combined them.
    """
    # "%name = (f32[3,4]{1,0}, /*index=1*/s32[]) all-reduce-start(...)"; a "-done" is its
    # other half.
    kinds = "|".join(COLLECTIVES)
    operation = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({kinds})(?:-start)?\(", re.M)
    sums: dict[str, dict[str, Any]] = {}
    for shapes, kind in operation.findall(text):
        arrays = re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", shapes)
        row = {"kind": kind, "types": [], "operations": 0, "arrays": 0, "bytes": 0}
        row = sums.setdefault(kind, row)
        row["types"] = sorted({*row["types"], *(dtype for dtype, _ in arrays)})
        row["operations"] += 1
        row["arrays"] += len(arrays)
        for dtype, dims in arrays:
            item = {"pred": 1, "bf16": 2}.get(dtype) or int(dtype[1:]) // 8
            row["bytes"] += item * math.prod(int(d) for d in dims.split(",") if d)
    return list(sums.values())


def emulated(args: Any) -> dict[str, Any]:
    """Returns what the sharded step sends, its losses and its cost, by devices."""
    from cases import build_step, make_train_batch, read_config

    from solov2_jax.distributed import make_mesh, put_batch
    from solov2_jax.platforms import portable_forms

    h, w = args.size or (64, 64)
    config = read_config(args.emulated_config)
    rows = make_train_batch(config, (h, w), max(EMULATED))
    forms: dict[str, Any] = {"cpu": {}, "accelerator": {}}

    def measure(devices: int, form: str, steps: int) -> None:
        step, shapes, mesh = build_step(config, make_mesh(devices))
        batch = put_batch(rows, mesh)
        compiled = step.lower(shapes, batch).compile()
        row = {"collectives": read_collectives(compiled.as_text())}
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


def ahead(args: Any) -> tuple[str, dict[str, Any]]:
    """Returns (label, what the step compiled for a described topology holds)."""
    from cases import read_config
    from jax.experimental import topologies

    platform, _, topology = args.topology.partition(":")
    if platform not in ("cuda", "tpu"):
        raise SystemExit(f"error: --topology {args.topology}: begin with cuda: or tpu:")
    if platform == "tpu":
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud what machine this is
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # must be something; not what counts
        }
        devices = topologies.get_topology_desc(topology, "tpu").devices
    else:
        # Forms are chosen by timing them, which needs the GPU; Triton's, whose tiles
        # are chosen so, do not compile without.
        flags = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
        target = {"target_config": load_systems()["h100_target"], "topology": topology}
        devices = topologies.get_topology_desc("h100", "cuda", **target).devices
    config = read_config(args.config, [f"--config.model.dtype={args.dtype}"])
    size = tuple(args.size or PADDED)
    lowered = lower_for(devices, config, size, args.images)
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    row = {
        "config": args.config,
        "dtype": args.dtype,
        "size": list(size),
        "images_per_chip": args.images,
        "chips": len(devices),
        "kind": devices[0].device_kind,
        "compile_s": time.perf_counter() - start,
        "collectives": read_collectives(compiled.as_text()),
        "bytes": compiled.cost_analysis().get("bytes accessed", 0.0),
        "memory_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
    }
    return f"{platform} {topology} {Path(args.config).stem} {args.dtype}", row


def lower_for(devices: Any, config: Any, size: tuple[int, int], images: int) -> Any:
    """Returns the lowered train step for chips that cannot hold an array.

    Args:
      size: (height, width), padded.
      images: per chip.
    """
    import numpy as np
    from cases import OBJECTS, build_step
    from jax.sharding import AxisType, Mesh

    from solov2_jax.training.memory import batch_shapes

    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    batch = batch_shapes(len(devices) * images, OBJECTS, *size, mesh)
    with described_arrays():
        step, state, _ = build_step(config, mesh)
        return step.lower(state, batch)


@contextlib.contextmanager
def described_arrays() -> Iterator[None]:
    """Makes what would be put on a mesh's devices shapes only, within the context."""
    import jax

    from solov2_jax import distributed

    def describe(tree: Any, placed: Any) -> Any:
        placed = (
            placed if isinstance(placed, jax.sharding.Sharding) else distributed.replicated(placed)
        )
        shape = jax.ShapeDtypeStruct
        return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=placed), tree)

    put = mock.patch("jax.device_put", describe)
    with put, mock.patch.object(distributed, "copy_to_all", describe):
        yield


if __name__ == "__main__":
    main(sys.argv[1:])
