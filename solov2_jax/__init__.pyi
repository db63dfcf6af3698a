"""For type checkers: what `__init__.py` imports when it is first asked for."""

from collections.abc import Callable, Mapping
from typing import Any

from solov2_jax.config import load_config as load_config
from solov2_jax.data.coco import load_coco as load_coco
from solov2_jax.inference.predictor import Predictor as Predictor
from solov2_jax.logging import set_up as set_up
from solov2_jax.models import SOLOv2 as SOLOv2
from solov2_jax.tools.report.evaluate_run import evaluate_run as evaluate  # noqa: F401
from solov2_jax.tools.report.evaluate_run import evaluate_run as evaluate_run
from solov2_jax.training.loop import train as train

__version__: str

def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]: ...
