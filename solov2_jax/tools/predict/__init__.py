"""Files, folders, videos and cameras -> overlays and results."""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "DetectionFilter": "outputs",
        "FileOptions": "predict_files",
        "find_files": "sources",
        "open_sources": "sources",
    },
)
