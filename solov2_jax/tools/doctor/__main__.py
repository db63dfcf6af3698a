"""Is this data set fit for training? A report, and a page with pictures.

    python -m solov2_jax.tools.doctor --config configs/light_448_r50.py \\
        --images photos --annotations train.json \\
        --val_images photos --val_annotations val.json --output doctor
    python -m solov2_jax.tools.doctor --config configs/light_448_r50.py \\
        --config.data.train.images=photos --config.data.train.annotations=train.json

Grids, scale ranges and sizes are the config's. Exit code 0: training may start; 1: it
may not, the errors say why; 2: wrong use, in one line `error: ...`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from solov2_jax.config import load_config, split_overrides
from solov2_jax.data.build import data_files
from solov2_jax.tools.cli.plain import command
from solov2_jax.tools.doctor.findings import ERROR
from solov2_jax.tools.doctor.page import write_page
from solov2_jax.tools.doctor.report import text_report
from solov2_jax.tools.doctor.study import settings_of, study


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    top = argparse.ArgumentParser(
        prog="python -m solov2_jax.tools.doctor",
        description="Reports on a data set, and whether training may start.",
        epilog="Keys of the config are set by --config.a.b=value.",
    )
    top.add_argument("--config", default="configs/base.py", help="grids, ranges, sizes")
    top.add_argument("--images", help="folder of the training images")
    top.add_argument("--annotations", help="instances json of the training data")
    top.add_argument("--val_images", help="folder of the validation images")
    top.add_argument("--val_annotations", help="instances json of the validation data")
    top.add_argument("--output", default="", help="folder for report.html; '': none")
    top.add_argument("--max_images", type=int, default=0, help="looked at in each part; 0: all")
    top.add_argument("--pictures", type=int, default=12, help="in the page")
    return top


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Examines as the arguments say."""
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else list(argv))
    args = parser().parse_args(rest)
    config = load_config(args.config, overrides)
    train, val = _files(args, config)
    result = study(train, val, settings_of(config, args.max_images))
    print(text_report(result))
    if args.output:
        path = write_page(result, args.output, args.pictures)
        print(f"pictures and charts: {os.path.abspath(path)}")
    sys.exit(1 if result.verdict == ERROR else 0)


def _files(args: argparse.Namespace, config: Any) -> tuple[tuple[str, str], tuple[str, str] | None]:
    """Returns what to look at: the arguments' data, else the config's."""
    pairs = []
    for images, annotations, names in (
        (args.images, args.annotations, "--images and --annotations"),
        (args.val_images, args.val_annotations, "--val_images and --val_annotations"),
    ):
        if bool(images) != bool(annotations):
            raise ValueError(f"give {names} together")
        pairs.append((images, annotations) if images else None)
    train, val = pairs
    if train is None:
        if val:
            raise ValueError("--val_images goes with --images")
        train, val = data_files(config)
    return train, val


if __name__ == "__main__":
    main()
