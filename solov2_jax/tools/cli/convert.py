r"""Converts weights: any known source -> .safetensors, or ours -> AdelaiDet's .pth.

    solov2 convert --input SOLOv2_R50_3x.pth --output solov2_r50_3x.safetensors
    solov2 convert --input resnet50.pth --config configs/r50_3x.py --output weights
    solov2 convert --to adelaidet --input runs/r50 --output model.pth

The source is told by the tensors' names. Nothing in the file is executed. With
--config the weights are also checked against that network. What was written and what
was left out is printed. Exit code 2: an error that the line `error: ...` explains.
"""

import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from solov2_jax.config_schema import choice, several, switch, text
from solov2_jax.io import InputError, make_folder, unmade_if_empty, write_json
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.weights.tables import TABLES

if TYPE_CHECKING:
    from solov2_jax.weights.sources import Weights

INPUT = Flag("input", text(), "Weights file or name, or a run's workdir.", required=True)
SOURCE = Flag("source", choice("auto", ("auto", *TABLES, "solov2_jax")), "Who wrote the file.")
PREFIX = Flag("prefix", text(), "Which network of a file with several, such as student.")
SETTING = Flag(
    "setting",
    several((), text()),
    "KEY=VALUE that the weights were trained with, such as input.channel_order=RGB.",
    repeated=True,
)
_OUTPUT = Flag("output", text(), "File (.safetensors, .pth) or folder to write.", required=True)
_SUFFIX = {"solov2_jax": ".safetensors", "adelaidet": ".pth", "mmdet": ".pth"}
_TO = Flag("to", choice("solov2_jax", tuple(_SUFFIX)), "Names to write.")
_CONFIG = Flag("config", text(), "Check against this config's network.")
_STRICT = Flag("strict", switch(False), "With --config: fill every leaf, use every tensor.")
_SHA256 = Flag("sha256", text(), "Checksum that the input must have.")
FLAGS = (INPUT, _OUTPUT, SOURCE, _TO, _CONFIG, shared.CHECKPOINT, _STRICT)
FLAGS += (PREFIX, _SHA256, SETTING)


def read_input(of_files: Sequence[Flag] = (), sha256: str = "") -> "Weights":
    """Returns the weights of --input; `of_files` are further flags that a folder goes without."""
    from solov2_jax.pretrained import read_folder
    from solov2_jax.weights.hub import open_weights
    from solov2_jax.weights.settings import parse_setting

    place, found = INPUT.value, os.path.isdir(INPUT.value)
    for flag in (SOURCE, PREFIX, SETTING, *of_files) if found else (shared.CHECKPOINT,):
        if flag.present:
            kind = "weights files" if found else "folders of runs"
            raise InputError(f"--{flag.name} is for {kind}, and --input {place} is none")
    if found:
        return read_folder(place, shared.CHECKPOINT.value)
    return open_weights(
        place,
        key="--input",
        source=SOURCE.value,
        sha256=sha256,
        settings=dict(map(parse_setting, SETTING.value)),
        prefix=PREFIX.value,
    )


def _output() -> str:
    """Returns the file to write; in a folder it is named like the input."""
    path, suffix = pathlib.Path(_OUTPUT.value), _SUFFIX[_TO.value]
    if path.suffix not in _SUFFIX.values():
        path = path / (pathlib.Path(INPUT.value).resolve().stem + suffix)
    if path.suffix != suffix:
        raise InputError(f"--output {path}: --to {_TO.value} writes {suffix} files")
    if path.resolve() == pathlib.Path(INPUT.value).resolve():
        raise InputError(f"--output {path} is the input: choose another name")
    return str(path)


def main(overrides: list[str]) -> None:
    if (overrides or _STRICT.value) and not _CONFIG.value:
        raise InputError("--config.KEY and --strict need a --config to check against")
    from solov2_jax.config import load_config
    from solov2_jax.weights.convert import report_of, save_weights
    from solov2_jax.weights.sources import sha256_of

    output, weights = _output(), read_input((_SHA256,), _SHA256.value)
    flat, report = weights.flat, report_of(weights)
    if _CONFIG.value:
        from solov2_jax.weights.convert import check_network

        config = load_config(_CONFIG.value, overrides)
        flat, report = check_network(config, weights, _STRICT.value)
    folder = pathlib.Path(output).parent
    with unmade_if_empty(folder):
        make_folder(folder)
        save_weights(output, flat, weights.settings, _TO.value)
    app.echo(report.summary())
    print("settings: " + json.dumps(weights.settings))
    print(f"wrote {output}: {len(flat)} leaves, sha256 {sha256_of(output)}")
    if output != _OUTPUT.value:
        write_json(report.to_dict(), output + ".report.json")


run = functools.partial(app.run, main, FLAGS)
