"""Whole commands, from their start to the files they write: what a user waits for.

    python benchmarks/first_use.py --images PHOTOGRAPHS --peer_dir .cache/peer
    python benchmarks/first_use.py --images PHOTOGRAPHS --workdir runs/r50 --what evaluate

A cold run has an empty folder of compiled programs, a warm one what the cold run left.
The peer, mmdetection with the same weights, reads the same files and writes the same
kind of results; it compiles nothing. Nothing else may run meanwhile. Writes
results/first_use.json; a part that is measured replaces what was there of it.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
import harness
from tables import first_use_table

PARTS = ("predict", "evaluate", "train")
CONFIGS = ("r50_3x", "light_448_r18")
COMPILED = re.compile(r"compiling (?:for|the train step)(?!.*still at it)")


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, required=True, help="a folder of photographs")
    add("--counts", type=int, nargs="+", default=[1, 4, 20], help="of them, in order of names")
    add("--configs", nargs="+", default=list(CONFIGS))
    add("--what", nargs="+", choices=PARTS, default=["predict", "train"])
    add("--workdir", type=Path, help="a run whose validation images `evaluate` takes")
    add("--peer_dir", type=Path, help="the peer's environment; none: ours alone")
    add("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args(argv)
    if "evaluate" in args.what and not args.workdir:
        parser.error("--what evaluate needs --workdir")
    content = {"rows": {}, **harness.read(args.results, "first_use")}
    content |= harness.header("first_use")
    with tempfile.TemporaryDirectory() as scratch:
        for name, row in measure(args, Path(scratch)):
            content["rows"][name] = row
            harness.write(content, args.results)
            print(name, row, flush=True)
    print(first_use_table(content))


def measure(args: Any, scratch: Path) -> Any:
    """Yields (name, {"ours cold": figures, ...}) of every part."""
    if "predict" in args.what:
        for config in args.configs:
            yield from predictions(args, config, scratch)
    if "evaluate" in args.what:
        command = ["evaluate.py", "--workdir", str(args.workdir), "--output"]
        yield f"evaluation of {args.workdir.name}", cold_and_warm(command, scratch)
    if "train" in args.what:
        command = ["train.py", "--config", "quickstart", "--config.train.steps=1", "--workdir"]
        yield "quickstart, to the end of its first step", cold_and_warm(command, scratch)


def predictions(args: Any, name: str, scratch: Path) -> Any:
    """Yields the rows of one config: folders of so many photographs."""
    config = cases.read_config(f"configs/{name}.py")
    weights, case = cases.write_weights(config), scratch / name
    case.mkdir()
    cases.write_case(case, config, {})
    photographs = sorted(p for p in args.images.iterdir() if p.suffix in (".jpg", ".png"))
    for count in args.counts:
        folder = case / str(count)
        folder.mkdir()
        for path in photographs[:count]:
            (folder / path.name).symlink_to(path.resolve())
        given = ["--config", f"configs/{name}.py", "--weights", weights["adelaidet"]]
        given += [f"--config.model.num_classes={config.model.num_classes}", "--score", "0"]
        given += ["--write", "coco", "--input", str(folder), "--output"]
        row = cold_and_warm(["predict.py", *given], scratch)
        for allocator in ("default", "tuned") if args.peer_dir else ():
            command = [str(args.peer_dir / "bin" / "python"), str(harness.HERE / "torch_folder.py")]
            command += ["--case", str(case), "--images", str(folder)]
            environment = os.environ | harness.ALLOCATORS[allocator]
            row[f"mmdetection, {allocator} allocator"] = timed(command, environment)
        yield f"`{name}`, {count} photograph{'s' if count > 1 else ''}", row


def cold_and_warm(command: list[str], scratch: Path) -> dict[str, Any]:
    """Returns the figures of a command's first and second run.

    Args:
      command: of this repository; a folder to write to is added.
    """
    figures = {}
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        for start in ("cold", "warm"):
            with tempfile.TemporaryDirectory(dir=scratch) as output:
                whole = [sys.executable, *command, str(Path(output) / "out")]
                figures[f"ours, {start}"] = timed(whole, environment)
    return figures


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Returns seconds, CPU seconds, and how many detection and training programs it had."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    programs = len(COMPILED.findall(done.stdout))
    return {"seconds": seconds, "cpu_seconds": cpu, "programs": programs}


if __name__ == "__main__":
    main(sys.argv[1:])
