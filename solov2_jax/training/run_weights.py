"""A run's weights with the settings they were trained under."""

import json
import os
import pathlib

import jax

from solov2_jax.config import read_config
from solov2_jax.training.checkpoint import restore_variables
from solov2_jax.weights.convert import flatten
from solov2_jax.weights.settings import (
    drop_needless,
    settings_of_config,
    settings_of_shapes,
)
from solov2_jax.weights.sources import Weights


def read_run(workdir: str | os.PathLike, checkpoint: str = "last") -> Weights:
    """Returns the weights of a checkpoint ("last", "best" or a step) of a run.

    Their settings are the run's config, their class names its classes.json.
    """
    folder = pathlib.Path(workdir)
    variables, step = restore_variables(folder, checkpoint)
    flat = dict(flatten(jax.device_get(variables)))
    settings = settings_of_config(read_config(folder / "config.json"))
    settings.update(settings_of_shapes(flat))
    drop_needless(settings)
    try:
        classes = json.loads((folder / "classes.json").read_text())
        settings["class_names"] = [str(name) for name in classes["names"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'classes.json'}: unreadable ({error})") from error
    return Weights(f"{workdir} (step {step})", "", "workdir", flat, settings)
