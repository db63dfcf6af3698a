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

import harness
from tables import compile_table

# The 1x and 3x schedules of a network are one program with other constants.
CONFIGS = ("quickstart", "light_448_r18", "light_448_r34", "light_448_r50", "r50_3x", "r101_3x")
# Of the compile event: with the persistent cache, looking up and reading or compiling.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for, or is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--configs", nargs="+", default=list(CONFIGS))
    add("--what", nargs="+", choices=["step", "prediction"], default=["step", "prediction"])
    add("--size", type=int, nargs=2, metavar=("H", "W"))
    add("--results", type=Path, default=harness.RESULTS)
    add("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.started:
        print(json.dumps(phases(args.what[0], args.configs[0], tuple(args.size), args.started)))
        return
    content = {"rows": {}, **harness.read(args.results, "compile")}
    content["machine"] = harness.describe_machine()
    for name in args.configs:
        for what in args.what:
            content["rows"][f"{name} {what}"] = measure(what, name, args.size or padded(name))
            harness.write(content, args.results)
    print(compile_table(content))


def padded(name: str) -> tuple[int, int]:
    """Returns the padded test size of a config."""
    from cases import read_config

    from solov2_jax.tools.summary import padded_test_size

    return padded_test_size(read_config(f"configs/{name}.py"))


def measure(what: str, name: str, size: Any) -> dict[str, Any]:
    """Returns {"cold": phases, "warm": phases} of a config."""
    command = [sys.executable, __file__, "--what", what, "--configs", name]
    command += ["--size", *map(str, size)]
    row: dict[str, Any] = {"config": f"configs/{name}.py", "what": what, "size": list(size)}
    with tempfile.TemporaryDirectory() as folder:
        # Every program is kept, as the commands do.
        env = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PLATFORMS": "cpu"}
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for state in ("cold", "warm"):
            started = [*command, "--started", str(time.time())]
            done = subprocess.run(started, env=os.environ | env, text=True, capture_output=True)
            if done.returncode:
                raise SystemExit(f"error: {name} {what}: {done.stderr[-2000:]}")
            row[state] = json.loads(done.stdout.splitlines()[-1])
        sizes = [f.stat().st_size for f in Path(folder).glob("*-cache")]
        return row | {"cache_mb": sum(sizes) / 1e6}


def phases(what: str, name: str, size: tuple[int, int], started: float) -> dict[str, Any]:
    """Returns seconds and compilations of imports, the first and a second result.

    The second step or prediction must compile nothing.
    """
    rows: dict[str, Any] = {}
    spans: dict[str, list[tuple[float, float]]] = {}
    hits: list[str] = []
    last = started

    def phase(label: str) -> None:
        nonlocal last
        now, seconds = time.time(), {k: covered(spans.get(k, [])) for k in EVENTS.values()}
        cached = {"programs": len(spans.get("compile", [])), "hits": len(hits)}
        rows[label] = {"seconds": now - last, **seconds, **cached}
        spans.clear()
        hits.clear()
        last = now

    def on_span(event: str, seconds: float, **_: Any) -> None:
        if kind := EVENTS.get(event):
            spans.setdefault(kind, []).append((time.time() - seconds, time.time()))

    def on_event(event: str, **_: Any) -> None:
        hits.extend([event] if event == "/jax/compilation_cache/cache_hits" else [])

    import cases
    import jax

    from solov2_jax.distributed import put_batch
    from solov2_jax.inference.predictor import build_predictor

    phase("imports")
    jax.monitoring.register_event_duration_secs_listener(on_span)
    jax.monitoring.register_event_listener(on_event)
    config = cases.read_config(f"configs/{name}.py")
    if what == "step":
        step, shapes, mesh = cases.build_step(config)
        state = cases.start_state(shapes)
        batch = put_batch(cases.make_train_batch(config, size, 1), mesh)
        for label in ("first", "second"):
            state, _ = jax.block_until_ready(step(state, batch))
            phase(label)
    else:
        model = cases.build_model(config, config.model.num_classes)
        variables = cases.noise(cases.variable_shapes(model))
        predictor = build_predictor(config, model, variables)
        for label in ("first", "second"):
            assert len(list(predictor.predict_images(list(cases.make_images(size, 1))))) == 1
            phase(label)
    return rows


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the seconds in any of the spans: those inside others count once."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
