"""SOLOv2 instance segmentation in JAX. Start reading at `solov2_jax.structs`.

`solov2_jax.train`, `Predictor` and the other names below are those of their modules,
imported when they are first asked for: the data side imports this package too, and
knows no JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Predictor": "solov2_jax.inference.predictor",
    "evaluate_run": "solov2_jax.tools.report.evaluate_run",
    "load_config": "solov2_jax.config",
    "set_up": "solov2_jax.logging",
    "train": "solov2_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'solov2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
