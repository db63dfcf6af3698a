"""A trained network as a folder to hand on, here or in a repository of the hub.

    model.safetensors   the weights, by our names
    config.json         the run's config, without paths
    classes.json        names and category ids
    run.json            step, metrics and origin, for those who read
    README.md           the model card

Nothing in it is executed: no pickle, and of the config no key that names code to import.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solov2_jax import storage
from solov2_jax.checkpoint import list_steps, load_workdir_config, read_run
from solov2_jax.classes import read_classes_file
from solov2_jax.config import (
    apply_overrides,
    base_config,
    check_config,
    check_effect,
    flatten,
    given_keys,
    read_config,
    renamed_overrides,
)
from solov2_jax.config_schema import set_below
from solov2_jax.io import InputError, is_object, read_json
from solov2_jax.weights.hub import fetch_folder, parse_name
from solov2_jax.weights.sources import Weights, read_weights
from solov2_jax.weights.state_dicts import OURS

WEIGHTS, CONFIG, CLASSES, RUN = "model.safetensors", "config.json", "classes.json", "run.json"
CARD = "README.md"
THRESHOLDS = "thresholds.json"  # scores for `--score best`, where the run had them
# What a value looks like that names code to import.
_CODE = re.compile(r"[\w.]+:\w+")
_BACKBONE = "model.backbone.name"
# Groups that say where this machine has what, or what nothing here reads.
_LOCAL = ("data.", "user.")
# Of those, what the network's pictures hold.
_PICTURES = ("data.channels", "data.value_range", "data.display_channels")


@dataclass(frozen=True)
class Pretrained:
    """What such a folder holds."""

    config: Any
    weights: Weights
    class_names: list[str]
    category_ids: list[int]


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the folder that a name means: hf:USER/REPO[@REVISION], or a folder here.

    Raises:
      InputError: if a repository or one of its files cannot be fetched.
    """
    text = os.fspath(name)
    if not text.startswith("hf:"):
        return storage.local_folder(text)
    return Path(fetch_folder(text, (CONFIG, WEIGHTS, CLASSES), (RUN, THRESHOLDS)).path)


def find_pretrained(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of "USER/REPO[@REVISION]", with "hf:" or without, or one here.

    Raises:
      InputError: if there is neither.
    """
    text = os.fspath(name)
    if is_object(text):
        text = str(storage.local_folder(text))
    if os.path.isdir(text):
        if not is_pretrained(text) and not list_steps(text):
            raise InputError(
                f"{text}: neither a run nor a folder of `solov2 hub pull`: it has neither "
                f"checkpoints nor {WEIGHTS}"
            )
        return Path(text)
    try:
        parse_name(text if text.startswith("hf:") else f"hf:{text}")
    except InputError as error:
        raise InputError(
            f"{text}: no such folder, and no name of a repository, USER/REPO[@REVISION]"
        ) from error
    return local_folder(text if text.startswith("hf:") else f"hf:{text}")


def is_pretrained(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds such files, and no checkpoints of a run."""
    return (Path(folder) / WEIGHTS).is_file() and not list_steps(folder)


def check_checkpoint(folder: str | os.PathLike[str], checkpoint: str) -> None:
    """Raises an InputError for a checkpoint that a folder that was handed on has not."""
    if checkpoint not in ("last", "best"):
        raise InputError(f"{folder}: has no checkpoint {checkpoint!r}, only its weights")


def read_folder(folder: str | os.PathLike[str], checkpoint: str = "last") -> Weights:
    """Returns the weights of a run's folder, or of a folder that was handed on.

    Args:
      checkpoint: of a run: "last", "best" or a step.
    """
    if not is_pretrained(folder):
        return read_run(folder, checkpoint)
    check_checkpoint(folder, checkpoint)
    return read_weights(str(Path(folder) / WEIGHTS))


def check_data_known(workdir: str | os.PathLike[str], overrides: Sequence[str], fix: str) -> None:
    """Raises an InputError for a folder that was handed on: its data stayed where it was.

    Args:
      overrides: of its config; those of `data` name other data.
      fix: the flag that does.
    """
    own = not any(key.startswith("data.") for key in given_keys(overrides))
    if own and is_pretrained(local_folder(workdir)):
        raise InputError(f"--workdir {workdir}: comes without its data; add {fix}")


def load_run_config(workdir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """Returns the config of a run's folder, or of a folder that was handed on.

    Of the latter, keys that name code, and those of data and user, have the values of
    configs/base.py: whoever wrote them is not trusted with more than the network.
    """
    folder = local_folder(workdir)
    if not is_pretrained(folder):
        return load_workdir_config(folder, overrides)
    config = read_config(folder / CONFIG)
    base = base_config()
    known = flatten(base)
    _check_backbone(config.model.backbone.name, overrides, workdir)
    with config.unlocked():
        pictures = {key: flatten(config)[key] for key in _PICTURES}
        # Wholly, because what stands below may be keys that base.py does not have.
        config.data, config.user = base.data, base.user
        for key, value in pictures.items():
            set_below(config, key, value)
        for key, value in flatten(config).items():
            if _names_code(value) and key in known and value != known[key] and key != _BACKBONE:
                set_below(config, key, known[key])
    free = ("model.dtype", "model.matmul_precision", _BACKBONE)
    for key in given_keys(overrides):
        if key.startswith("model.") and key not in free:
            raise InputError(f"--config.{key}: the weights of {workdir} keep their network")
    overrides = renamed_overrides(overrides)
    apply_overrides(config, overrides)
    check_config(config)
    check_effect(config, overrides)
    return config


def _check_backbone(name: str, overrides: Sequence[str], workdir: str | os.PathLike[str]) -> None:
    """Raises InputError for a backbone that is not ours, unless the user names it too."""
    given = [o for o in overrides if o.startswith(f"--config.{_BACKBONE}=")]
    wanted = f"--config.{_BACKBONE}={name}"
    if _names_code(name) and not given:
        raise InputError(
            f"{workdir}: its backbone is {name}, code that does not come with the weights; have it "
            f"on PYTHONPATH and, if you trust it, give {wanted}"
        )
    if any(override != wanted for override in given):
        raise InputError(f"{given[-1]}: the weights of {workdir} keep their network, {name}")


def _names_code(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_names_code(v) for v in value)
    return isinstance(value, str) and bool(_CODE.fullmatch(value))


def portable_config(config: Any) -> dict[str, Any]:
    """Returns a run's config without what only its machine knows: folders, user's keys."""
    flat, base = flatten(config), flatten(base_config())
    result: dict[str, Any] = {}
    for key, value in flat.items():
        if key == "init_from" and os.path.exists(str(value)):
            value = os.path.basename(os.path.normpath(value))
        if key.startswith(_LOCAL) and key not in _PICTURES:
            if key not in base:
                continue
            value = base[key] if isinstance(value, str | list | tuple) else value
        node = result
        *groups, name = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return result


def read_pretrained(folder: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Pretrained:
    """Returns what a folder holds.

    Raises:
      InputError: naming the file that is missing, damaged or does not fit the others.
    """
    place = Path(folder)
    config = load_run_config(place, overrides)
    weights = read_weights(str(place / WEIGHTS))
    if weights.source != OURS or not weights.num_classes:
        raise InputError(
            f"{place / WEIGHTS}: holds no network of `solov2 hub push` but {weights.source}'s; "
            "give it as --weights with a --config, or as init_from"
        )
    names, ids = read_classes_file(place / CLASSES, None, weights.num_classes)
    return Pretrained(config, weights, names, ids)


def read_step(folder: str | os.PathLike[str]) -> int | None:
    """Returns the step of a folder's weights, None where it does not say."""
    path = Path(folder) / RUN
    if not path.is_file():
        return None
    step = read_json(path, "the record of a run")
    step = step.get("step") if isinstance(step, dict) else None
    return step if type(step) is int else None
