r"""Converts weights: any known source -> .safetensors, or ours -> AdelaiDet's .pth.

    solov2-convert --input SOLOv2_R50_3x.pth --output solov2_r50_3x.safetensors
    solov2-convert --input resnet50.pth --config configs/r50_3x.py --output weights
    solov2-convert --to adelaidet --input runs/r50 --output model.pth

The source is told by the tensors' names. Nothing in the file is executed. With
--config the weights are also checked against that network. What was written and what
was left out is printed. Exit code 2: an error that the line `error: ...` explains.
"""

import json
import os
import pathlib

from absl import flags

from solov2_jax.config import load_config
from solov2_jax.io import write_json
from solov2_jax.tools.cli import app
from solov2_jax.weights.convert import report_of, save_weights
from solov2_jax.weights.settings import parse_setting
from solov2_jax.weights.sources import SOURCES, Weights, read_weights, sha256_of

_INPUT = flags.DEFINE_string("input", None, "Weights file, or a run's workdir.", required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "File to write (.safetensors or .pth), or a folder.", required=True
)
_SOURCE = flags.DEFINE_enum("source", "auto", SOURCES, "Who wrote the file.")
_SUFFIX = {"solov2_jax": ".safetensors", "adelaidet": ".pth"}
_TO = flags.DEFINE_enum("to", "solov2_jax", list(_SUFFIX), "Names to write.")
_CONFIG = flags.DEFINE_string("config", "", "Check against this config's network.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "Of a workdir: last, best or a step.")
_STRICT = flags.DEFINE_bool(
    "strict", False, "With --config: every leaf must be filled, every tensor known."
)
_PREFIX = flags.DEFINE_string(
    "prefix", "", "The network to take where the file has several, such as student."
)
_SHA256 = flags.DEFINE_string("sha256", "", "Checksum that the input must have.")
_SETTING = flags.DEFINE_multi_string(
    "setting",
    [],
    "KEY=VALUE that the weights were trained with, where it differs from their "
    "source's convention, such as input.channel_order=RGB. May be repeated.",
)


def _read() -> Weights:
    if os.path.isdir(_INPUT.value):
        if _SHA256.value or _SETTING.value or _PREFIX.value:
            raise ValueError("--sha256, --setting and --prefix are for files, not for workdirs")
        from solov2_jax.checkpoint import read_run

        return read_run(_INPUT.value, _CHECKPOINT.value)
    settings = dict(parse_setting(text) for text in _SETTING.value)
    return read_weights(
        _INPUT.value,
        _SOURCE.value,
        sha256=_SHA256.value,
        settings=settings,
        prefix=_PREFIX.value,
    )


def _output() -> str:
    """Returns the file to write; in a folder it is named like the input."""
    path, suffix = pathlib.Path(_OUTPUT.value), _SUFFIX[_TO.value]
    if path.suffix not in _SUFFIX.values():
        path = path / (pathlib.Path(_INPUT.value).resolve().stem + suffix)
    if path.suffix != suffix:
        raise ValueError(f"--output {path}: --to {_TO.value} writes {suffix} files")
    if path.resolve() == pathlib.Path(_INPUT.value).resolve():
        raise ValueError(f"--output {path} is the input: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


def main(overrides: list[str]) -> None:
    """Converts as the flags say."""
    if (overrides or _STRICT.value) and not _CONFIG.value:
        raise ValueError("--config.KEY and --strict need a --config to check against")
    output, weights = _output(), _read()
    flat, report = weights.flat, report_of(weights)
    if _CONFIG.value:
        from solov2_jax.weights.convert import check_network

        config = load_config(_CONFIG.value, overrides)
        flat, report = check_network(config, weights, _STRICT.value)
    save_weights(output, flat, weights.settings)
    print(report.summary())
    print("settings: " + json.dumps(weights.settings))
    print(f"wrote {output}: {len(flat)} leaves, sha256 {sha256_of(output)}")
    if output != _OUTPUT.value:
        write_json(report.to_dict(), output + ".report.json")


def run() -> None:
    """Runs the command."""
    app.run(main)
