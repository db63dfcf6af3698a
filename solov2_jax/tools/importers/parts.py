"""A part of a data set as COCO instances, and which part a name says it is."""

import re
from dataclasses import dataclass
from typing import Any

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
