"""YOLO labels: a text file per image, an outline or a box per line.

A line is `class x1 y1 x2 y2 ...`, or `class x y width height` with the centre of a box,
coordinates over the image's width and height. An
image without a label file, or with an empty one, has no objects. Where folders and lists
of a data.yaml lie follows ultralytics.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.images import image_suffixes, list_files, list_images, read_header
from solov2_jax.io import InputError
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import (
    Instances,
    names_of_yaml,
    number_names,
    read_text,
    read_yaml,
)

_SLACK = 0.01  # how far outside of the image rounding may put a point, of its side


@dataclass(frozen=True)
class YoloFiles:
    """Images below a folder, and where the labels of each would be."""

    images: str
    labels: dict[str, Path]  # name relative to `images` -> label file


def files_of_folders(images: str, labels: str, optional: bool = False) -> YoloFiles:
    """Returns the files of two folders: `a/b.jpg` in the one has `a/b.txt` in the other.

    Args:
      optional: there may be no folder of labels, as for images without objects.

    Raises:
      InputError: if a label file has no image.
    """
    names = list_images(images)
    if not os.path.isdir(labels) and not optional:
        raise InputError(f"{labels}: no such folder of labels; correct --labels.")
    stems = {name: os.path.splitext(name)[0] for name in names}
    present = list_files(labels, [".txt"]) if os.path.isdir(labels) else []
    by_stem = {os.path.splitext(p)[0]: p for p in present}  # also a.TXT
    alone = sorted(by_stem[stem] for stem in by_stem.keys() - stems.values())
    if alone := [p for p in alone if os.path.basename(p) not in ("classes.txt", "labels.txt")]:
        raise InputError(
            f"{labels}: {len(alone)} of {len(present)} label files have no image in "
            f"{images}: {describe(alone)}. Correct the folders or remove the files."
        )
    files = {n: Path(labels, by_stem.get(stem, f"{stem}.txt")) for n, stem in stems.items()}
    return YoloFiles(images, files)


def files_of_yaml(path: str, split: str) -> YoloFiles:
    """Returns the files of a split of a data.yaml: folders, lists of files, or several.

    The labels of an image are in the folder whose path has `labels` for the last `images`,
    or beside it.
    """
    content = read_yaml(path)
    places = content.get(split)
    places = [places] if isinstance(places, str) else places
    if not places or not isinstance(places, list):
        known = [key for key in ("train", "val", "test") if content.get(key)]
        raise InputError(f"{path}: has no folder of images under `{split}`; there are {known}.")
    base = os.path.dirname(os.path.abspath(path))
    stated = str(content.get("path") or "")
    root = os.path.join(base, "" if stated in ("null", "~") else stated)
    labels: dict[str, Path] = {}  # of images by their whole path
    for place in map(str, places):
        path_of_place = _resolve(place, [root, base])
        if path_of_place is None:
            raise InputError(
                f"{path}: `{split}` is {place}, but there is no folder or list of that name in "
                f"{' or '.join(dict.fromkeys([os.path.normpath(root), base]))}; correct `path`, "
                "or give --images and --labels."
            )
        if os.path.isdir(path_of_place):
            folder = str(_label_file(path_of_place))
            files = files_of_folders(path_of_place, folder, optional=True)
            labels |= {os.path.join(files.images, n): label for n, label in files.labels.items()}
        else:
            images = _read_list(path_of_place, [root, base])
            labels |= {image: _label_file(image).with_suffix(".txt") for image in images}
    if not labels:
        raise InputError(f"{path}: `{split}` ({describe(places)}) has no images.")
    top = os.path.commonpath([os.path.dirname(image) for image in labels])
    return YoloFiles(
        top, {os.path.relpath(i, top).replace(os.sep, "/"): label for i, label in labels.items()}
    )


def _resolve(place: str, roots: Sequence[str]) -> str | None:
    """Returns the first existing path; Roboflow's `../train` lies beside the yaml."""
    place = place.replace("\\", "/")
    places = [place, place.removeprefix("../")]
    paths = [os.path.normpath(os.path.join(root, p)) for p in places for root in roots]
    return next((path for path in paths if os.path.exists(path)), None)


def _read_list(path: str, roots: Sequence[str]) -> list[str]:
    """Returns the images that a text file lists, a path a line."""
    images = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if name := line.strip():
            image = _resolve(name, [os.path.dirname(path), *roots])
            if image is None:
                raise InputError(f"{path}: line {number}: there is no image {name}; correct it.")
            if not image.lower().endswith(image_suffixes()):
                raise InputError(f"{path}: line {number}: {name} is not called like an image.")
            images.append(image)
    return images


def _label_file(path: str) -> Path:
    """Returns the path with `labels` for its last part `images`, if it has one."""
    head, part, tail = f"{Path(path).as_posix()}/".rpartition("/images/")
    return Path(f"{head}/labels/{tail}" if part else path)


def names_in_yaml(path: str) -> dict[int, str]:
    """Returns category id -> name of a data.yaml, ids from 1."""
    return number_names(names_of_yaml(read_yaml(path), path), path)


def import_yolo(files: YoloFiles, categories: Mapping[int, str]) -> Instances:
    """Returns the instances of all images.

    Args:
      categories: id -> name; class k of a label file is the k-th smallest id.
    """
    if not files.labels:
        raise InputError(f"{files.images}: has no images; correct --images.")
    owners: dict[Path, str] = {}
    for name, label in files.labels.items():
        other = owners.setdefault(label, name)
        if other != name:
            raise InputError(
                f"{files.images}: {other} and {name} have the same label file; rename one."
            )
    if not any(label.exists() for label in owners):
        raise InputError(
            f"{files.images}: none of its {len(owners)} images has a label file, such as "
            f"{next(iter(owners))}; correct the folders, or give --images and --labels."
        )
    ids = sorted(categories)
    instances = Instances(categories)
    for name, path in track(files.labels.items(), "reading labels"):
        header = read_header(os.path.join(files.images, name))
        instances.add_image(name, header.height, header.width)
        if path.exists():
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                if line.strip():
                    _add_line(instances, line, f"{path}: line {number}", ids)
    return instances


def _add_line(instances: Instances, line: str, where: str, ids: list[int]) -> None:
    try:
        values: Any = np.array(line.split(), np.float64)
        index = int(values[0])  # some programs write all numbers with decimals
    except (ValueError, OverflowError):
        values, index = np.zeros(1), -1
    if index != values[0]:
        raise InputError(f"{where}: {line[:60]!r} is not `class x1 y1 x2 y2 ...` in numbers.")
    values = values[1:]
    if not 0 <= index < len(ids):
        raise InputError(
            f"{where}: class {index}, but there are {len(ids)} names (0 to "
            f"{len(ids) - 1}); correct it or the names."
        )
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{where}: {len(values)} numbers after the class; an outline has x and y "
            "of at least 3 points, a box its centre, width and height."
        )
    if not (np.isfinite(values) & (values >= -_SLACK) & (values <= 1 + _SLACK)).all():
        raise InputError(
            f"{where}: coordinates must be shares of the image's width and height, 0 "
            f"to 1; there are {values.min():g} to {values.max():g}."
        )
    height, width = instances.size
    if is_box:
        x, y, w, h = values * [width, height, width, height]
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        instances.add_box(ids[index], corners[0], corners[1], corners[2], corners[3], where=where)
        return
    points = np.clip(values.reshape(-1, 2), 0, 1) * [width, height]
    instances.add_polygons(ids[index], [points])
