"""Images -> predictions.

    from solov2_jax.inference import Prediction, Predictor, draw_prediction

Start reading at `predictor.py`, then `programs.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DetectOptions": "programs:DetectOptions",
        "InputOptions": "preprocess:InputOptions",
        "Prediction": "prediction:Prediction",
        "Predictor": "predictor:Predictor",
        "build_predictor": "predictor:build_predictor",
        "draw_prediction": "draw:draw_prediction",
        "to_coco_results": "prediction:to_coco_results",
    },
)
