"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.inference.draw import draw_prediction as draw_prediction
from solov2_jax.inference.prediction import (
    Prediction as Prediction,
)
from solov2_jax.inference.prediction import (
    to_coco_results as to_coco_results,
)
from solov2_jax.inference.predictor import (
    Predictor as Predictor,
)
from solov2_jax.inference.predictor import (
    build_predictor as build_predictor,
)
from solov2_jax.inference.preprocess import InputOptions as InputOptions
from solov2_jax.inference.programs import DetectOptions as DetectOptions
