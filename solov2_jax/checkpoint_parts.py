"""The parts of a checkpoint on disk, read back and checked, by one process for all."""

import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from solov2_jax import distributed, storage
from solov2_jax.io import read_json

PyTree = Any

_OLD_NAMES = {"ema": "average"}
_EMA = ("ema", "average")


def alone() -> ocp.options.MultiprocessingOptions:
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


def read_position(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns what was saved beside the arrays of a checkpoint."""
    path = pathlib.Path(workdir) / "checkpoints" / str(step) / "position" / "metadata"
    return read_json(path, "a checkpoint's position")


def read_variables(workdir: str | os.PathLike, step: int, kind: str) -> dict[str, PyTree]:
    stored = read_position(workdir, step)["checksums"]
    has_ema = kind != "raw" and any(name in stored for name in _EMA)
    part = "ema" if has_ema else "variables"
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shapes() -> dict[str, tuple[list[int], str]]:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as reader:
            tree = reader.metadata(_part_folder(workdir, step, part)).item_metadata.tree
        flat: dict[str, Any] = {**flatten_dict(tree, sep="/")}
        return {name: (list(m.shape), str(m.dtype)) for name, m in flat.items()}

    want = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=device)
        for name, (shape, dtype) in _by_host0(shapes).items()
    }
    return read_part(workdir, step, part, unflatten_dict(want, sep="/"))


def read_part(workdir: str | os.PathLike, step: int, part: str, want: PyTree) -> PyTree:
    """Returns one part of a checkpoint; raises whatever shows that it is not whole.

    Of several processes the first one reads it, and sends it to the others.
    """

    def read(want: PyTree) -> PyTree:
        folder = _part_folder(workdir, step, part)
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as reader:
            tree = reader.restore(folder, want)
        if checksum(tree) != read_position(workdir, step)["checksums"][folder.name]:
            raise ValueError(f"the checksum of {folder.name} is wrong: a file was changed")
        return tree

    if jax.process_count() == 1:
        return read(want)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), want)
    arrays: list[PyTree] = []
    _by_host0(lambda: arrays.append(jax.device_get(read(here))))
    return distributed.copy_from_host0(arrays[0] if arrays else None, want)


def _part_folder(workdir: str | os.PathLike, step: int, part: str) -> pathlib.Path:
    """Returns where a part of a checkpoint lies, also under its older name."""
    folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
    old = folder / _OLD_NAMES.get(part, part)
    for path in {old, folder / part}:
        storage.complete(path)
    return old if old.is_dir() else folder / part


def _by_host0(make: Callable[[], Any]) -> Any:
    """Returns make() of the first process, which alone calls it; what it raises, all raise.

    JSON values only.
    """
    errors: list[Exception] = []

    def attempt() -> tuple[Any, str]:
        try:
            return make(), ""
        # Orbax and TensorStore raise all kinds, bare Exception among them.
        except Exception as error:
            errors.append(error)
            return None, innermost_reason(error)

    value, reason = distributed.broadcast_from_host0(attempt)
    if errors:
        raise errors[0]
    if reason:
        raise ValueError(reason)
    return value


def innermost_reason(error: BaseException) -> str:
    """Returns one short line: the innermost message that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
