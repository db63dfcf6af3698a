"""The flags by which commands look at an image in several views."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from solov2_jax.tools.multiview.tiling import TileOptions
    from solov2_jax.tools.multiview.tta import TtaOptions

_TILE = flags.DEFINE_integer(
    "tile", 0, "Cut images into tiles with sides of so many pixels. 0: do not."
)
_OVERLAP = flags.DEFINE_float(
    "tile_overlap",
    0.25,
    "Least share of a tile's side that it has in common with the next one.",
)
_WHOLE = flags.DEFINE_bool(
    "tile_whole", False, "Look at the whole image besides the tiles, for large objects."
)
_TTA = flags.DEFINE_list(
    "tta",
    "",
    "Test-time augmentation: 'flip', scales, or both: 'flip,0.8,1,1.25'.",
)


def view_options() -> "tuple[TtaOptions | None, TileOptions | None]":
    """Returns what the flags ask for, None where they do not."""
    tiles = tta = None
    if _TILE.value:
        from solov2_jax.tools.multiview.tiling import TileOptions

        tiles = TileOptions(_TILE.value, _OVERLAP.value, _WHOLE.value)
    elif _OVERLAP.present or _WHOLE.value:
        raise ValueError("--tile_overlap and --tile_whole need --tile, such as 512")
    words = [word.strip() for word in _TTA.value if word.strip()]
    if words:
        from solov2_jax.tools.multiview.tta import TtaOptions

        scales = [_scale(word) for word in words if word != "flip"]
        tta = TtaOptions("flip" in words, tuple(scales) or (1.0,))
    return tta, tiles


def _scale(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(
            f"--tta {word}: neither 'flip' nor a scale; write for example --tta=flip,0.8,1,1.25"
        ) from None
