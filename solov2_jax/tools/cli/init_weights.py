"""The settings that the weights of `init_from` imply, as a training command takes them over."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from solov2_jax.config import read_config
from solov2_jax.io import read_json, reading
from solov2_jax.tools.cli import app


def implied_settings_of(config: Any, workdir: str) -> dict[str, Any]:
    """Returns the settings that the weights of `init_from` imply, {} without weights.

    A run that resumes has written them down: it needs neither the weights nor a network.
    """
    from solov2_jax.checkpoint import list_steps
    from solov2_jax.weights.settings import settings_of_config

    record, stored = Path(workdir) / "init_from.json", Path(workdir) / "config.json"
    if list_steps(workdir):
        if record.is_file():
            kind = "the record of a run's first weights"
            content = read_json(record, kind)
            with reading(record, kind, "Delete it: the run resumes without"):
                return dict(content["settings"])
        return settings_of_config(read_config(stored)) if stored.is_file() else {}
    if not config.init_from:
        return {}
    from solov2_jax.training.restore import read_init

    return read_init(config.init_from).settings


def adopt(config: Any, given: Collection[str], workdir: str) -> None:
    """Sets the keys that the weights imply, see `adopt_settings`, and prints them.

    Args:
      given: keys on the command line; these may contradict the weights.
    """
    from solov2_jax.weights.settings import adopt_settings

    settings = implied_settings_of(config, workdir)
    if line := adopt_settings(settings, config, given, config.init_from):
        app.echo(line)
    ignore_given(config, given)


def ignore_given(config: Any, given: Collection[str]) -> None:
    """Lets keys of the command line contradict the weights, `init_from_ignores`."""
    from solov2_jax.weights.settings import CONVENTIONS

    keys = [key for key in CONVENTIONS["torchvision"] if key in given]
    with config.unlocked():
        config.init_from_ignores = tuple(dict.fromkeys([*config.init_from_ignores, *keys]))
