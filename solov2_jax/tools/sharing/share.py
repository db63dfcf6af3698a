"""A run -> a folder to hand on -> a repository of the hub, and back."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from solov2_jax import pretrained
from solov2_jax.checkpoint import list_steps, read_best, read_classes, restore_variables
from solov2_jax.classes import classes_record
from solov2_jax.config import read_config
from solov2_jax.io import InputError, make_folder, write_json, write_text
from solov2_jax.tools.report.thresholds import carry_thresholds
from solov2_jax.tools.sharing.card import model_card
from solov2_jax.tools.sharing.describe import describe_run
from solov2_jax.weights.convert import save_weights
from solov2_jax.weights.hub import parse_name
from solov2_jax.weights.hub_client import hub_errors, hub_library
from solov2_jax.weights.settings import drop_needless, settings_of_config, settings_of_shapes

log = logging.getLogger(__name__)

FILES = (
    pretrained.WEIGHTS,
    pretrained.CONFIG,
    pretrained.CLASSES,
    pretrained.RUN,
    pretrained.CARD,
    pretrained.THRESHOLDS,
)


@dataclass(frozen=True)
class PushOptions:
    """How a run is handed on.

    Attributes:
      checkpoint: "last", "best", a step; "": the best, else the last.
      licence: of the weights, as the hub spells it ("apache-2.0").
      dataset: what the data is called.
    """

    checkpoint: str = ""
    licence: str = ""
    dataset: str = ""


def write_pretrained(workdir: str, folder: Path, repo: str, options: PushOptions) -> int:
    """Writes the files of a run that is handed on; returns the step of its weights.

    Raises:
      InputError: if the folder is no run's.
    """
    check_repository(repo)
    source = Path(workdir)
    if not list_steps(source):
        raise InputError(f"{workdir}: no checkpoint in checkpoints/; give the folder of a run")
    checkpoint = options.checkpoint or ("best" if read_best(source) else "last")
    config = read_config(source / "config.json")
    variables, step = restore_variables(source, checkpoint)
    names, ids = read_classes(source, step)
    flat: dict[str, Any] = {**flatten_dict(jax.device_get(variables), sep="/")}
    settings = {**settings_of_config(config), **settings_of_shapes(flat), "class_names": names}
    drop_needless(settings)
    about = describe_run(source, config, step=step, checkpoint=checkpoint, dataset=options.dataset)
    make_folder(folder)
    save_weights(str(folder / pretrained.WEIGHTS), flat, settings)
    portable = pretrained.portable_config(config)
    write_json(portable, folder / pretrained.CONFIG)
    write_json(classes_record(names, ids), folder / pretrained.CLASSES)
    write_json(about, folder / pretrained.RUN)
    card = model_card(repo, portable, names, about, options.licence)
    write_text(card, folder / pretrained.CARD)
    carry_thresholds(source, step, folder)
    return step


def push(workdir: str, repo: str, options: PushOptions, *, private: bool = False) -> str:
    """Writes a run into a repository, made if need be; returns the address of the commit.

    Raises:
      InputError: for a name, a folder or a token that does not do.
    """
    name = check_repository(repo)
    hub = hub_library()
    if not hub.get_token():
        raise InputError("pushing needs a token: set HF_TOKEN, or run `hf auth login`")
    with tempfile.TemporaryDirectory() as scratch:
        step = write_pretrained(workdir, Path(scratch), name, options)
        with hub_errors(f"push to {name}"), _bars():
            api = hub.HfApi(library_name="solov2_jax")
            api.create_repo(name, private=private, exist_ok=True)
            size = os.path.getsize(Path(scratch) / pretrained.WEIGHTS) / 1e6
            log.info("pushing step %d to %s, %.1f MB", step, name, size)
            add = hub.CommitOperationAdd
            commit = api.create_commit(
                name,
                [
                    add(path_in_repo=n, path_or_fileobj=str(Path(scratch) / n))
                    for n in FILES
                    if (Path(scratch) / n).is_file()
                ],
                commit_message=f"Step {step} of a solov2_jax run",
            )
    return str(commit.commit_url)


def check_new(folder: Path) -> None:
    """Raises an InputError for an --output that is there and no empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder}: holds something already; give a new folder")


def check_repository(repo: str) -> str:
    """Returns the USER/REPO of a name; raises InputError for anything more or less."""
    wanted = parse_name(repo if repo.startswith("hf:") else f"hf:{repo}", "push")
    if wanted.file or wanted.revision:
        raise InputError(f"{repo}: give USER/REPO alone; a push is a new commit of its main branch")
    return wanted.repo


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Shows the library's bars in a terminal only."""
    from huggingface_hub import utils

    if os.isatty(2) or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def pull(name: str, output: str) -> Path:
    """Returns the folder with the files of a repository.

    Args:
      output: folder to copy them to, new or empty; "": they stay in the hub's cache.

    Raises:
      InputError: as `fetch_folder`, and for a folder that holds something.
    """
    target = Path(output)
    if output:
        check_new(target)
    name = f"hf:{name.removeprefix('hf:')}"
    parse_name(name, "pull")
    folder = pretrained.local_folder(name)
    pretrained.read_pretrained(folder)  # raises if it does not fit together
    if not output:
        return folder
    make_folder(target)
    for file in FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, target / file)
    return target
