r"""Prints versions, devices and settings as text to paste into an issue report.

    solov2 env
    solov2 env --config configs/r50_3x.py --config.train.batch_size=8

With --config or --workdir the configuration's keys that differ from configs/base.py are
printed too. Values of variables whose names look like secrets are left out.
"""

import functools
import importlib.metadata
import os
import platform
import re
import sys

import solov2_jax
from solov2_jax.config_schema import text
from solov2_jax.io import InputError, reason
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_CONFIG = Flag("config", text(), "Config file or a shipped config's name.")
FLAGS = (_CONFIG, shared.WORKDIR)

_PACKAGES = """jax jaxlib flax optax orbax-checkpoint grain array-record ml_collections numpy
scipy pillow pycocotools matplotlib tensorboardX jaxtyping av onnx onnxruntime fastapi uvicorn
tensorflow tensorflow-datasets jax-cuda12-plugin jax-cuda13-plugin libtpu""".split()
_VARIABLES = re.compile(r"(JAX|XLA|LIBTPU|TPU|CUDA|NVIDIA|NCCL|SLURM|OMP|MALLOC|TF_)_?")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.I)


def main(overrides: list[str]) -> None:
    if _CONFIG.value and shared.WORKDIR.value:
        raise InputError("give either --config or --workdir")
    if overrides and not (_CONFIG.value or shared.WORKDIR.value):
        raise InputError(f"{overrides[0]}: give the --config or --workdir that it changes")
    print(f"solov2_jax {solov2_jax.__version__}, {os.path.dirname(solov2_jax.__file__)}")
    print(f"Python {platform.python_version()}, {sys.executable}")
    print(f"{platform.platform()}, {os.cpu_count()} CPU cores")
    print("packages: " + ", ".join(_versions()))
    print(f"devices: {_devices()}")
    names = sorted(name for name in os.environ if _VARIABLES.match(name))
    values = [f"{n}={os.environ[n]}" for n in names if not _SECRET.search(n)]
    print("environment: " + (", ".join(values) or "nothing of JAX, XLA, CUDA, Slurm"))
    if _CONFIG.value or shared.WORKDIR.value:
        for line in _changes(overrides):
            print(line)


def _versions() -> list[str]:
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> str:
    """Returns the devices, or why there are none, which is what a report is about."""
    try:
        import jax

        return ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
    except (RuntimeError, ImportError) as error:
        return f"none ({reason(error)})"


def _changes(overrides: list[str]) -> list[str]:
    from solov2_jax.config import base_config, changed_keys, load_config
    from solov2_jax.pretrained import load_run_config

    path = _CONFIG.value or f"of {shared.WORKDIR.value}"
    load = load_config if _CONFIG.value else load_run_config
    config = load(_CONFIG.value or shared.WORKDIR.value, overrides)
    changed = changed_keys(base_config(), config)
    lines = [f"  {key} = {value!r}" for key, (_, value) in changed.items()]
    return [f"config {path}, where it differs from configs/base.py:", *(lines or ["  nowhere"])]


run = functools.partial(app.run, main, FLAGS, platform=False)
