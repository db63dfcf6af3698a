"""A predictor -> one that looks at an image in tiles, mirrored or at several sizes."""

import math
from collections.abc import Sequence

from solov2_jax.data.buckets import Bucket
from solov2_jax.inference.predictor import Predictor
from solov2_jax.tools.multiview.merge import NmsOptions
from solov2_jax.tools.multiview.tiling import TiledPredictor, TileOptions
from solov2_jax.tools.multiview.tta import AugmentedPredictor, TtaOptions

# Side of a mask's cell in pixels of the network's input.
CELL = 4


def build_views(
    predictor: Predictor,
    tta: TtaOptions | None,
    tiles: TileOptions | None,
    buckets: Sequence[Bucket] = (),
) -> Predictor | AugmentedPredictor | TiledPredictor:
    """Returns the predictor of the views; with both, each tile is augmented.

    Args:
      tta, tiles: None: not so.
      buckets: padded shapes of whole images at scale 1; (): those of the predictor. A
        tile has a shape of its own.
    """
    # The views of an image are fused on the device that has them.
    changed = predictor.on_first_device() if tta else predictor
    if tiles:
        changed = changed.with_shapes(())
    elif buckets:
        changed = changed.with_shapes(buckets)
    names = NmsOptions.__dataclass_fields__
    nms = NmsOptions(**{name: getattr(predictor.options, name) for name in names})
    looking = AugmentedPredictor(changed, tta, nms) if tta else changed
    if not tiles:
        return looking
    input_ = predictor.input
    side = min(input_.min_size, input_.max_size)  # of a tile at the network
    reverse = input_.channel_order == "BGR" and input_.pixels.channels == 3
    fill = input_.pixels.values_of(input_.mean[::-1] if reverse else input_.mean)
    border = math.ceil(CELL * tiles.size / side)
    return TiledPredictor(looking, tiles, nms, border, fill)
