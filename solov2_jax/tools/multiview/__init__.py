"""One picture in several views: tiles, and test-time augmentation."""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "TileOptions": "tiling",
        "TtaOptions": "tta",
        "build_views": "build",
    },
)
