"""A part of a data set as COCO instances, which part a name says it is, and which picture."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solov2_jax.data.annotations import describe
from solov2_jax.io import InputError

TRAIN, VAL, TEST = "train", "val", "test"
_SPLIT = re.compile(
    r"(?:^|[^a-z])(?:(train(?:ing)?)|(val(?:id(?:ation)?)?|dev)|(test(?:ing)?))\d*(?:[^a-z]|$)"
)


@dataclass(frozen=True)
class DataPart:
    """The images, objects and classes of one part of a data set.

    Attributes:
      kind: the format's name.
      split: "train", "val", "test", or "" where no name says.
      images: folder that the file names are relative to.
      content: COCO instances: images, annotations, categories.
      file: the json that holds just this content, "" where there is none.
      notes: what was assumed or left out, a phrase each.
    """

    kind: str
    split: str
    images: str
    content: dict[str, Any]
    file: str = ""
    notes: tuple[str, ...] = ()


def split_of(name: str) -> str:
    """Returns which part a file's or folder's name says it is, "" if none."""
    match = _SPLIT.search(name.lower())
    return (TRAIN, VAL, TEST)[(match.lastindex or 1) - 1] if match else ""


def by_name(places: Iterable[str]) -> dict[str, list[str]]:
    """Returns {file name: the paths, with "/", of that name}."""
    found: dict[str, list[str]] = {}
    for place in places:
        found.setdefault(place.rpartition("/")[2], []).append(place)
    return found


def find_picture(places: Mapping[str, Sequence[str]], stated: str, where: object) -> str | None:
    """Returns the path, of `by_name`'s, that a label file means: by its name, and of several by
    as many of the folders above it as are the same; None without one of its name.

    Raises:
      InputError: where that are several.
    """
    wanted = stated.replace("\\", "/").split("/")[::-1]
    shared = {}
    for place in places.get(wanted[0], ()):
        same = [a == b for a, b in zip(place.split("/")[::-1], wanted, strict=False)]
        shared[place] = [*same, False].index(False) + (place == stated)
    found = [place for place, number in shared.items() if number == max(shared.values())]
    if len(found) > 1:
        raise InputError(f"{where}: {stated} may be {describe(found)}; give them different names.")
    return found[0] if found else None
