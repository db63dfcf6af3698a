"""Checkpoints on disk: written in the background, read back only if they are whole.

A checkpoint is `checkpoints/<step>/` with these parts: `variables` (what inference
needs), `optimizer` (step and optimiser state), `ema` (moving average of the variables,
where the run has one; `average` in older checkpoints) and `position` (JSON: where the
data stands, the classes, and checksums of the others). A folder with a whole number as
its name is a finished save; Orbax writes into a temporary name and renames at the end.
`best.json` in the workdir names the best checkpoint.

The parts are trees of arrays by name; what trains knows how to make them. Below, what
the folder of a run says about its network: config and classes.
"""

import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from solov2_jax import distributed, storage
from solov2_jax.checkpoint_parts import (
    alone,
    checksum,
    innermost_reason,
    read_part,
    read_position,
    read_variables,
)
from solov2_jax.classes import Classes, read_classes_file
from solov2_jax.config import changed_keys, load_config, read_config
from solov2_jax.io import InputError, read_json, reading, write_json, write_text
from solov2_jax.weights.settings import drop_needless, settings_of_config, settings_of_shapes
from solov2_jax.weights.sources import Weights

PyTree = Any
Parts = Mapping[str, PyTree]

log = logging.getLogger("solov2_jax")

# Holds the last step whose save is known to be whole: says that there were checkpoints.
_SAVED = ".last_checkpoint"


class CheckpointManager:
    """Saves the states of one run; keeps the newest ones, and the best besides.

    Every process has a copy of the state, and the first one saves for all. Two are kept
    at least: only the steps after a save show that training can go on from it.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self.workdir = pathlib.Path(workdir).absolute()
        self.folder = self.workdir / "checkpoints"
        self.best = read_best(self.workdir)
        self._keep, self._delete_older = max(keep, 2), True
        self._saving: int | None = None
        self._marked = -1
        self._manager: Any = None
        if not distributed.is_primary():
            return
        self.folder.mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # type: ignore[arg-type]  # `should_preserve`
            cleanup_tmp_directories=True,  # what a killed save left
            create=False,
            multiprocessing_options=alone(),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        if not list_steps(self.workdir):
            (self.workdir / _SAVED).unlink(missing_ok=True)  # of another run, moved away
        self._mark()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list:
        """Orbax's question: which of these, oldest first, must not be deleted?"""
        del context
        best = self.best["step"] if self.best else None
        first = len(checkpoints) - self._keep if self._delete_older else 0
        return [i >= first or c.step == best for i, c in enumerate(checkpoints)]

    def save(
        self, step: int, parts: Parts, position: dict[str, Any], *, delete_older: bool = True
    ) -> None:
        """Starts to save a state; returns when its arrays may be changed again.

        Args:
          delete_older: False where it is in doubt whether training can go on from it.
        """
        if self._manager is None:
            return
        # Copies: the next step may change the arrays that these are read from.
        arrays = jax.tree.map(np.array, jax.device_get(dict(parts)))
        sums = {name: checksum(tree) for name, tree in arrays.items()}
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
            position=ocp.args.JsonSave({**position, "checksums": sums}),
        )
        self._guard(lambda: self._manager.wait_until_finished())
        self._saving, self._delete_older = step, delete_older
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def record_best(self, step: int, metric: str, value: float) -> None:
        """Names the checkpoint of `step` the best from now on."""
        self.wait()
        self.best = {"step": step, "metric": metric, "value": value}
        if self._manager is not None:
            write_json(self.best, self.workdir / "best.json")

    def steps(self) -> list[int]:
        """Returns the steps saved or being saved, oldest first."""
        if self._manager is None:
            return list_steps(self.workdir)
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raises what went wrong in the background since the last call."""
        self._guard(lambda: self._manager.check_for_errors())
        self._mark()
        if mirror := storage.mirror_of(self.workdir):
            mirror.check()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises if it failed."""
        self._guard(lambda: self._manager.wait_until_finished())
        self._mark()

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        self._guard(lambda: self._manager.close())

    def _mark(self) -> None:
        """Writes down the first finished save of this start, see `had_checkpoint`."""
        if self._manager is None or self._marked >= 0:
            return
        if steps := list_steps(self.workdir):
            self._marked = steps[-1]
            write_text(f"{self._marked}\n", self.workdir / _SAVED)

    def _guard(self, action: Callable[[], Any]) -> None:
        if self._manager is None:
            return
        try:
            action()
        except Exception as error:
            steps = [s for s in list_steps(self.workdir) if s != self._saving]
            last = f"step {steps[-1]}" if steps else "none"
            raise OSError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be "
                f"written: {innermost_reason(error)}. The last good one on disk: {last}. Free "
                "space or fix the folder, then run the same command again"
            ) from error


def list_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the finished saves in a workdir, oldest first."""
    folder = pathlib.Path(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def had_checkpoint(workdir: str | os.PathLike) -> bool:
    """Returns whether a run in this folder has ever finished a save."""
    folder = pathlib.Path(workdir)
    return (folder / _SAVED).is_file() or (folder / "best.json").is_file()


def less_is_better(metric: str) -> bool:
    """Returns whether a metric is a loss, such as val/loss_ins; segm/AP/blossom is none."""
    *groups, name = metric.split("/")
    return "AP" not in groups and bool(re.fullmatch(r"(.*[^a-z])?loss([^a-z].*)?", name, re.I))


def read_best(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns {"step", "metric", "value"} of the best checkpoint that is there."""
    path = pathlib.Path(workdir) / "best.json"
    if not path.is_file():
        return None
    kind = 'the best checkpoint, {"step": 5000, "metric": "segm/AP", "value": 0.37}'
    fix = "Delete the file: the next evaluation that is the best writes it anew"
    best = read_json(path, kind, fix)
    with reading(path, kind, fix):
        if type(best["step"]) is not int or not isinstance(best["metric"], str):
            raise TypeError("step is not a whole number, or metric not a name")
        if type(best["value"]) not in (int, float) or not np.isfinite(best["value"]):
            raise TypeError("value is not a number")
    if best["step"] not in list_steps(workdir):
        log.warning("%s names step %s, which is gone", path, best["step"])
        return None
    return best


@dataclass(frozen=True)
class Restored:
    """What was read from the newest readable checkpoint of a run."""

    parts: dict[str, PyTree]
    position: dict[str, Any]
    step: int
    unreadable: list[int]  # newer steps


def restore_parts(workdir: str | os.PathLike, abstract: Parts) -> Restored | None:
    """Returns the newest readable checkpoint; None without checkpoints. Moves nothing.

    Args:
      abstract: shapes, types and shardings of the parts to restore.
    """

    def read(step: int) -> tuple[dict[str, PyTree], dict[str, Any]]:
        parts = {name: read_part(workdir, step, name, want) for name, want in abstract.items()}
        return parts, read_position(workdir, step)

    if not list_steps(workdir):
        return None
    (parts, position), step, unreadable = _newest_readable(workdir, read)
    log.info("restored %s/checkpoints/%d", workdir, step)
    return Restored(parts, position, step, unreadable)


def restore_variables(
    workdir: str | os.PathLike, which: str = "last"
) -> tuple[dict[str, PyTree], int]:
    """Returns ({"params": ..., "batch_stats": ...}, step) on the first device.

    Args:
      which: "last", "best" or a step. "last" passes over unreadable checkpoints. Where
        the run has a moving average, that is returned; "last:raw" and the like give
        the weights themselves.
    """
    which, _, kind = which.partition(":")
    if kind not in ("", "raw"):
        raise InputError(f"checkpoint {which}:{kind}: only 'raw' may follow the colon")
    steps = list_steps(workdir)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint in checkpoints/; train first")
    if which == "last":
        variables, step, _ = _newest_readable(workdir, lambda s: read_variables(workdir, s, kind))
        return variables, step
    if which == "best":
        best = read_best(workdir)
        if best is None:
            raise InputError(
                f"{workdir}: no best checkpoint, because no evaluation has finished; "
                "use the checkpoint 'last'"
            )
        step = best["step"]
    elif which.isdigit() and int(which) in steps:
        step = int(which)
    else:
        raise InputError(
            f"{workdir}: no checkpoint {which!r}; there are last, best, "
            f"{', '.join(map(str, steps))}"
        )
    try:
        return read_variables(workdir, step, kind), step
    except Exception as error:
        raise InputError(
            f"{workdir}/checkpoints/{step} is unreadable: {innermost_reason(error)}; choose "
            f"another of {steps}"
        ) from error


def _newest_readable(
    workdir: str | os.PathLike, read: Callable[[int], Any]
) -> tuple[Any, int, list[int]]:
    """Returns (what `read` returned, its step, newer steps that it could not read).

    A step that one of the processes cannot read is unreadable for all.
    """
    unreadable: dict[int, str] = {}
    for step in reversed(distributed.broadcast_from_host0(lambda: list_steps(workdir))):
        result, reason = None, ""
        try:
            result = read(step)
        # Orbax and TensorStore raise all kinds, bare Exception among them.
        except Exception as error:
            reason = innermost_reason(error)
        reason = next(filter(None, distributed.gather(reason)), "")
        if not reason:
            return result, step, list(unreadable)
        unreadable[step] = reason
        log.warning(
            "%s/checkpoints/%d is unreadable (%s): trying the one before", workdir, step, reason
        )
    reasons = "; ".join(f"{step}: {why}" for step, why in unreadable.items())
    raise ValueError(
        f"{workdir}/checkpoints: no checkpoint is readable ({reasons}). Move the "
        "folder away to start again, or give another --workdir"
    )


def move_aside(workdir: str | os.PathLike, step: int) -> None:
    """Moves an unreadable checkpoint away, so that its step can be saved again."""
    target = pathlib.Path(workdir) / "checkpoints_unreadable"
    target.mkdir(exist_ok=True)
    same_step = [p for p in target.iterdir() if p.name.split("-")[0] == str(step)]
    target /= f"{step}-{len(same_step)}" if same_step else str(step)
    storage.complete(pathlib.Path(workdir) / "checkpoints" / str(step))
    os.rename(pathlib.Path(workdir) / "checkpoints" / str(step), target)
    log.warning("moved the unreadable checkpoint of step %d to %s", step, target)


def read_run(workdir: str | os.PathLike, checkpoint: str = "last") -> Weights:
    """Returns the weights of a checkpoint ("last", "best" or a step) of a run.

    Their settings are the run's config, their class names those they were trained with.
    """
    folder = pathlib.Path(workdir)
    variables, step = restore_variables(folder, checkpoint)
    flat: dict[str, Any] = {**flatten_dict(jax.device_get(variables), sep="/")}
    settings = settings_of_config(read_config(folder / "config.json"))
    settings.update(settings_of_shapes(flat))
    drop_needless(settings)
    settings["class_names"] = read_classes(folder, step)[0]
    return Weights(f"{workdir} (step {step})", "", "workdir", flat, settings)


def load_workdir_config(workdir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """Returns the config that a run was made with, with overrides applied."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{workdir} is not the folder of a run: it has no config.json. Give the "
            "--workdir that train.py was given"
        )
    config = load_config(str(path), overrides)
    for key, (old, new) in changed_keys(read_config(path), config).items():
        if key.startswith("model.") and key != "model.dtype":
            text = f"--config.{key}={new}: the weights of {workdir} were trained with {old}"
            raise InputError(f"{text}, which their network keeps")
    return config


def read_classes(workdir: str | os.PathLike[str], step: int | None = None) -> Classes:
    """Returns the class names and category ids that a run's weights were trained with.

    They stand in each checkpoint (not in those of the first versions) and in
    classes.json; a run without the file is read all the same.

    Args:
      step: of the checkpoint; None: the newest that says it.

    Raises:
      InputError: if neither is readable, or they differ.
    """
    folder = pathlib.Path(workdir)
    path, config = folder / "classes.json", folder / "config.json"
    recorded = _recorded_classes(folder, step)
    if recorded and not path.exists():
        log.warning("%s is missing: taking the classes that the checkpoint records", path)
        return recorded
    num_classes = 0
    if config.is_file():
        values = read_json(config, "a config.json")
        with reading(config, "a config.json"):
            num_classes = values["model"]["num_classes"]
    return read_classes_file(path, recorded, num_classes)


def _recorded_classes(workdir: str | os.PathLike, step: int | None) -> Classes | None:
    for number in [step] if step is not None else reversed(list_steps(workdir)):
        try:
            classes = read_position(workdir, number)["classes"]
            return list(classes["names"]), [int(i) for i in classes["ids"]]
        # Of the first versions, or damaged: then its weights are not read either.
        except (InputError, KeyError, TypeError, ValueError) as error:
            log.debug("checkpoint %s records no classes: %s", number, error)
    return None
