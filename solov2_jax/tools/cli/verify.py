r"""Runs converted weights, and where it is installed the program they are from, on one picture.

    solov2 verify --input SOLOv2_R101_DCN.pth --python ~/mmdet/bin/python
    solov2 verify --input resnet50.pth --image street.jpg --size 512,768
    solov2 verify --input runs/r50 --output report.json

Printed are the largest difference of each tensor, also in units of its spread, and of each
detection the class, the scores and the masks' overlap. The picture goes into both programs
with the same pixels, in float32. The other program runs in a process of its own, by --python:
mmdetection needs another environment than this one. Where it is missing, the line `not
compared: ...` says what to install; then it is checked that every tensor is used, that all
results are finite, and the detections are listed.

Exit code 1: a difference that rounding does not explain, or NaN. Exit code 2: an error that
the line `error: ...` explains.
"""

import functools
import os
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from solov2_jax.config_schema import text
from solov2_jax.io import InputError, write_json
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.convert import INPUT, PREFIX, SETTING, SOURCE, read_input
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.cli.summary import parse_size

if TYPE_CHECKING:
    import numpy as np

    from solov2_jax.weights.sources import Weights

_CONFIG = Flag("config", text(), "Of the network. Default: what the weights tell by themselves.")
_IMAGE = Flag("image", text(), "Picture. Default: squares and noise, always the same.")
_SIZE = Flag("size", text("256,320"), "H,W in pixels that it is resized to, multiples of 32.")
_PYTHON = Flag("python", text(), "Interpreter that has the other program. Default: this one.")
_OUTPUT = Flag("output", text(), "File of JSON to write with the differences.")
FLAGS = (INPUT, shared.CHECKPOINT, SOURCE, PREFIX, _CONFIG, SETTING)
FLAGS += (_IMAGE, _SIZE, _PYTHON, _OUTPUT)


def main(overrides: list[str]) -> None:
    size = parse_size(_SIZE.value)
    if overrides and not _CONFIG.value:
        raise InputError(f"{overrides[0]}: give the --config that it changes")
    if _OUTPUT.value and not pathlib.Path(_OUTPUT.value).resolve().parent.is_dir():
        raise InputError(f"--output {_OUTPUT.value}: its folder is not there")
    picture = _picture(size)
    weights, config = _read(overrides)
    from solov2_jax.tools.verify import ours

    is_backbone = weights.num_classes is None
    with ours.highest_precision():
        run = ours.run_backbone if is_backbone else ours.run_network
        computed, report = run(config, weights, picture)
    app.echo(report.summary())
    bad = ours.not_finite(computed)
    found: dict[str, Any] = {"input": INPUT.value, "source": weights.source, "not_finite": bad}
    found |= _compare(weights, config, computed, picture)
    if _OUTPUT.value:
        write_json(found, _OUTPUT.value)
    wrong = [f"NaN or infinity in {name}" for name in bad] + found.get("wrong", [])
    if wrong:
        print(f"DIFFERENT: {'; '.join(wrong)}")
        sys.exit(1)
    print("the same, but for rounding" if "wrong" in found else "nothing wrong was found")


def _picture(size: tuple[int, int]) -> "np.ndarray":
    """Returns the picture, RGB uint8, of the size."""
    from solov2_jax.tools.verify.ours import example_picture

    if not _IMAGE.value:
        return example_picture(*size)
    from solov2_jax.data.images import read_image
    from solov2_jax.data.transforms import resize_image

    return resize_image(read_image(_IMAGE.value), *size)


def _read(overrides: list[str]) -> "tuple[Weights, Any]":
    """Returns the weights, and the config of their network."""
    from solov2_jax.config import given_keys, load_config
    from solov2_jax.pretrained import load_run_config
    from solov2_jax.tools.verify.ours import config_of
    from solov2_jax.weights.settings import adopt_settings

    weights = read_input((_CONFIG,))
    if os.path.isdir(INPUT.value):
        return weights, load_run_config(INPUT.value)
    if not _CONFIG.value:
        return weights, config_of(weights)
    config = load_config(_CONFIG.value, overrides)
    line = adopt_settings(weights.settings, config, given_keys(overrides), weights.path)
    if line:
        app.echo(line)
    return weights, config


def _compare(
    weights: "Weights", config: Any, computed: Any, picture: "np.ndarray"
) -> dict[str, Any]:
    """Returns the figures of the comparison, printed; {} where there is nothing to compare."""
    from solov2_jax.tools.verify import compare, ours
    from solov2_jax.tools.verify.original import Unavailable, find_original, run_original

    classes = weights.num_classes or 0
    names = weights.class_names or [f"class {i + 1}" for i in range(classes)]
    original = find_original(config, weights, PREFIX.value)
    theirs: Any = original
    if not isinstance(original, Unavailable):
        image = ours.normalised(config, picture)
        with tempfile.TemporaryDirectory() as folder:
            python = _PYTHON.value or sys.executable
            theirs = run_original(original, config, image, pathlib.Path(folder), python)
    if isinstance(original, Unavailable) or isinstance(theirs, Unavailable):
        app.echo("\n".join(ours.describe(computed, names)))
        app.echo(f"not compared: {theirs.reason}")
        return {"not_compared": theirs.reason}
    differences = compare.compare(computed, theirs)
    app.echo(f"beside {original.described}")
    app.echo("\n".join(compare.describe(differences, names)))
    return differences.figures()


run = functools.partial(app.run, main, FLAGS)
