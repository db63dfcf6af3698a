"""Any data set that is understood -> what a trained network is evaluated on.

Classes are matched by name with the network's; ids in the data mean nothing.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from solov2_jax.data import records
from solov2_jax.data.annotations import describe, read_instances
from solov2_jax.data.coco import CocoDataset, load_coco, read_coco
from solov2_jax.io import InputError
from solov2_jax.tools.importers.merge import joined
from solov2_jax.tools.importers.parts import TEST, TRAIN, VAL, DataPart
from solov2_jax.tools.importers.recognise import recognise

log = logging.getLogger(__name__)

_NAMELESS = re.compile(r"class \d+")


@dataclass(frozen=True)
class EvalRequest:
    """Data to evaluate on.

    Attributes:
      places: see `recognise`; or one "tfds:FOLDER".
      split: "val", "test", "train" or "all"; "": of each place the validation part, else
        the test part, else what is there.
      classes: of the data, that count; (): all.
    """

    places: tuple[str, ...]
    split: str = ""
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns a word for folders: the last part of the first place."""
        first = os.path.basename(os.path.abspath(self.places[0].removeprefix("tfds:")))
        return os.path.splitext(first)[0]


def read_eval_data(
    request: EvalRequest, class_names: Sequence[str], category_ids: Sequence[int]
) -> CocoDataset:
    """Returns the data of folders or files with the network's categories; logs what it is.

    Args:
      class_names, category_ids: of the network's labels.

    Raises:
      InputError: for data that cannot be read, or classes that the network does not know.
    """
    places, split, classes = request.places, request.split, request.classes
    ids = dict(zip(class_names, (int(i) for i in category_ids), strict=True))
    if len(ids) < len(class_names):
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        raise InputError(
            f"the network has classes of one name, {describe(twice)}, so --data cannot be matched "
            "with it; give --config.data.val.images and .annotations instead"
        )
    if any(records.is_records(place) for place in places):
        return _records(request, ids)
    lines: list[str] = []
    parts: list[DataPart] = []
    for place in places:
        chosen, line = _choose(place, recognise(place), split)
        parts, lines = [*parts, *chosen], [*lines, line]
    names = _match(parts, ids, classes, lines)
    images, content = joined(parts, names, ids)
    source = f"--data {describe(list(places))}"
    table = read_instances(content, source)
    dataset = read_coco(images, table)
    if not len(dataset.labels):
        raise InputError(f"{source}: no object with an outline or mask is left to evaluate on")
    for line in lines:
        log.info("%s", line)
    return dataset


def _records(request: EvalRequest, ids: dict[str, int]) -> CocoDataset:
    places, split, classes = request.places, request.split, request.classes
    if len(places) != 1 or classes or split not in ("", VAL, TRAIN):
        raise InputError(
            f"--data {describe(list(places))}: records are used alone and as they are, --split is "
            "val or train"
        )
    part = records.SPLITS[1 if split in ("", VAL) else 0]
    root, annotations = records.split_root(places[0], part)
    return load_coco(root, annotations, categories={i: n for n, i in ids.items()})


def _choose(place: str, parts: Sequence[DataPart], split: str) -> tuple[list[DataPart], str]:
    """Returns (the parts of a place to evaluate on, a line about them)."""
    have = {p.split for p in parts}
    if split == "all":
        wanted = have
    elif split:
        wanted = {split}
    else:
        wanted = {next(name for name in (VAL, TEST, "", TRAIN) if name in have)}
    chosen = [p for p in parts if p.split in wanted]
    if not chosen:
        there = sorted(name or "one without a name" for name in have)
        raise InputError(f"--data {place}: has no part {split}, only {describe(there)}")
    names = {TRAIN: "training", VAL: "validation", TEST: "test", "": "whole"}
    images = sum(len(p.content["images"]) for p in chosen)
    objects = sum(len(p.content["annotations"]) for p in chosen)
    which = " and ".join(names[name] for name in sorted(wanted))
    notes = "".join(f"; {note}" for p in chosen for note in p.notes)
    line = f"{place}: {chosen[0].kind}, {which} part, {images} images, {objects} objects{notes}"
    return chosen, line


def _match(
    parts: Sequence[DataPart], ids: dict[str, int], classes: Sequence[str], lines: list[str]
) -> dict[str, str]:
    """Returns class of the data -> class of the network; adds lines on what is left out.

    Raises:
      InputError: naming classes with objects that the network does not know.
    """
    found: dict[str, int] = {}
    objects = Counter[str]()
    for part in parts:
        class_of = {c["id"]: str(c["name"]).strip() for c in part.content["categories"]}
        for number, name in sorted(class_of.items()):
            found.setdefault(name, number)
        counts = Counter(a["category_id"] for a in part.content["annotations"])
        objects.update({class_of[number]: count for number, count in counts.items()})
    if missing := [name for name in classes if name not in found]:
        raise InputError(f"--classes: {describe(missing)}: the data has {describe(sorted(found))}")
    kept = [name for name in found if not classes or name in classes]
    if all(_NAMELESS.fullmatch(name) for name in ids) and not set(kept) & set(ids):
        return _by_order(kept, found, ids, lines)
    if unknown := [name for name in kept if name not in ids and objects[name]]:
        near = [n for n in ids if n.casefold() == unknown[0].casefold()]
        near = near or get_close_matches(unknown[0], list(ids), 1, 0.7)
        hint = f" (is {unknown[0]!r} its {near[0]!r}?)" if near else ""
        raise InputError(
            f"--data: objects of classes that the network does not know: "
            f"{describe([f'{name} ({objects[name]} objects)' for name in unknown])}{hint}; it "
            f"knows {describe(list(ids))}. Rename them in the data, or evaluate those it has in "
            "common with it by --classes"
        )
    common = [name for name in kept if name in ids]
    if not any(objects[name] for name in common):
        raise InputError(
            f"--data: has no object of the network's classes, {describe(list(ids))}, only of "
            f"{describe(sorted(n for n in found if objects[n])) or 'none'}"
        )
    if left := sorted(set(found) - set(kept)):
        lines.append(f"classes left out, with their objects: {describe(left)}")
    if absent := [name for name in ids if not objects[name] or name not in common]:
        lines.append(f"classes of the network without objects here, no AP: {describe(absent)}")
    return {name: name for name in common}


def _by_order(
    kept: Sequence[str], found: dict[str, int], ids: dict[str, int], lines: list[str]
) -> dict[str, str]:
    """Returns the data's classes by id -> the network's, which have no names."""
    if len(kept) != len(ids):
        raise InputError(
            f"--data: has {len(kept)} classes, and the weights {len(ids)} without names; give the "
            "weights names (--setting class_names in `solov2 convert`), or data with as many"
        )
    lines.append(f"the weights name no classes: taken in the order of the data's {len(kept)} ids")
    ordered = sorted(kept, key=lambda name: found[name])
    return dict(zip(ordered, ids, strict=True))
