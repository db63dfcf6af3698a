"""Predictions -> AP. Start reading at `evaluate.py`.

    from solov2_jax.evaluation import Evaluator, build_evaluator

`solov2_jax.evaluate` is the whole command; a metric of one's own is an `Evaluator`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CocoEvaluator": "coco",
        "Evaluator": "evaluators",
        "build_evaluator": "evaluate",
        "make_evaluator": "evaluators",
    },
)
