"""Images -> predictions.

    from solov2_jax.inference import Prediction, Predictor, draw_prediction

Start reading at `predictor.py`, then `programs.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DetectOptions": "programs",
        "InputOptions": "preprocess",
        "Prediction": "prediction",
        "Predictor": "predictor",
        "build_predictor": "predictor",
        "draw_prediction": "draw",
        "to_coco_results": "prediction",
    },
)
