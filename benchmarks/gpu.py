"""One GPU, one run under eight minutes: ours beside PyTorch, everything that is asked.

    bash benchmarks/gpu.sh                    # on the GPU
    python benchmarks/gpu.py --tiny           # the same on the CPU, tiny, for tests

Train steps and inference by precision and batch, the chip's own matrix rate, memory,
compile times, post-processing of 100 masks, and where a train step's time goes. Jobs go
from the most to the least wanted; what the time does not allow is listed as skipped.
Both programs have a process of their own, one after the other: ours first. The torch
side runs in --torch_python, an environment with torch and CUDA; without one its figures
are missing and the output says so. Writes results/gpu.json.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gpu_tables
import harness
import report

HERE = Path(__file__).resolve().parent
OURS = (
    "matmul:bfloat16 train:bfloat16:16 profile:bfloat16:16 infer:bfloat16:1 "
    "post:bfloat16 train:bfloat16:1 infer:bfloat16:16 matmul:tf32 train:tf32:16 "
    "infer:tf32:1 infer:tf32:16 train:tf32:1 train:bfloat16:8 infer:bfloat16:8 "
    "train:bfloat16:4 infer:bfloat16:4 train:bfloat16:2 infer:bfloat16:2"
).split()
TORCH = (
    "train:bfloat16:16:eager infer:bfloat16:1:eager train:bfloat16:1:eager "
    "infer:bfloat16:16:eager train:bfloat16:16:compile infer:bfloat16:1:compile "
    "train:tf32:16:eager infer:tf32:1:eager infer:bfloat16:16:compile "
    "infer:tf32:16:eager train:tf32:1:eager"
).split()
TINY_OURS = (
    "matmul:bfloat16 matmul:tf32 train:tf32:2 profile:tf32:2 infer:tf32:1 post:tf32"
).split()
TINY_TORCH = "train:tf32:2:eager infer:tf32:1:eager".split()


def main(argv: list[str]) -> dict[str, Any]:
    """Measures what the arguments ask for; returns what was written."""
    args = parse(argv)
    start = time.time()
    content: dict[str, Any] = {
        "name": "gpu-tiny" if args.tiny else "gpu",
        "date": datetime.date.today().isoformat(),
        "machine": report.describe_machine(),
        "config": args.config,
        "size": list(args.size),
    }
    # A third of the time is torch's, if there is a torch.
    share = 0.66 if args.torch_python else 0.97
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder)
        make_case(case, args)
        common = ["--case", folder, "--seconds", str(args.seconds)]
        common += ["--matmul", "256" if args.tiny else "8192"]
        jobs = args.ours or (TINY_OURS if args.tiny else OURS)
        command = [sys.executable, str(HERE / "gpu_jax.py"), *jobs, *common]
        content["ours"] = side(command, start + share * args.limit)
        content["torch"] = {"missing": "no --torch_python was given"}
        if args.torch_python:
            jobs = args.torch or (TINY_TORCH if args.tiny else TORCH)
            command = [args.torch_python, str(HERE / "gpu_torch.py"), *jobs, *common]
            command += ["--cpu"] if args.tiny else []
            content["torch"] = side(command, start + 0.97 * args.limit)
    content["total_s"] = time.time() - start
    report.write(content, args.results)
    print(gpu_tables.render(content))
    return content


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", default="configs/r50_3x.py")
    add("--size", type=int, nargs=2, help="padded; default 800 1344")
    add("--limit", type=float, default=470.0, help="seconds for all of it")
    add("--seconds", type=float, default=2.0, help="of each timing")
    add("--ours", nargs="+", help="our jobs, see gpu_jax.py")
    add("--torch", nargs="+", help="torch's jobs, see gpu_torch.py")
    add("--torch_python", help="python of an environment with torch and CUDA")
    add("--tiny", action="store_true", help="on the CPU, tiny: no figure to report")
    add("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args(argv)
    args.size = args.size or ([64, 64] if args.tiny else [800, 1344])
    if args.tiny:
        args.seconds = 0.0
    return args


def make_case(folder: Path, args: Any) -> None:
    """Writes the case in a process of its own, on the CPU: the GPU stays free."""
    command = [sys.executable, str(HERE / "gpu_case.py"), "--folder", str(folder)]
    command += ["--config", args.config, "--size", *map(str, args.size)]
    command += ["--batch", "2", "--tiny"] if args.tiny else ["--batch", "16"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=env, check=True)


def side(command: list[str], deadline: float) -> dict[str, Any]:
    """Returns {"about": ..., "jobs": {job: figures}} of a side that ends in time."""
    command = [*command, "--deadline", str(deadline)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A job that has started late is cut off: a compilation cannot be asked to stop.
    timer = threading.Timer(max(1.0, deadline + 5 - time.time()), process.kill)
    errors: list[str] = []
    assert process.stdout and process.stderr
    reader = threading.Thread(target=lambda e=process.stderr: errors.extend(e))
    timer.start()
    reader.start()
    found: dict[str, Any] = {"about": {}, "jobs": {}}
    for line in process.stdout:
        reply = json.loads(line)
        if "about" in reply:
            found["about"] = reply["about"]
            continue
        found["jobs"][reply.pop("job")] = reply
        print(json.dumps(reply)[:160], flush=True)
    code = process.wait()
    timer.cancel()
    reader.join()
    process.stdout.close()
    process.stderr.close()
    if code:
        found["missing"] = f"exit code {code}: " + " ".join(errors[-3:]).strip()[-400:]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
