"""What a study consists of: levers, seeds and folds; its folder, which says so."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.config import (
    apply_overrides,
    changed_keys,
    check_config,
    check_effect,
    given_keys,
    load_config,
    read_config,
    save_config,
)
from solov2_jax.data.annotations import read_content
from solov2_jax.data.build import data_files
from solov2_jax.data.records import is_records
from solov2_jax.io import InputError, make_folder, read_json, reading, write_json, write_text
from solov2_jax.tools.importers.instances import part_of
from solov2_jax.tools.importers.merge import image_groups
from solov2_jax.weights.settings import adopt_settings

PLAIN = "plain"  # the recipe as it is
CONFIG, DESIGN, RUNS, FOLDS = "config.json", "design.json", "runs", "folds"
_SHOWN = 3
_LENGTHS = ("train.steps", "train.epochs")
# Keys that no lever may have.
_SET_BY_STUDY = ("seed", "data.name", "data.train.", "data.val", "train.best_metric")


@dataclass(frozen=True)
class Lever:
    """A change of the recipe."""

    name: str
    overrides: tuple[str, ...]  # "--config.key=value"

    @property
    def folder(self) -> str:
        """Its name as a part of a path, of 200 bytes at most."""
        name = re.sub(r"[^\w.=-]+", "_", self.name).encode()[:200].decode(errors="ignore")
        return name.strip("._") or "lever"


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    lever: Lever
    seed: int
    fold: int  # from 0; of one fold the data's own parts

    @property
    def name(self) -> str:
        return f"{self.lever.folder}/seed{self.seed}_fold{self.fold}"


@dataclass(frozen=True)
class Design:
    """All runs of a study, in the order in which they are run."""

    levers: tuple[Lever, ...]  # the plain recipe first
    seeds: int
    folds: int
    hopeless: float  # a run whose metric is below this share of the plain one's ends; 0: none
    judge_from: float  # the share of the run from which on it is judged
    equal_time: bool = False  # a lever's runs are as long as the plain one's in seconds
    data: str = ""  # hash of what all runs train on, see `data_hash`; "": not known

    def trials(self) -> list[Trial]:
        return [
            Trial(lever, seed, fold)
            for lever in self.levers
            for seed in range(self.seeds)
            for fold in range(self.folds)
        ]

    def trial(self, name: str) -> Trial:
        """Returns the run of a name.

        Raises:
          InputError: if there is none.
        """
        for trial in self.trials():
            if trial.name == name:
                return trial
        names = ", ".join(t.name for t in self.trials()[:_SHOWN])
        raise InputError(f"--only {name}: the study has no such run; it has {names}, ...")


def parse_levers(texts: Sequence[str]) -> tuple[Lever, ...]:
    """Returns the levers of "key=value", "key=value key=value" or "name: key=value".

    Raises:
      InputError: for a text of another form, or two levers of one name.
    """
    levers = [Lever(PLAIN, ())]
    for text in texts:
        name, colon, rest = text.partition(":")
        if not colon or "=" in name:
            name, rest = text, text
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise InputError(f"--lever {text!r}: {error}; close the quotes") from error
        if not words or not all(re.match(r"[\w.]+=", word) for word in words) or not name.strip():
            raise InputError(
                f"--lever {text!r}: write key=value, or several with spaces between them, with a "
                'name before a colon if you like: "paste: augment.paste_prob=0.5"'
            )
        keys = tuple(f"--config.{word.removeprefix('config.')}" for word in words)
        levers.append(Lever(" ".join(name.split()), keys))
    folders = [lever.folder for lever in levers]
    for lever in levers:
        if folders.count(lever.folder) > 1:
            raise InputError(
                f"--lever {lever.name}: two levers have this name as a folder (the recipe is "
                f"called {PLAIN}); give each its own before a colon"
            )
    return tuple(levers)


def check_levers(
    levers: Sequence[Lever], config: Any, *, equal_time: bool = False, weights: bool = False
) -> None:
    """Raises an InputError for a lever whose keys the recipe does not take.

    Args:
      equal_time: the length of runs is the study's to set.
      weights: those of `init_from` and `distill_from` are read and looked at too.
    """
    from solov2_jax.training.teacher import load_teacher

    fixed = (*_SET_BY_STUDY, *_LENGTHS) if equal_time else _SET_BY_STUDY
    for lever in levers:
        changed = config.copy_and_resolve_references()
        try:
            apply_overrides(changed, lever.overrides)
            check_config(changed)
            check_effect(changed, lever.overrides)
            if weights:
                adopt_weights(changed, lever)
                load_teacher(changed)
        except ValueError as error:
            raise InputError(f"--lever {lever.name}: {error}") from error
        if taken := [k for k in given_keys(lever.overrides) if k.startswith(fixed)]:
            raise InputError(
                f"--lever {lever.name}: {taken[0]} is the same for all runs of a study"
                + (", or follows from --equal_time" if taken[0] in _LENGTHS else "")
            )


def adopt_weights(config: Any, lever: Lever) -> None:
    """Sets what the weights of a lever's own `init_from` imply, as the commands do for a run's."""
    from solov2_jax.training.restore import read_init

    given = given_keys(lever.overrides)
    if "init_from" in given and config.init_from:
        adopt_settings(read_init(config.init_from).settings, config, given, config.init_from)


def trial_config(study: Path, trial: Trial, folds: int) -> Any:
    """Returns a run's config: the recipe's with its part of the data, its seed and its lever."""
    overrides = [*fold_overrides(study, trial, folds), f"--config.seed={trial.seed}"]
    config = load_config(str(study / CONFIG), [*overrides, *trial.lever.overrides])
    adopt_weights(config, trial.lever)
    return config


def keep_design(folder: Path, design: Design, config: Any, group: str = "") -> None:
    """Writes config, folds and design into a study's folder; one that was begun must be the same.

    Levers and seeds may be added, and the judging may change.

    Args:
      group: as `write_folds` takes it.

    Raises:
      InputError: if runs that are there would no longer be comparable, or the data has fewer
        groups of images than folds.
    """
    design = replace(design, data=data_hash(config, group if design.folds > 1 else ""))
    if (folder / DESIGN).is_file():
        before = read_design(folder)
        if changed := changed_keys(read_config(folder / CONFIG), config):
            key, (old, new) = next(iter(changed.items()))
            raise InputError(
                f"{folder}: the study was begun with {key} = {old}, not {new}; give another "
                "--workdir, or what it was begun with"
            )
        known = {lever.folder: lever.overrides for lever in before.levers}
        for lever in design.levers:
            if known.get(lever.folder, lever.overrides) != lever.overrides:
                raise InputError(
                    f"{folder}: the lever {lever.name} was begun with "
                    f"{' '.join(known[lever.folder])}; give the changed one another name"
                )
        if before.folds != design.folds:
            raise InputError(f"{folder}: the study was begun with --folds {before.folds}")
        if before.equal_time != design.equal_time:
            begun = "with" if before.equal_time else "without"
            raise InputError(f"{folder}: the study was begun {begun} --equal_time")
        if before.data != design.data and before.data and design.data:
            raise InputError(
                f"{folder}: the annotations of its data, or --group, have changed since the study "
                "was begun; restore them, or give another --workdir"
            )
    if design.folds > 1:
        write_folds(folder, config, design.folds, group)
    make_folder(folder)
    save_config(config, folder / CONFIG)
    levers = [{"name": x.name, "overrides": x.overrides} for x in design.levers]
    values = {k: v for k, v in vars(design).items() if k != "levers"}
    write_json({"levers": levers, **values}, folder / DESIGN)


def read_design(folder: Path) -> Design:
    """Returns what `keep_design` wrote.

    Raises:
      InputError: if the folder is no study's, or the file is damaged.
    """
    path = folder / DESIGN
    if not path.is_file():
        raise InputError(f"{folder}: is no study's folder, it has no {DESIGN}; begin one first")
    content = read_json(path, "a study's design")
    with reading(path, "a study's design", "Begin the study again in another folder"):
        levers = tuple(Lever(x["name"], tuple(x["overrides"])) for x in content.pop("levers"))
        return Design(levers=levers, **content)


def data_hash(config: Any, group: str) -> str:
    """Returns a hash of the two jsons and of what folds hold together; "" for other data."""
    paths = [Path(part.annotations) for part in (config.data.train, config.data.val)]
    if config.data.name or not all(path.is_file() for path in paths):
        return ""
    return hashlib.sha256(b"".join([*(p.read_bytes() for p in paths), group.encode()])).hexdigest()


def fold_overrides(folder: Path, trial: Trial, folds: int) -> list[str]:
    """Returns what sets a run's data, nothing where there is one fold."""
    if folds == 1:
        return []
    place = (folder / FOLDS / str(trial.fold)).absolute()
    about = read_json(folder / FOLDS / "images.json", "the folds' images")
    return [
        "--config.data.name=",
        f"--config.data.train.images={about['images']}",
        f"--config.data.val.images={about['images']}",
        f"--config.data.train.annotations={place / 'train.json'}",
        f"--config.data.val.annotations={place / 'val.json'}",
    ]


def write_folds(folder: Path, config: Any, folds: int, group: str) -> None:
    """Writes the jsons of each fold: its part of all images is the validation's.

    Training and validation images are parted anew, by the config's seed and the file names;
    images whose names have the same first group of the expression stay together.

    Raises:
      InputError: if the data cannot be parted.
    """
    (train, train_json), (val, val_json) = data_files(config)
    if is_records(train):
        raise InputError("--folds: records have their parts; give the images as a folder")
    roots = [Path(train).absolute(), Path(val).absolute()]
    top = Path(os.path.commonpath(roots))
    contents = [read_content(train_json)]
    contents += [read_content(val_json)] if val_json != train_json else []
    pooled = _pooled(contents, [root.relative_to(top).as_posix() for root in roots])
    groups = image_groups([image["file_name"] for image in pooled["images"]], group)
    if len(groups) < folds:
        raise InputError(f"--folds {folds}: there are only {len(groups)} groups of images")
    order = np.random.default_rng(config.seed).permutation(sorted(groups))
    parts: list[set[int]] = [set() for _ in range(folds)]
    for key in order.tolist():
        min(parts, key=len).update(pooled["images"][place]["id"] for place in groups[key])
    every = {image["id"] for image in pooled["images"]}
    for i, part in enumerate(parts):
        place = folder / FOLDS / str(i)
        place.mkdir(parents=True, exist_ok=True)
        for name, ids in (("train", every - part), ("val", part)):
            write_text(json.dumps(part_of(pooled, ids)), place / f"{name}.json")
    write_json({"images": str(top)}, folder / FOLDS / "images.json")


def _pooled(contents: Sequence[dict[str, Any]], prefixes: Sequence[str]) -> dict[str, Any]:
    """Returns the images and objects of several jsons of the same categories, numbered anew,
    with file names below a common folder; an image that occurs twice is taken once."""
    images: dict[str, dict[str, Any]] = {}
    annotations = []
    for content, prefix in zip(contents, prefixes, strict=False):
        ids = {}
        for image in content["images"]:
            name = (Path(prefix) / image["file_name"]).as_posix()
            if name not in images:
                ids[image["id"]] = len(images) + 1
                images[name] = {**image, "id": len(images) + 1, "file_name": name}
        for annotation in content["annotations"]:
            if annotation["image_id"] in ids:
                number = {"id": len(annotations) + 1, "image_id": ids[annotation["image_id"]]}
                annotations.append({**annotation, **number})
    return {**contents[0], "images": list(images.values()), "annotations": annotations}
