"""Files, folders, videos and cameras -> overlays and results."""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DetectionFilter": "outputs:DetectionFilter",
        "FileOptions": "predict_files:FileOptions",
        "find_files": "sources:find_files",
        "open_sources": "sources:open_sources",
    },
)
