"""SOLOv2 instance segmentation in JAX. Start reading at `solov2_jax.structs`.

    from solov2_jax import Predictor, evaluate, load_coco, load_config, train

The names below are those of their modules, imported when they are first asked for: the
data side imports this package too, and knows no JAX.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"


def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns a package's `__getattr__` and `__dir__` [PEP 562].

    Args:
      package: its `__name__`.
      homes: exported name -> its module below the package, with ":name" where it has another
        name there. The package's `__init__.pyi` says the same to type checkers.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = homes[name].partition(":")
        return getattr(importlib.import_module(f"{package}.{module}"), attribute or name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *homes})

    return get, names


__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Predictor": "inference.predictor",
        "SOLOv2": "models",
        "evaluate": "tools.report.evaluate_run:evaluate_run",
        "evaluate_run": "tools.report.evaluate_run",
        "load_coco": "data.coco",
        "load_config": "config",
        "set_up": "logging",
        "train": "training.loop",
    },
)
