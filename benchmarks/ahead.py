"""The train step and the detection compiled for a GPU or a TPU that is not there.

    pip install --no-deps --target .cache/ahead -r benchmarks/ahead.txt
    export PYTHONPATH=.cache/ahead
    python benchmarks/ahead.py --dtype bfloat16 float32 --accumulate 1 2 --devices 1 8
    python benchmarks/ahead.py --what detection --images 1
    python benchmarks/ahead.py --target v5e --config configs/light_448_r18.py --size 448 768

XLA compiles for a described device; nothing runs, so there is no time among the figures. They
are what the program holds (`hlo.py`) and takes. A form that is wanted and not there is printed
and is an error. The plug-ins belong into a folder or an environment of their own, because JAX
looks for their devices at every start; they fit JAX 0.10.2 and Python 3.11. For GPUs forms are
chosen without timing them and without Triton's matrix products, which needs the card: its
kernels may be others. Writes results/ahead.json; `tables.py` puts it into docs/scaling.md.
"""

import argparse
import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import hlo
import jax
import jax.numpy as jnp
from cases import build_step, gradient_bytes, read_config, variable_shapes
from jax.experimental import topologies
from scaling_model import PADDED, load_systems
from scaling_tables import ahead_table

from solov2_jax import distributed
from solov2_jax.config import input_statistics
from solov2_jax.inference.programs import DetectOptions, detect_images
from solov2_jax.models import build_model
from solov2_jax.training.memory import batch_shapes

SLOTS = 96  # padded objects of an image
# Trips of a loop that computes the dice loss in tiles; bytes of the metrics that are summed.
MOST_TILES, METRICS = 8, 200
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
TPU_GRIDS = {1: "1x1", 4: "2x2", 8: "2x4"}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # must be something; not what counts
}


@dataclass(frozen=True)
class Case:
    """A program, and what it is compiled for.

    Attributes:
      target: "h100" or "v5e".
      what: "step" or "detection".
      size: padded (height, width).
      images: on each device, in all microbatches together.
    """

    target: str = "h100"
    what: str = "step"
    config: str = "configs/r50_3x.py"
    dtype: str = "bfloat16"
    size: tuple[int, int] = PADDED
    images: int = 16
    devices: int = 1
    accumulate: int = 1


def main(argv: list[str] | None = None) -> int:
    """Returns how many wanted forms the programs lack that the arguments ask for."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")  # for everything but the compilation
    lacking = 0
    for dtype, accumulate, devices in itertools.product(args.dtype, args.accumulate, args.devices):
        case = Case(
            target=args.target,
            what=args.what,
            config=args.config,
            dtype=dtype,
            size=tuple(args.size),
            images=args.images,
            devices=devices,
            accumulate=accumulate,
        )
        name = " ".join(map(str, asdict(case).values()))
        row = compile_case(case)  # minutes: others may have written meanwhile
        rows = harness.read(args.results, "ahead").get("rows", {}) | {name: row}
        harness.write(harness.header("ahead") | {"rows": rows}, args.results)
        wrong = defects(row)
        print(f"{name}: {row['compile_s']:.0f} s", *wrong, sep="\n  ", flush=True)
        lacking += len(wrong)
    print(ahead_table(rows))
    return lacking


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, base = parser.add_argument, Case()
    add("--target", choices=["h100", "v5e"], default=base.target)
    add("--what", choices=["step", "detection"], default=base.what)
    add("--config", default=base.config)
    add("--dtype", nargs="+", choices=["bfloat16", "float32"], default=[base.dtype])
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=base.size, help="padded")
    add("--images", type=int, default=base.images, help="on each device")
    add("--devices", type=int, nargs="+", default=[1], help="of TPUs 1, 4 or 8")
    add("--accumulate", type=int, nargs="+", default=[1])
    add("--results", type=Path, default=harness.RESULTS)
    return parser.parse_args(argv)


def describe_devices(target: str, number: int) -> Any:
    """Returns the devices of a topology that is described only."""
    if target == "h100":
        described = {"target_config": load_systems()["h100_target"]}
        described["topology"] = f"1x1x{number}"  # hosts x processes x GPUs
        return topologies.get_topology_desc("h100", "cuda", **described).devices
    os.environ |= TPU_ENVIRONMENT
    alone: Any = {"chips_per_host_bounds": (1, 1, 1)} if number == 1 else {}
    return topologies.get_topology_desc(f"{target}:{TPU_GRIDS[number]}", "tpu", **alone).devices


def compile_case(case: Case) -> dict[str, Any]:
    """Returns the case and what its compiled program holds."""
    devices = describe_devices(case.target, case.devices)
    config, start = read_config(case.config, [f"--config.model.dtype={case.dtype}"]), time.time()
    lower = lower_step if case.what == "step" else lower_detection
    lowered, state = lower(devices, config, case.size, case.images, case.accumulate)
    compiled = lowered.compile(compiler_options=GPU_OPTIONS if case.target == "h100" else {})
    seconds, memory = time.time() - start, compiled.memory_analysis()
    return asdict(case) | {
        "size": list(case.size),
        "kind": devices[0].device_kind,
        "compile_s": seconds,
        "state_bytes": state,
        "gradient_bytes": gradient_bytes(case.config)["bytes"] if state else 0,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "bytes": (compiled.cost_analysis() or {}).get("bytes accessed", 0.0),  # of TPUs only
        **hlo.read_program(compiled.as_text()),
    }


def lower_step(
    devices: Any, config: Any, size: tuple[int, int], images: int, accumulate: int = 1
) -> tuple[Any, int]:
    """Returns (the lowered train step for devices that cannot hold an array, its state's bytes).

    Args:
      size: (height, width), padded.
      images: on each device.
    """
    mesh = distributed.mesh_of(devices)
    with described_arrays():
        step, state, _ = build_step(config, mesh, accumulate)
        lowered = step.lower(state, batch_shapes(mesh.size * images, SLOTS, *size, mesh))
    return lowered, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def lower_detection(
    devices: Any, config: Any, size: tuple[int, int], images: int, accumulate: int = 1
) -> tuple[Any, int]:
    """Returns (the lowered network and post-processing, 0), kernels as training stores them."""
    mesh, model = distributed.mesh_of(devices), build_model(config, config.model.num_classes)
    number, shape = mesh.size * images, jax.ShapeDtypeStruct
    rows = functools.partial(shape, sharding=distributed.split_by_batch(mesh))
    variables = _described(variable_shapes(model), mesh)
    mean, std = input_statistics(config)
    options = DetectOptions.from_config(config)
    run = functools.partial(detect_images, model, mean=mean, std=std, options=options)
    image, image_size = rows((number, *size, 3), jnp.uint8), rows((number, 2), jnp.int32)
    return jax.jit(run).lower(variables, image, image_size), 0


def _described(tree: Any, placed: Any) -> Any:
    mesh = isinstance(placed, jax.sharding.Mesh)
    placed = distributed.replicated(placed) if mesh else placed
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=placed), tree)


@contextlib.contextmanager
def described_arrays() -> Iterator[None]:
    """Makes what would be put on a mesh's devices shapes only, within the context."""
    put = mock.patch("jax.device_put", _described)
    with put, mock.patch.object(distributed, "copy_to_all", _described):
        yield


def defects(row: Mapping[str, Any]) -> list[str]:
    """Returns what a program of `compile_case` has and should not have, or lacks."""
    found = [f"{n} x {kind} on the host" for kind, n in row["host"].items()]
    layouts, sums = row["convolutions"]["layouts"], {c["kind"]: c for c in row["collectives"]}
    if row["target"] == "h100" and layouts.keys() - {"b01f_o01i->b01f"}:
        found.append(f"convolutions of {layouts}")
    reduce = sums.pop("all-reduce", {"bytes": 0, "in_loops": 0, "types": {}})
    if sums:
        found.append(f"between devices: {sorted(sums)}")
    if row["what"] == "detection":
        found += [f"sums of {reduce['bytes']} bytes"] * bool(reduce["bytes"])
        # The number of candidates decides which masks are looked at.
        if row["conditionals"] > 1 or len(row["loops"]) > 1:
            found.append(f"{row['conditionals']} conditionals, loops of {row['loops']} trips")
        return found
    if row["conditionals"]:
        found.append(f"{row['conditionals']} conditionals")
    # The dice loss in tiles, forward and backward; the microbatches.
    loops = [n for n in row["loops"] if n != row["accumulate"] or n == 1]
    if len(loops) > 2 or any(n is None or n > MOST_TILES for n in loops):
        found.append(f"loops of {row['loops']} trips")
    if row["aliased_bytes"] < row["state_bytes"]:
        found.append(f"{row['aliased_bytes']} bytes donated of a state of {row['state_bytes']}")
    wanted = row["gradient_bytes"] if row["devices"] > 1 else 0
    if not wanted <= reduce["bytes"] <= wanted + METRICS * (wanted > 0):
        found.append(f"{reduce['bytes']} bytes summed, of gradients {wanted}")
    if reduce["in_loops"] or reduce["types"].keys() - {"f32", "s32"}:
        found.append(f"all-reduces of {reduce['types']}, {reduce['in_loops']} in loops")
    return found


if __name__ == "__main__":
    sys.exit(bool(main()))
