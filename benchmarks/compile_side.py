"""Worker of compile.py: from the start of a process to its first step or prediction.

Prints one json line: seconds by phase, and in each phase what JAX spent on tracing,
lowering and compiling, how many programs it compiled and how many the cache had.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
# With the persistent cache: looking the program up, and reading or compiling it.
_COMPILE = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


class Phases:
    """Seconds and compilations between the phases' ends."""

    def __init__(self, started: float):
        self.found: dict[str, dict[str, float]] = {}
        self._at, self._cpu = started, 0.0
        self._spans: dict[str, list[tuple[float, float]]] = {}
        self._hits = 0

    def watch(self) -> None:
        """Listens to JAX from now on."""
        import jax.monitoring

        def span(name: str, seconds: float, **_: Any) -> None:
            now = time.time()
            self._spans.setdefault(name, []).append((now - seconds, now))

        def event(name: str, **_: Any) -> None:
            self._hits += name == _HIT

        jax.monitoring.register_event_duration_secs_listener(span)
        jax.monitoring.register_event_listener(event)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._spans, self._hits = {}, 0
        yield
        now = time.time()
        spans = {k: self._spans.get(k, []) for k in (_TRACE, _LOWER, _COMPILE)}
        trace, lower, load = (covered(s) for s in spans.values())
        self.found[name] = {
            "seconds": now - self._at,
            "cpu": time.process_time() - self._cpu,
            "trace": trace,
            "lower": lower,
            "compile": load,
            "programs": len(spans[_COMPILE]),
            "hits": self._hits,
        }
        self._at, self._cpu = now, time.process_time()


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the seconds in any of the spans: those inside others count once."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def first_step(config: Any, args: Any, phases: Phases) -> None:
    """Goes as far as a second train step, which must compile nothing."""
    with phases("imports"):
        import jax
        from step_case import StepCase, make_batch

        import solov2_jax.training.loop  # noqa: F401

        phases.watch()
    with phases("network"):
        case = StepCase(config)
    with phases("weights"):
        state = jax.block_until_ready(case.state())
    classes = case.config.model.num_classes
    with phases("first"):
        batch = case.put(make_batch(args.batch, *args.size, classes))
        state, _ = jax.block_until_ready(case.step(state, batch))
    with phases("second"):
        jax.block_until_ready(case.step(state, batch))


def first_prediction(config: Any, args: Any, phases: Phases) -> None:
    """Goes as far as a second prediction, which must compile nothing."""
    with phases("imports"):
        import numpy as np
        from step_case import NUM_CLASSES, noise_variables

        from solov2_jax.inference.predictor import build_predictor
        from solov2_jax.models import build_model

        phases.watch()
    with phases("network"):
        model = build_model(config, config.model.num_classes or NUM_CLASSES)
    with phases("weights"):
        predictor = build_predictor(config, model, noise_variables(model))
    image = np.random.default_rng(0).integers(0, 255, (*args.size, 3), np.uint8)
    with phases("first"):
        (prediction,) = predictor.predict_images([image])
    phases.found["first"]["detections"] = len(prediction)
    with phases("second"):
        list(predictor.predict_images([image]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "prediction"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--size", type=int, nargs=2, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--started", type=float, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from solov2_jax.config import load_config

    phases = Phases(args.started)
    work = {"step": first_step, "prediction": first_prediction}[args.what]
    work(load_config(args.config, []), args, phases)
    print(json.dumps(phases.found))


if __name__ == "__main__":
    main()
