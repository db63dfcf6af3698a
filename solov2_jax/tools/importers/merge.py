"""Several data sets -> one: classes merged by name, a validation part split off."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from solov2_jax.config import suggest
from solov2_jax.data.annotations import WEIGHT, describe
from solov2_jax.data.cityscapes import GT_FINE, find_gt_fine
from solov2_jax.data.federated import SEARCHED
from solov2_jax.data.sampler import random_bits
from solov2_jax.io import InputError
from solov2_jax.tools.importers.parts import TEST, TRAIN, VAL, DataPart

VAL_SHARE, MOST_VAL = 0.2, 5000
TRAINING_ONLY = "training_only"  # in a json's `info`: labels that a network made
# Roboflow writes several augmented copies of a picture: a.jpg.rf.HASH.jpg.
COPIES = r"(.+)\.rf\.[0-9a-f]{8,}"
_SPLIT_STREAM = 91  # of `random_bits`; no other use has it


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
      classes: names to keep; (): all.
      single_class: whether all classes become one, "object".
      group: regular expression of file names: images that its first group is equal for
        stay on one side of the split.
      val_share: of the images, where a validation part has to be split off.
      weights: how often an epoch shows the training images of each source; (): once.
    """

    classes: tuple[str, ...] = ()
    single_class: bool = False
    group: str = COPIES
    val_share: float = VAL_SHARE
    weights: tuple[float, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class MergedData:
    """Training and validation data as instances json texts, or files that exist.

    Attributes:
      images: folders of the training and of the validation images.
      contents: of the two parts.
      files: the two jsons that hold just the contents, ("", "") if they must be written.
      lines: what was found and decided, a sentence each.
      image_folders: of all parts, before they were joined.
    """

    images: tuple[str, str]
    contents: tuple[dict[str, Any], dict[str, Any]]
    files: tuple[str, str]
    lines: tuple[str, ...]
    image_folders: tuple[str, ...] = ()

    def texts(self) -> tuple[str, str]:
        """Returns the two jsons' texts."""
        return json.dumps(self.contents[0]), json.dumps(self.contents[1])


def merge(sources: Mapping[str, Sequence[DataPart]], options: Options) -> MergedData:
    """Returns one data set of several, by place.

    Raises:
      InputError: for classes that are not there, or data that cannot be split.
    """
    lines, train, val = [], [], []
    weights = options.weights or (1.0,) * len(sources)
    shown = []  # of each source, how many images an epoch has
    for (place, parts), weight in zip(sources.items(), weights, strict=True):
        first, second, said = _train_and_val(place, parts, options)
        shown.append(weight * sum(len(p.content["images"]) for p in first))
        first = [_weighted(p, weight) for p in first]
        train, val, lines = [*train, *first], [*val, *second], [*lines, *said]
    if not val:
        raise InputError(
            f"--data {describe(sources)}: only pseudo-labels, on which nothing is evaluated; give "
            "a folder that people labelled as well."
        )
    used = [*train, *val]
    names, ids = _classes(used, options, keep_ids=len(sources) == 1)
    lines += _class_lines(sources, used, names)
    if len(sources) > 1:
        lines += _weight_lines(sources, weights, shown)
    changed = len(train) > 1 or len(val) > 1 or any(not p.file for p in used)
    if not changed and all(_ids(p) == {i: n for n, i in ids.items()} for p in used):
        files, contents = (train[0].file, val[0].file), (train[0].content, val[0].content)
        return MergedData((train[0].images, val[0].images), contents, files, tuple(lines))
    pairs = [joined(parts, names, ids) for parts in (train, val)]
    images, contents = (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])
    folders = tuple(sorted({os.path.abspath(p.images) for p in used}))
    return MergedData(images, contents, ("", ""), tuple(lines), folders)


# --- Training and validation ---------------------------------------------------------


def _train_and_val(
    place: str, parts: Sequence[DataPart], options: Options
) -> tuple[list[DataPart], list[DataPart], list[str]]:
    """Returns the parts of a source for training and for validation, with lines on them."""
    lines = []
    for part in parts:
        name = {TRAIN: "training", VAL: "validation", TEST: "test"}.get(part.split, "")
        what = f"{name} {_numbers(part)}".strip()
        lines.append(f"{place}: {part.kind}, {what}" + "".join(f"; {n}" for n in part.notes))
    train = [p for p in parts if p.split in (TRAIN, "")]
    val, test = [p for p in parts if p.split == VAL], [p for p in parts if p.split == TEST]
    if not train:
        have = sorted({p.split for p in parts})
        raise InputError(
            f"--data {place}: has no training part, only {describe(have)}; give the folder above, "
            "or rename it."
        )
    if test:
        lines.append(
            f"{place}: the test part is neither trained on nor used to choose a checkpoint"
        )
    if val:
        return train, val, lines
    if all(is_training_only(p) for p in train):
        lines.append(f"{place}: pseudo-labels: trained on, and not used for validation")
        return train, [], lines
    pairs = [split(p, options) for p in train]
    number = sum(len(v.content["images"]) for _, v in pairs)
    total = sum(len(p.content["images"]) for p in train)
    lines.append(
        f"{place}: has no validation part: {number} of {total} images are split off, stratified "
        f"by class (seed {options.seed})"
    )
    return [t for t, _ in pairs], [v for _, v in pairs], lines


def is_training_only(part: DataPart) -> bool:
    """Returns whether a part says that nothing may be evaluated on it."""
    info = part.content.get("info")
    return isinstance(info, dict) and info.get(TRAINING_ONLY) is True


def _weighted(part: DataPart, weight: float) -> DataPart:
    """Returns a part whose images are shown `weight` times as often."""
    if weight == 1:
        return part
    images = [{**i, WEIGHT: (i.get(WEIGHT) or 1) * weight} for i in part.content["images"]]
    return replace(part, content={**part.content, "images": images}, file="")


def _numbers(part: DataPart) -> str:
    records = part.content["annotations"]
    crowds = sum(bool(a.get("iscrowd")) for a in records)
    text = f"{len(part.content['images'])} images, {len(records) - crowds} objects"
    return f"{text}, {crowds} crowd regions" if crowds else text


def split(part: DataPart, options: Options) -> tuple[DataPart, DataPart]:
    """Returns a part without some of its images, and those; a function of names and seed.

    From the rarest class to the most frequent one, images go to validation until it has
    its share of the images with the class, and of those without any.

    Raises:
      InputError: if there is nothing to split.
    """
    images = part.content["images"]
    groups = list(image_groups([i["file_name"] for i in images], options.group).values())
    if len(groups) < 2:
        raise InputError(
            f"{part.images}: {len(images)} images in {len(groups)} group cannot be split into "
            "training and validation; add images, or a validation part."
        )
    place = {image["id"]: n for n, image in enumerate(images)}
    classes: list[set[Any]] = [set() for _ in images]
    for record in part.content["annotations"]:
        classes[place[record["image_id"]]].add(record["category_id"])
    held = [set().union(*(classes[i] for i in group)) or {None} for group in groups]
    order = np.argsort(random_bits(options.seed, _SPLIT_STREAM, np.arange(len(groups)))).tolist()
    having = Counter(c for each in held for c in each)
    share = min(options.val_share, MOST_VAL / len(images))
    chosen: set[int] = set()
    for label, number in sorted(having.items(), key=lambda item: (item[1], str(item[0]))):
        wanted = max(round(share * number), int(number >= 4))
        members = [g for g in order if label in held[g]]
        missing = wanted - sum(g in chosen for g in members)
        chosen |= set([g for g in members if g not in chosen][: max(missing, 0)])
    chosen = chosen or {order[0]}
    taken = {i for g in chosen for i in groups[g]}
    rest = [n for n in range(len(images)) if n not in taken]
    return _subset(part, rest, TRAIN), _subset(part, sorted(taken), VAL)


def image_groups(names: Sequence[str], group: str) -> dict[str, list[int]]:
    """Returns the places of the images that stay together, in the names' order.

    Args:
      group: regular expression, of the whole name or, where that has no match, of the file's
        name without its folders; "": each image is alone.

    Raises:
      InputError: for what is none, or has no group.
    """
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise InputError(f"--group {group}: is no regular expression ({error}).") from error
    if group and not pattern.groups:
        raise InputError(f"--group {group}: put what images of a group share in brackets.")
    groups: dict[str, list[int]] = {}
    for number in sorted(range(len(names)), key=lambda n: names[n]):
        name = names[number]
        match = (pattern.search(name) or pattern.search(os.path.basename(name))) if group else None
        key = name if match is None or match[1] is None else f"/{match[1]}"
        groups.setdefault(key, []).append(number)
    return groups


def _subset(part: DataPart, places: Iterable[int], name: str) -> DataPart:
    """Returns a part with some of its images, by place."""
    images = [part.content["images"][n] for n in places]
    ids = {image["id"] for image in images}
    records = [a for a in part.content["annotations"] if a["image_id"] in ids]
    content = {**part.content, "images": images, "annotations": records}
    return replace(part, split=name, content=content, file="", notes=())


# --- Classes -------------------------------------------------------------------------


def _ids(part: DataPart) -> dict[int, str]:
    return {c["id"]: c["name"] for c in part.content["categories"]}


def _classes(
    parts: Sequence[DataPart], options: Options, *, keep_ids: bool
) -> tuple[dict[str, str], dict[str, int]]:
    """Returns (name in the data -> name of the class, name of the class -> id).

    Args:
      keep_ids: of a single data set, whose classes have theirs already.
    """
    found: dict[str, int] = {}
    for part in parts:
        for number, name in sorted(_ids(part).items()):
            found.setdefault(str(name).strip(), int(number))
    if unknown := [name for name in options.classes if name not in found]:
        raise InputError(
            f"--classes: {describe(unknown)}: there is no such class"
            f"{suggest(unknown[0], found)} There are {describe(sorted(found))}."
        )
    kept = {n: i for n, i in found.items() if not options.classes or n in options.classes}
    if options.single_class:
        return dict.fromkeys(kept, "object"), {"object": 1}
    if not keep_ids or len(set(kept.values())) < len(kept):
        kept = {name: number for number, name in enumerate(kept, start=1)}
    return {name: name for name in kept}, kept


def _class_lines(
    sources: Mapping[str, Sequence[DataPart]], parts: Sequence[DataPart], names: Mapping[str, str]
) -> list[str]:
    """Returns how many objects each class has, and of several sources from where."""
    total = _objects(parts, names)
    by_number = sorted(dict.fromkeys(names.values()), key=lambda name: (-total[name], name))
    shown = describe([f"{name} ({total[name]} objects)" for name in by_number])
    lines = [f"classes: {len(by_number)}: {shown}"]
    if left := sorted({str(n).strip() for p in parts for n in _ids(p).values()} - names.keys()):
        lines.append(f"classes left out, with their objects: {describe(left)}")
    folded = Counter(name.casefold() for name in set(names.values()))
    if twice := sorted(n for n in set(names.values()) if folded[n.casefold()] > 1):
        lines.append(f"classes that differ in capitals only are kept apart: {describe(twice)}")
    if len(sources) > 1:
        columns = [_objects(parts, names) for parts in sources.values()]
        width = max(len(name) for name in ["class", *by_number])
        head = [f"{os.path.basename(os.path.normpath(p))[:20]:>20}" for p in sources]
        rows = [f"merged by name: {'class':{width}}{''.join(head)}"]
        for name in by_number:
            cells = "".join(f"{column[name] or '-':>20}" for column in columns)
            rows.append(f"                {name:{width}}{cells}")
        lines += rows
    return lines


def _weight_lines(
    sources: Iterable[str], weights: Sequence[float], shown: Sequence[float]
) -> list[str]:
    """Returns the table of how often each source is trained on."""
    total = sum(shown)
    lines = [f"weights: an epoch has {total:.0f} images"]
    for place, weight, number in zip(sources, weights, shown, strict=True):
        share = f"{number:.0f} images, {100 * number / total:.1f} %"
        lines.append(f"         {place}: weight {weight:g}: {share}")
    return lines


def _objects(parts: Iterable[DataPart], names: Mapping[str, str]) -> Counter[str]:
    """Returns the number of objects of each class."""
    counts = Counter[str]()
    for part in parts:
        class_of = {i: names.get(str(n).strip()) for i, n in _ids(part).items()}
        objects = [a for a in part.content["annotations"] if not a.get("iscrowd")]
        kinds = Counter(a["category_id"] for a in objects)
        for number, count in kinds.items():
            if name := class_of.get(number):
                counts[name] += count
    return counts


def joined(
    parts: Sequence[DataPart], names: Mapping[str, str], ids: Mapping[str, int]
) -> tuple[str, dict[str, Any]]:
    """Returns (image folder, content) of several parts; ids of images stay if there is one."""
    folders = [os.path.abspath(p.images) for p in parts]
    top = os.path.commonpath(folders)
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for part, folder in zip(parts, folders, strict=True):
        below = os.path.relpath(folder, top).replace(os.sep, "/")
        class_of = {i: names.get(str(n).strip()) for i, n in _ids(part).items()}
        place = {}
        for image in part.content["images"]:
            place[image["id"]] = image["id"] if len(parts) == 1 else len(images) + 1
            name = image["file_name"] if below == "." else f"{below}/{image['file_name']}"
            searched = {
                key: [ids[str(class_of[int(i)])] for i in image[key] if class_of.get(int(i))]
                for key in SEARCHED
                if key in image
            }
            new = {"id": place[image["id"]], "file_name": name}
            images.append({**image, **new, **searched})
        for record in part.content["annotations"]:
            name = class_of[record["category_id"]]
            if name is not None:
                moved = {"image_id": place[record["image_id"]], "category_id": ids[name]}
                number = {} if len(parts) == 1 else {"id": len(records) + 1}
                records.append({**record, **moved, **number})
    known = [c for p in parts for c in p.content["categories"] if c.get("frequency")]
    frequency = {names.get(str(c["name"]).strip()): c["frequency"] for c in known}
    categories: list[dict[str, Any]] = [
        {"id": i, "name": n, **({"frequency": frequency[n]} if n in frequency else {})}
        for n, i in sorted(ids.items(), key=lambda item: item[1])
    ]
    content: dict[str, Any] = {"images": images, "annotations": records, "categories": categories}
    # Cityscapes' metric needs the data set's own names of files and numbers of classes.
    if len(parts) == 1 and (folder := find_gt_fine(parts[0].content)):
        if all(_ids(parts[0]).get(i) == name for name, i in ids.items()):
            content["info"] = {GT_FINE: folder}
    return top, content
