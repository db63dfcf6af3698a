"""Time to the first train step and the first prediction of the shipped configs.

    python benchmarks/compile.py                                  # all, a long time
    python benchmarks/compile.py --configs quickstart light_448_r18 --size 256 384

Each figure is a process of its own. "Cold" has an empty folder of compiled programs,
"warm" the folder that the cold one left. One image; its size is the config's padded
test size unless --size gives another. Writes results/compile.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compile_tables
import harness
import report

ROOT = Path(__file__).resolve().parent.parent
SIDE = Path(__file__).with_name("compile_side.py")
# The 1x and 3x schedules of a network are one program with other constants.
CONFIGS = ("quickstart", "light_448_r18", "light_448_r34", "light_448_r50")
CONFIGS += ("r50_1x", "r50_3x", "r101_1x", "r101_3x")


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    add("--what", nargs="+", choices=["step", "prediction"])
    add("--size", type=int, nargs=2, metavar=("H", "W"))
    add("--jax_defaults", action="store_true", help="JAX's own cache settings")
    add("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args(argv)
    path = args.results / "compile.json"
    content = {"name": "compile", "rows": {}}
    if path.exists():
        content = json.loads(path.read_text())
    content["machine"] = report.describe_machine()
    for name in args.configs:
        for what in args.what or ("step", "prediction"):
            row = measure(name, what, args)
            content["rows"][f"{name} {what}"] = row
            report.write(content, args.results)
            print(compile_tables.line(name, what, row), flush=True)
    print(compile_tables.render(content))


def measure(name: str, what: str, args: Any) -> dict[str, Any]:
    """Returns {"cold": phases, "warm": phases} of a config."""
    config = f"configs/{name}.py"
    size = args.size or padded_size(config)
    row: dict[str, Any] = {"config": config, "what": what, "size": list(size)}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            row[state] = start(what, config, size, folder, args.jax_defaults)
        files = [f for f in Path(folder).iterdir() if f.name.endswith("-cache")]
        row["cache_files"] = len(files)
        row["cache_mb"] = sum(f.stat().st_size for f in files) / 1e6
    return row


def padded_size(config: str) -> tuple[int, int]:
    """Returns the padded test size of a config."""
    sys.path.insert(0, str(ROOT))
    from solov2_jax.config import load_config
    from solov2_jax.tools.summary import padded_test_size

    return padded_test_size(load_config(str(ROOT / config), []))


def start(what: str, config: str, size: Any, folder: str, jax_defaults: bool) -> dict[str, Any]:
    """Returns the phases of a fresh process with this folder of compiled programs."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder, "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    if not jax_defaults:  # as cli.py sets it
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, str(SIDE), what, "--config", str(ROOT / config)]
    command += ["--size", *map(str, size), "--started", str(time.time())]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"error: {config} {what}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
