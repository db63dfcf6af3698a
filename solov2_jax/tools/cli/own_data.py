"""`train --data FOLDER`: what is in the folder, which settings suit it, where that is kept."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solov2_jax import storage
from solov2_jax.config import check_config, flatten, given_keys, load_config
from solov2_jax.config_schema import AUTO, number, set_below, several, switch, text
from solov2_jax.data import records
from solov2_jax.data.annotations import describe, read_instances
from solov2_jax.data.coco import CocoDataset, read_coco
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.cli.init_weights import ignore_given, implied_settings_of
from solov2_jax.tools.doctor.derive import Derived, derive
from solov2_jax.tools.importers.kept import PARTS, read_kept, was_written, write_kept
from solov2_jax.tools.importers.merge import COPIES, VAL_SHARE, MergedData, Options, merge
from solov2_jax.tools.importers.recognise import recognise

DATA = Flag(
    "data",
    several((), text("", form=(r"[^\0]+", "a folder or file"))),
    "Folder or file of annotated images, in any of the formats of docs/data.md; several are "
    "merged by class name.",
    repeated=True,
)
EPOCHS = Flag("epochs", number(0.0, above=0, high=1e6), "Passes over the data.", optional=True)
CLASSES = Flag("classes", several((), text()), "With --data: classes to keep; all others go.")
SINGLE = Flag("single_class", switch(False), "With --data: merge all classes into one.")
GROUP = Flag(
    "group",
    text(COPIES),
    "With --data: regular expression of file names; images with the same first group are not "
    "split into training and validation.",
)
SHARE = Flag(
    "val_share",
    number(VAL_SHARE, above=0, below=1),
    "With --data: share of the images for validation, where no part is there for it.",
)
WEIGHTS = Flag(
    "data_weights",
    several((), number(1.0, 0.001, high=100)),
    "With several --data: how often an epoch shows the images of each, in their order: 2,1.",
)
FLAGS = (DATA, EPOCHS, CLASSES, SINGLE, GROUP, SHARE, WEIGHTS)
PRESET = "finetune"


def own_config(config_file: str, workdir: str, overrides: Sequence[str], *, write: bool) -> Any:
    """Returns the config for the data that the flags name, after printing what was found.

    Args:
      config_file: "" for the preset.
      write: put what was merged or split off into the workdir.

    Raises:
      InputError: for bad data, and for data that a run in the workdir was not trained on.
    """
    given = given_keys(overrides)
    config = load_config(config_file or PRESET, _in_steps(overrides, given))
    given |= {"train.epochs"} if "train.steps" in given else set()
    with config.unlocked():
        if data := _merged(config, Path(workdir) / "data"):
            if not data.files[0] and storage.mirror_of(workdir):
                raise InputError(
                    "--data that is merged, split or converted is written into --workdir, which "
                    "must be a folder here for that. Or import it (`solov2 import`), copy it to "
                    "object storage, and give it as data.train and data.val"
                )
            dataset = _read(data, boxes=config.loss.box_supervised)
            _point_to(config, data, Path(workdir))
        else:
            from solov2_jax.data.build import data_files

            config.data.name = DATA.value[0]
            dataset = read_coco(*data_files(config)[0], boxes=config.loss.box_supervised)
        lines = list(data.lines) if data else [f"{DATA.value[0]}: records, {len(dataset)} images"]
        config.model.num_classes = len(dataset.class_names)
        if config.data.advice:
            lines += [f"set: {line}" for line in _advise(config, dataset, given, workdir)]
        ignore_given(config, given)
    check_config(config)
    app.echo("\n".join(lines))
    if write and data and not data.files[0]:
        _keep(data, Path(workdir) / "data", _request(config))
    return config


def _in_steps(overrides: Sequence[str], given: set[str]) -> list[str]:
    """Returns the overrides, with what `train.steps` needs to count."""
    if "train.steps" not in given or "train.epochs" in given:
        return list(overrides)
    patience = [] if "train.eval_every" in given else ["--config.train.patience=0"]
    return ["--config.train.epochs=0", *patience, *overrides]


def _merged(config: Any, kept: Path) -> MergedData | None:
    """Returns the data of the flags, None for records.

    Args:
      kept: folder with what an earlier start of the run merged.
    """
    if any(records.is_records(place) for place in DATA.value):
        if len(DATA.value) > 1 or CLASSES.value or SINGLE.value or WEIGHTS.value:
            raise InputError(
                f"--data {describe(DATA.value)}: records are used alone and as they are; give "
                "the folders that they were written from."
            )
        return None
    if WEIGHTS.value and (len(WEIGHTS.value) != len(DATA.value) or len(DATA.value) == 1):
        raise InputError(
            f"--data_weights has {len(WEIGHTS.value)} numbers for {len(DATA.value)} --data; give "
            "one for each of several folders, in their order."
        )
    if repeated := sorted({p for p in DATA.value if DATA.value.count(p) > 1}):
        raise InputError(f"--data {describe(repeated)}: given twice; give each folder once.")
    from solov2_jax import distributed

    request = _request(config)
    before = read_kept(kept, request) if distributed.is_primary() else None
    if not distributed.broadcast_from_host0(lambda: before is not None):
        options = {key: value for key, value in request.items() if key != "data"}
        return merge({place: recognise(place) for place in DATA.value}, Options(**options))
    before = before or read_kept(kept, request)
    if before is None:
        raise InputError(
            f"{kept}: the first process can use what is in there, and this one cannot; the "
            "workdir and the data must be the same for all processes."
        )
    return before


def _request(config: Any) -> dict[str, Any]:
    """Returns what the import depends on besides the files: the places and `Options`."""
    options = Options(
        classes=CLASSES.value,
        single_class=SINGLE.value,
        group=GROUP.value,
        val_share=SHARE.value,
        weights=WEIGHTS.value,
        seed=config.seed,
    )
    return {"data": DATA.value} | dataclasses.asdict(options)


def _read(data: MergedData, boxes: bool) -> CocoDataset:
    """Returns the training data; checks both parts as training does.

    Args:
      boxes: whether objects with a box only are trained on.
    """
    both = []
    for images, content, name in zip(
        data.images, data.contents, ("training", "validation"), strict=True
    ):
        table = read_instances(content, f"the {name} data of {describe(DATA.value)}")
        both.append(read_coco(images, table, boxes=boxes and name == "training"))
    if not len(both[0].labels):
        raise InputError(
            f"--data {describe(DATA.value)}: no object is left to train on; outlines, masks or "
            "boxes (with loss.box_supervised) are needed."
        )
    return both[0]


def _point_to(config: Any, data: MergedData, workdir: Path) -> None:
    """Sets where training finds the data."""
    written = [str((workdir / "data" / name).absolute()) for name in PARTS]
    files = [str(Path(file).absolute()) for file in data.files] if data.files[0] else written
    folders = [str(Path(folder).absolute()) for folder in data.images]
    config.data.name = ""
    config.data.train.images, config.data.val.images = folders
    config.data.train.annotations, config.data.val.annotations = files


def _advise(config: Any, dataset: CocoDataset, given: set[str], workdir: str) -> list[str]:
    """Sets the keys that follow from the data; returns a line for each group of them."""
    import jax

    derived = _adopt(config, given, workdir) if config.init_from else []
    adopted = {key for each in derived for key in each.values}
    fixed = given | adopted
    if config.train.batch_size == AUTO:
        _set_auto_batch(config, dataset, fixed, workdir)
        fixed |= {"train.batch_size"}
    derived += derive(
        config, dataset, fixed, devices=jax.device_count(), on_cpu=jax.default_backend() == "cpu"
    )
    for each in derived:
        for key, value in each.values.items():
            set_below(config, key, value)
    lines = [each.line() for each in derived]
    config.user.derived = tuple(lines)
    return lines


def _set_auto_batch(config: Any, dataset: CocoDataset, given: set[str], workdir: str) -> None:
    """Sets the batch that memory allows for the sizes and grids that follow from the data."""
    import jax

    from solov2_jax.training.memory import resolve_batch_size, with_batch_size

    trial = with_batch_size(config, jax.device_count(), ())
    with trial.unlocked(), trial.ignore_type():
        on_cpu = jax.default_backend() == "cpu"
        for each in derive(trial, dataset, given | {"train.batch_size"}, on_cpu=on_cpu):
            for key, value in each.values.items():
                set_below(trial, key, value)
        trial.train.batch_size = AUTO
    resolved = resolve_batch_size(trial, Path(workdir), dataset)
    with config.ignore_type():
        config.train.batch_size = resolved.train.batch_size
    config.user.batch_size = tuple(resolved.user.get("batch_size", ()))
    if not given & {"optim.learning_rate", "optim.reference_batch_size"}:
        config.optim.reference_batch_size = 0  # the rate that is derived is for this batch


def _adopt(config: Any, given: set[str], workdir: str) -> list[Derived]:
    """Returns what the weights to start from were trained with and the config has not.

    Classes are the data's. A key that is given stays, see `ignore_given`.
    """
    values, known = {}, flatten(config)
    for key, value in implied_settings_of(config, workdir).items():
        value = tuple(value) if isinstance(value, list) else value
        if key in known and key != "model.num_classes" and key not in given:
            if known[key] != value:
                values[key] = value
                set_below(config, key, value)
    reason = f"as the weights {config.init_from} were trained"
    return [Derived(values, reason)] if values else []


def _keep(data: MergedData, folder: Path, request: dict[str, Any]) -> None:
    """Writes the two jsons, or finds that they are there already.

    Files that were damaged since are written again, if the import gives what it gave then.

    Raises:
      InputError: if a run was trained on others.
    """
    from solov2_jax import distributed
    from solov2_jax.checkpoint import list_steps
    from solov2_jax.tools.study.design import RUNS

    paths, texts = [folder / name for name in PARTS], data.texts()
    before = [p.read_text("utf-8", "replace") if p.is_file() else "" for p in paths]
    same = before == list(texts) or was_written(folder, texts)
    if not same and (list_steps(folder.parent) or (folder.parent / RUNS).is_dir()):
        what = "; ".join(
            f"{path.name}: {_difference(old, new)}"
            for path, old, new in zip(paths, before, texts, strict=True)
            if old != new
        )
        raise InputError(
            f"{folder.parent}: its run was trained on other data ({what}). Restore the data and "
            "the flags, or give another --workdir."
        )
    distributed.barrier("the data was compared")
    if distributed.is_primary():
        write_kept(folder, data, request)
    distributed.barrier("the data was written")


def _difference(old: str, new: str) -> str:
    """Returns in words how two jsons differ."""
    if not old:
        return "was not there"
    try:
        before, now = (json.loads(text) for text in (old, new))
        names = [{image["file_name"] for image in content["images"]} for content in (before, now)]
        counts = [len(content["annotations"]) for content in (before, now)]
    except (ValueError, KeyError, TypeError):
        return "is damaged"
    more, fewer = len(names[1] - names[0]), len(names[0] - names[1])
    return f"{more} images more, {fewer} fewer, {counts[1]} objects and not {counts[0]}"
