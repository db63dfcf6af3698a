"""Is this data set fit for training? A report, and a page with pictures.

    solov2 doctor --config configs/light_448_r50.py \\
        --images photos --annotations train.json \\
        --val_images photos --val_annotations val.json --output doctor
    solov2 doctor --config configs/light_448_r50.py \\
        --config.data.train.images=photos --config.data.train.annotations=train.json

Grids, scale ranges and sizes are the config's. Exit code 0: training may start; 1: it
may not, the errors say why; 2: wrong use, in one line `error: ...`.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from solov2_jax.config_schema import text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

_CONFIG = Flag("config", text("configs/base.py"), "Config file: grids, ranges, sizes.")
_IMAGES = Flag("images", text(), "Folder of the training images.")
_ANNOTATIONS = Flag("annotations", text(), "Instances json of the training data.")
_VAL_IMAGES = Flag("val_images", text(), "Folder of the validation images.")
_VAL_ANNOTATIONS = Flag("val_annotations", text(), "Instances json of the validation data.")
_OUTPUT = Flag("output", text(), "Folder for report.html; empty: no page.")
_MAX_IMAGES = Flag("max_images", whole(0), "Images to read of each data set; 0: all.")
_PICTURES = Flag("pictures", whole(12, high=100_000), "Images to draw on the page.")
_DATA = (_IMAGES, _ANNOTATIONS, _VAL_IMAGES, _VAL_ANNOTATIONS)
FLAGS = (_CONFIG, *_DATA, _OUTPUT, _MAX_IMAGES, _PICTURES)


def examine(overrides: list[str]) -> None:
    """Examines as the flags say."""
    from solov2_jax.config import load_config
    from solov2_jax.tools.doctor.data_report import examine as examine_data
    from solov2_jax.tools.doctor.data_report import settings_of, text_report
    from solov2_jax.tools.doctor.findings import ERROR

    config = load_config(_CONFIG.value, overrides)
    train, val = _files(config)
    report = examine_data(train, val, settings_of(config, _MAX_IMAGES.value))
    app.echo(text_report(report))
    if _OUTPUT.value:
        from solov2_jax.tools.doctor.page import write_page

        path = write_page(report, _OUTPUT.value, _PICTURES.value)
        print(f"pictures and charts: {os.path.abspath(path)}")
    sys.exit(1 if report.verdict == ERROR else 0)


def _files(config: Any) -> tuple[tuple[str, str], tuple[str, str] | None]:
    """Returns what to look at: the flags' data, else the config's."""
    pairs = []
    for images, annotations in ((_IMAGES, _ANNOTATIONS), (_VAL_IMAGES, _VAL_ANNOTATIONS)):
        if bool(images.value) != bool(annotations.value):
            raise InputError(f"give --{images.name} and --{annotations.name} together")
        pairs.append((images.value, annotations.value) if images.value else None)
    train, val = pairs
    if train is None:
        if val:
            raise InputError("--val_images goes with --images")
        from solov2_jax.data.build import data_files

        train, val = data_files(config)
    return train, val


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    app.run(examine, FLAGS, argv=argv, platform=False)
