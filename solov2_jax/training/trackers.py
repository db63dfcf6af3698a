"""Experiment trackers, for who asks for them in `train.writers`: wandb and mlflow.

Their packages are optional and imported when a run starts, so that nobody else needs
them. Both get the scalars, the pictures and the histograms that a `Writer` gets.
"""

import importlib
import logging
import os
import pathlib
from types import ModuleType
from typing import Any

import numpy as np

from solov2_jax.training.writers import QuietWriter

log = logging.getLogger("solov2_jax")

PROJECT = "solov2_jax"


class WandbWriter(QuietWriter):
    """Weights & Biases; where and as whom is said by its own WANDB_* variables."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._wandb = _import("wandb", "wandb")
        run = _read_id(folder, "wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=config,
            id=run,
            resume="allow" if run else None,
        )
        _write_id(folder, "wandb", self._run.id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        shown = {name: self._wandb.Image(image) for name, image in images.items()}
        self._run.log(shown, step=step)

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        shown = {name: self._wandb.Histogram(x) for name, x in arrays.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(QuietWriter):
    """MLflow; where is said by its own MLFLOW_* variables. It has no histograms."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._mlflow = _import("mlflow", "mlflow-skinny")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = _read_id(folder, "mlflow")
        started = self._mlflow.start_run(run_id=run, run_name=folder.name)
        if run is None:
            self._mlflow.log_dict(config, "config.json")
        _write_id(folder, "mlflow", started.info.run_id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._mlflow.log_metrics(scalars, step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._mlflow.log_image(image, key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"train.writers has {name!r}, but its package cannot be imported "
            f"({error}): pip install {package}, or take it out of train.writers"
        ) from error


def _id_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f".{name}_run"


def _read_id(folder: pathlib.Path, name: str) -> str | None:
    """Returns the tracker's name of the run that is resumed, None for a new one."""
    path = _id_file(folder, name)
    return path.read_text() if path.is_file() else None


def _write_id(folder: pathlib.Path, name: str, run: str) -> None:
    _id_file(folder, name).write_text(run)
