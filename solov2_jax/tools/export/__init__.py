"""Runs -> StableHLO, ONNX, SavedModel, TFLite, and back into a predictor."""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ExportOptions": "exported:ExportOptions",
        "ExportedPredictor": "exported:ExportedPredictor",
        "export": "run:export",
        "open_export": "load:open_export",
    },
)
