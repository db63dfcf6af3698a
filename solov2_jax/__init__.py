"""SOLOv2 instance segmentation in JAX. Start reading at `solov2_jax.structs`.

    from solov2_jax import Predictor, evaluate, load_coco, load_config, train

The names below are those of their modules, imported when they are first asked for: the
data side imports this package too, and knows no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solov2_jax.config import load_config
    from solov2_jax.data.coco import load_coco
    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.logging import set_up
    from solov2_jax.models import SOLOv2
    from solov2_jax.tools.report.evaluate_run import evaluate_run
    from solov2_jax.tools.report.evaluate_run import evaluate_run as evaluate
    from solov2_jax.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Predictor",
    "SOLOv2",
    "evaluate",
    "evaluate_run",
    "load_coco",
    "load_config",
    "set_up",
    "train",
]

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
