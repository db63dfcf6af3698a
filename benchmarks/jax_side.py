"""What the workers of our side share: set-up, counting compilations, versions."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import jax.monitoring  # noqa: E402

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts XLA compilations, also those that the persistent cache answers."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        if name == _COMPILED:
            self.count += 1
            self.seconds += seconds

    def __call__(self) -> int:
        """Returns the compilations so far."""
        return self.count


def about(counter: CompileCounter, first_call_s: float) -> dict[str, Any]:
    """Returns versions, threads and compile times for a worker's `about`."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    return {
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "threads": len(os.sched_getaffinity(0)),
        "first_call_s": first_call_s,
        "compile_s": counter.seconds,
        "compilation_cache": bool(cache),
    }
