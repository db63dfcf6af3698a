r"""Prints the network of a config as a table: module, output, parameters, FLOPs.

    solov2 summary --config configs/r50_3x.py
    solov2 summary --config light_448_r18 --size 448,768 --depth 2

Nothing is computed and no array allocated: the network is traced with shapes only.
"""

import functools

from solov2_jax.config_schema import text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

_CONFIG = Flag("config", text(), "For example configs/r50_3x.py.", required=True)
_SIZE = Flag("size", text(), "Padded image H,W in pixels, multiples of 32. Default: the test size.")
_DEPTH = Flag("depth", whole(0, high=100), "Levels of modules that are shown. 0: all.")
FLAGS = (_CONFIG, _SIZE, _DEPTH)


def main(overrides: list[str]) -> None:
    size = parse_size(_SIZE.value) if _SIZE.value else None
    from solov2_jax.config import load_config
    from solov2_jax.tools.summary import report

    print(report(load_config(_CONFIG.value, overrides), size, _DEPTH.value))


def parse_size(text: str) -> tuple[int, int]:
    """Returns (height, width) of "H,W"."""
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError as error:
        raise InputError(f"--size {text}: write H,W, for example 800,1344") from error
    if not (0 < height <= 65_536 and 0 < width <= 65_536) or height % 32 or width % 32:
        nearest = (max(-(-min(side, 65_536) // 32), 1) * 32 for side in (height, width))
        raise InputError(
            f"--size {text}: both sides must be positive multiples of 32, for example "
            f"{','.join(map(str, nearest))}"
        )
    return height, width


run = functools.partial(app.run, main, FLAGS, platform=False)
