"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.tools.multiview.build import build_views as build_views
from solov2_jax.tools.multiview.tiling import TileOptions as TileOptions
from solov2_jax.tools.multiview.tta import TtaOptions as TtaOptions
