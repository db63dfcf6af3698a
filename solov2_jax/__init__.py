"""SOLOv2 instance segmentation in JAX. Start reading at `solov2_jax.structs`.

    from solov2_jax import Predictor, evaluate, load_coco, load_config, train

The names below are those of their modules, imported when they are first asked for: the
data side imports this package too, and knows no JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Predictor": "solov2_jax.inference.predictor:Predictor",
    "SOLOv2": "solov2_jax.models:SOLOv2",
    "evaluate": "solov2_jax.tools.report.evaluate_run:evaluate_run",
    "evaluate_run": "solov2_jax.tools.report.evaluate_run:evaluate_run",
    "load_coco": "solov2_jax.data.coco:load_coco",
    "load_config": "solov2_jax.config:load_config",
    "set_up": "solov2_jax.logging:set_up",
    "train": "solov2_jax.training.loop:train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'solov2_jax' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
