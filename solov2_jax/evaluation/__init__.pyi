"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.evaluation.coco import CocoEvaluator as CocoEvaluator
from solov2_jax.evaluation.evaluate import build_evaluator as build_evaluator
from solov2_jax.evaluation.evaluators import (
    Evaluator as Evaluator,
)
from solov2_jax.evaluation.evaluators import (
    make_evaluator as make_evaluator,
)
