"""The train step compiled for GPUs and TPUs that are not there: what it would send.

    pip install libtpu==0.0.42.1             # or jax-cuda12-plugin, jax-cuda12-pjrt
    python benchmarks/ahead.py tpu v5e:2x4
    python benchmarks/ahead.py cuda 1x1x8    # hosts x processes x GPUs

XLA compiles for a described topology without a device; nothing runs, so there is no
time among the figures. The plugins belong into an environment of their own: where one
is installed, JAX looks for its chips at every start. Adds a row to the part "ahead" of
results/scaling.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import report
from collectives import read_collectives, summed

# XLA asks for the GPU that is to be compiled for; NVIDIA's H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(argv: list[str]) -> None:
    """Compiles what the arguments ask for and writes what the program holds."""
    args = parse(argv)
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # must be something; not what counts
    }
    if args.platform == "cuda":
        # Forms are chosen by timing them, which needs the GPU; Triton's, whose tiles
        # are chosen so, do not compile without.
        flags = os.environ.get("XLA_FLAGS", "")
        flags += " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = flags
    compiled, seconds, devices = compile_ahead(args)
    memory = compiled.memory_analysis()
    row = {
        "config": args.config,
        "dtype": args.dtype,
        "size": args.size,
        "images_per_chip": args.images,
        "chips": len(devices),
        "kind": devices[0].device_kind,
        "compile_s": seconds,
        "collectives": summed(read_collectives(compiled.as_text())),
        "memory_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
    }
    print(json.dumps(row))
    path = args.results / "scaling.json"
    content = json.loads(path.read_text()) if path.exists() else {"name": "scaling"}
    name = Path(args.config).stem
    label = f"{args.platform} {args.topology} {name} {args.dtype}"
    content.setdefault("ahead", {})[label] = row
    report.write(content, args.results)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("platform", choices=["tpu", "cuda"])
    add("topology", help="v5e:2x4, v4:2x2x2, ...; for cuda 1x1x8")
    add("--config", default="configs/r50_3x.py")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--size", type=int, nargs=2, default=[800, 1344], help="padded")
    add("--images", type=int, default=2, help="per chip")
    add("--results", type=Path, default=harness.RESULTS)
    return parser.parse_args(argv)


def compile_ahead(args: Any) -> tuple[Any, float, Any]:
    """Returns (compiled step, seconds it took, the chips it is for)."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh
    from jax_side import ROOT
    from step_case import StepCase, make_batch

    from solov2_jax.config import load_config
    from solov2_jax.training import sharding

    jax.config.update("jax_platforms", "cpu")  # for everything but the compilation
    options = {"target_config": H100, "topology": args.topology}
    if args.platform == "tpu":
        topology = topologies.get_topology_desc(args.topology, "tpu")
    else:
        topology = topologies.get_topology_desc("h100", "cuda", **options)
    devices = topology.devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    config = load_config(str(ROOT / args.config), [])
    with config.unlocked():
        config.model.dtype = args.dtype
    # The convolutions' form depends on the backend, which is the CPU's here.
    backend = {"tpu": "tpu", "cuda": "gpu"}[args.platform]
    with (
        mock.patch("jax.default_backend", lambda: backend),
        mock.patch("jax.device_put", described),
    ):
        case = StepCase(config, mesh)
        rows = make_batch(1, *args.size, config.model.num_classes)
        by_batch, n = sharding.split_by_batch(mesh), len(devices) * args.images
        batch = {
            k: jax.ShapeDtypeStruct((n, *v.shape[1:]), v.dtype, sharding=by_batch)
            for k, v in rows.items()
        }
        start = time.perf_counter()
        compiled = case.step.lower(case.abstract_state(), batch).compile()
    return compiled, time.perf_counter() - start, devices


def described(array: Any, sharding: Any) -> Any:
    """Returns the shape of an array on chips that cannot hold one."""
    import jax

    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


if __name__ == "__main__":
    main(sys.argv[1:])
