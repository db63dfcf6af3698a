"""Training: `train(config, workdir)`, and what one derives from or builds on.

    from solov2_jax.training import HookBase, WriterBase, train

Imported when they are first asked for; start reading at `loop.py`, then `step.py`.
"""

import importlib
from typing import Any

_MODULES = {
    "HookBase": "hooks",
    "Loss": "loss",
    "Run": "hooks",
    "Task": "build",
    "TrainState": "step",
    "TrainStep": "step",
    "WriterBase": "writers",
    "build_loss": "loss",
    "build_task": "build",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'solov2_jax.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
