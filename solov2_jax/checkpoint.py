"""Checkpoints on disk: written in the background, read back only if they are whole.

A checkpoint is `checkpoints/<step>/` with these parts: `variables` (what inference
needs), `optimizer` (step and optimiser state), `average` (moving average of the
variables, where the run keeps one) and `position` (JSON: where the data stands, and
checksums of the others). A folder with a whole number as its name is a
finished save; Orbax writes into a temporary name and renames at the end. `best.json` in
the workdir names the best checkpoint.


A run's weights with the settings they were trained under.

What the folder of a training run says about its network: config and classes."""

import json
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from solov2_jax import distributed
from solov2_jax.config import load_config, read_config
from solov2_jax.io import write_json
from solov2_jax.training.state import TrainState
from solov2_jax.weights.convert import flatten_tree
from solov2_jax.weights.settings import drop_needless, settings_of_config, settings_of_shapes
from solov2_jax.weights.sources import Weights

PyTree = Any

log = logging.getLogger("solov2_jax")


class CheckpointManager:
    """Saves the states of one run; keeps the newest ones, and the best besides.

    Every process has a copy of the state, and the first one saves for all.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self.workdir = pathlib.Path(workdir).absolute()
        self.folder = self.workdir / "checkpoints"
        self.best = read_best(self.workdir)
        self._keep = keep
        self._saving: int | None = None
        self._manager: Any = None
        if not distributed.is_primary():
            return
        self.folder.mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # type: ignore[arg-type]  # `should_preserve`
            cleanup_tmp_directories=True,  # what a killed save left
            create=False,
            multiprocessing_options=_alone(),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list:
        """Orbax's question: which of these, oldest first, must not be deleted?"""
        del context
        best = self.best["step"] if self.best else None
        first = len(checkpoints) - self._keep
        return [i >= first or c.step == best for i, c in enumerate(checkpoints)]

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Starts to save a state; returns when the state may be changed again."""
        if self._manager is None:
            return
        step = int(state.step)
        arrays = {
            "variables": state.variables,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
        }
        if state.average is not None:
            arrays["average"] = state.average
        # Copies: the next step may change the arrays that these are read from.
        arrays = jax.tree.map(np.array, jax.device_get(arrays))
        sums = {name: checksum(tree) for name, tree in arrays.items()}
        parts = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
            position=ocp.args.JsonSave({**position, "checksums": sums}),
        )
        self._guard(lambda: self._manager.wait_until_finished())
        self._saving = step
        self._guard(lambda: self._manager.save(step, args=parts, force=True))

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

    def wait(self) -> None:
        """Returns when the last save is on disk; raises if it failed."""
        self._guard(lambda: self._manager.wait_until_finished())

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        self._guard(lambda: self._manager.close())

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
                f"written: {_reason(error)}. The last good one on disk: {last}. Free "
                "space or mend the folder, then run the same command again"
            ) from error


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns Orbax's settings for work of this process that no other takes part in."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(me, {me}, f"process_{me}")


def checksum(tree: PyTree) -> int:
    """Returns the CRC-32 of a tree's leaves, one after the other.

    Orbax notices a file that is cut short, but not a bit that flipped in one.
    """
    crc = 0
    for leaf in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).tobytes(), crc)
    return crc


def list_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the finished saves in a workdir, oldest first."""
    folder = pathlib.Path(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def read_best(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns {"step", "metric", "value"} of the best checkpoint that is there."""
    path = pathlib.Path(workdir) / "best.json"
    if not path.is_file():
        return None
    try:
        best = json.loads(path.read_text())
        present = best["step"] in list_steps(workdir)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not readable ({error}); delete the file") from error
    if not present:
        log.warning("%s names step %s, which is gone", path, best["step"])
    return best if present else None


def restore_state(
    workdir: str | os.PathLike, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest readable state and its position; None without checkpoints.

    Unreadable checkpoints newer than that are moved to `checkpoints_unreadable/`, so
    that their steps can be saved again.

    Args:
      abstract: shapes, types and shardings to restore to.
    """

    def read(step: int):
        want = {"step": abstract.step, "opt_state": abstract.opt_state}
        optimizer = _read_part(workdir, step, "optimizer", want)
        variables = _read_part(workdir, step, "variables", abstract.variables)
        state = replace(
            abstract,
            step=optimizer["step"],
            opt_state=optimizer["opt_state"],
            params=variables["params"],
            model_state={k: v for k, v in variables.items() if k != "params"},
        )
        if abstract.average is not None:
            average = _read_part(workdir, step, "average", abstract.average)
            state = replace(state, average=average)
        return state, read_position(workdir, step)

    if not list_steps(workdir):
        return None
    result, step, unreadable = _newest_readable(workdir, read)
    for bad in unreadable:
        _move_aside(workdir, bad)
    log.info("restored %s/checkpoints/%d", workdir, step)
    return result


def restore_variables(
    workdir: str | os.PathLike, which: str = "last"
) -> tuple[dict[str, PyTree], int]:
    """Returns ({"params": ..., "batch_stats": ...}, step) on the first device.

    Args:
      which: "last", "best" or a step. "last" passes over unreadable checkpoints. Where
        the run keeps a moving average, that is returned; "last:raw" and the like give
        the weights themselves.
    """
    which, _, kind = which.partition(":")
    if kind not in ("", "raw"):
        raise ValueError(f"checkpoint {which}:{kind}: after the colon only 'raw' can be")
    steps = list_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir}: no checkpoint in checkpoints/; train first")
    if which == "last":
        variables, step, _ = _newest_readable(workdir, lambda s: _variables(workdir, s, kind))
        return variables, step
    if which == "best":
        best = read_best(workdir)
        if best is None:
            raise ValueError(
                f"{workdir}: no best checkpoint, because no evaluation has finished; "
                "use the checkpoint 'last'"
            )
        step = best["step"]
    elif which.isdigit() and int(which) in steps:
        step = int(which)
    else:
        raise ValueError(
            f"{workdir}: no checkpoint {which!r}; there are last, best, "
            f"{', '.join(map(str, steps))}"
        )
    try:
        return _variables(workdir, step, kind), step
    except Exception as error:
        raise ValueError(
            f"{workdir}/checkpoints/{step} is unreadable: {_reason(error)}; choose "
            f"another of {steps}"
        ) from error


def read_position(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns what was saved beside the arrays of a checkpoint."""
    path = pathlib.Path(workdir) / "checkpoints" / str(step) / "position" / "metadata"
    return json.loads(path.read_text())


def _variables(workdir: str | os.PathLike, step: int, kind: str) -> dict[str, PyTree]:
    folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
    averaged = kind != "raw" and "average" in read_position(workdir, step)["checksums"]
    part = "average" if averaged else "variables"
    folder /= part
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
        stored = reader.metadata(folder).item_metadata.tree
    want = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), stored)
    return _read_part(workdir, step, part, want)


def _read_part(workdir: str | os.PathLike, step: int, part: str, want: PyTree) -> PyTree:
    """Returns one part of a checkpoint; raises whatever shows that it is not whole."""
    folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
        tree = reader.restore(folder / part, want)
    if checksum(tree) != read_position(workdir, step)["checksums"][part]:
        raise ValueError(f"the checksum of {part} is wrong: a file was changed")
    return tree


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
            reason = _reason(error)
        reason = next(filter(None, distributed.gather(reason)), "")
        if not reason:
            return result, step, list(unreadable)
        unreadable[step] = reason
        log.warning(
            "%s/checkpoints/%d is unreadable (%s): trying the one before",
            *(workdir, step, reason),
        )
    reasons = "; ".join(f"{step}: {why}" for step, why in unreadable.items())
    raise ValueError(
        f"{workdir}/checkpoints: no checkpoint is readable ({reasons}). Move the "
        "folder away to start again, or give another --workdir"
    )


def _move_aside(workdir: str | os.PathLike, step: int) -> None:
    if not distributed.is_primary():
        return
    folder = pathlib.Path(workdir)
    target = folder / "checkpoints_unreadable"
    target.mkdir(exist_ok=True)
    number = len([p for p in target.iterdir() if p.name.split("-")[0] == str(step)])
    target /= f"{step}-{number}" if number else str(step)
    os.rename(folder / "checkpoints" / str(step), target)
    log.warning("moved the unreadable checkpoint of step %d to %s", step, target)


def _reason(error: BaseException) -> str:
    """Returns one short line: the innermost message that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def read_run(workdir: str | os.PathLike, checkpoint: str = "last") -> Weights:
    """Returns the weights of a checkpoint ("last", "best" or a step) of a run.

    Their settings are the run's config, their class names its classes.json.
    """
    folder = pathlib.Path(workdir)
    variables, step = restore_variables(folder, checkpoint)
    flat = dict(flatten_tree(jax.device_get(variables)))
    settings = settings_of_config(read_config(folder / "config.json"))
    settings.update(settings_of_shapes(flat))
    drop_needless(settings)
    try:
        classes = json.loads((folder / "classes.json").read_text())
        settings["class_names"] = [str(name) for name in classes["names"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'classes.json'}: unreadable ({error})") from error
    return Weights(f"{workdir} (step {step})", "", "workdir", flat, settings)


def load_workdir_config(workdir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """Returns the config that a run was made with, with overrides applied."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not the folder of a run: it has no config.json. Give the "
            "--workdir that train.py was given"
        )
    return load_config(str(path), overrides)


def read_classes(workdir: str | os.PathLike[str]) -> tuple[list[str], list[int]]:
    """Returns the class names and category ids of a run."""
    path = Path(workdir) / "classes.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        return list(content["names"]), [int(i) for i in content["ids"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: cannot be read as {{"names": [...], "ids": [...]}} ({error}); '
            "start train.py again with the same --workdir, which writes it"
        ) from error
