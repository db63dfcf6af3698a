"""The classes of a run: names and category ids, in the order of the labels."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from solov2_jax.io import InputError, read_json, reading

Classes = tuple[list[str], list[int]]  # names, category ids


def classes_record(names: Sequence[str], ids: Sequence[int]) -> dict[str, list]:
    """Returns the classes as classes.json and a checkpoint's position hold them."""
    return {"names": list(names), "ids": [int(i) for i in ids]}


def read_classes_file(path: Path, recorded: Classes | None, num_classes: int) -> Classes:
    """Returns what a classes.json holds.

    Args:
      recorded: by the checkpoint; None: it records none.
      num_classes: of the network; 0: unknown.

    Raises:
      InputError: if the file cannot be read, or differs from either.
    """
    kind = 'classes, {"names": [...], "ids": [...]} of equal length, no id twice'
    fix = "Start train.py again with the same --workdir, which writes it"
    if recorded:
        fix = "Delete the file: the checkpoint records its classes too"
    content = read_json(path, kind, fix)
    with reading(path, kind, fix):
        names, ids = list(content["names"]), list(content["ids"])
        if not all(isinstance(n, str) for n in names) or not all(type(i) is int for i in ids):
            raise TypeError("a name is no text, or an id no whole number")
        if not names or len(names) != len(ids) or len(set(ids)) != len(ids):
            raise ValueError(f"{len(names)} names, {len(ids)} ids, {len(set(ids))} different")
        if num_classes and len(names) != num_classes:
            raise ValueError(f"{len(names)} classes, and config.json says {num_classes}")
    if recorded and (names, ids) != recorded:
        raise InputError(
            f"{path} names other classes than the checkpoint was trained with, such as "
            f"{classes_difference((names, ids), recorded)}. Delete the file, and the classes "
            "that the checkpoint records are taken"
        )
    return names, ids


def classes_difference(now: Classes, trained: Classes) -> str:
    """Returns the first class, (name, category id), that differs, as text."""
    rows = itertools.zip_longest(zip(*now, strict=True), zip(*trained, strict=True))
    label, (a, b) = next((i, row) for i, row in enumerate(rows) if row[0] != row[1])
    return f"{a} instead of {b} for label {label}"
