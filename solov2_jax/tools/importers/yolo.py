"""YOLO segmentation labels: a text file per image, an outline per line.

A line is `class x1 y1 x2 y2 ...`, coordinates over the image's width and height. An
image without a label file, or with an empty one, has no objects.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.images import list_images, read_header
from solov2_jax.tools.importers.instances import Instances
from solov2_jax.tools.importers.names import names_of_yaml, read_text, read_yaml

_SLACK = 0.01  # how far outside of the image rounding may put a point, of its side


def import_yolo(images: str, labels: str, categories: Mapping[int, str]) -> Instances:
    """Returns the instances of all images below a folder.

    Args:
      images, labels: folders; `a/b.jpg` in the one has `a/b.txt` in the other.
      categories: id -> name; class k of a label file is the k-th smallest id.
    """
    names = list_images(images)
    if not names:
        raise ValueError(f"{images}: has no images; correct --images.")
    if not os.path.isdir(labels):
        raise ValueError(f"{labels}: no such folder of labels; correct --labels.")
    _check_pairs(images, labels, names)
    ids = sorted(categories)
    instances = Instances(categories)
    for name in names:
        header = read_header(os.path.join(images, name))
        instances.add_image(name, header.height, header.width)
        path = Path(labels, name).with_suffix(".txt")
        if path.exists():
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                if line.strip():
                    _add_line(instances, line, f"{path}: line {number}", ids)
    return instances


def _check_pairs(images: str, labels: str, names: list[str]) -> None:
    """Raises if two images share a label file, or a label file has no image."""
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise ValueError(f"{images}: {other} and {name} have the same label file; rename one.")
    found = [p.relative_to(labels) for p in sorted(Path(labels).rglob("*.txt"))]
    alone = [str(p) for p in found if p.with_suffix("").as_posix() not in stems]
    alone = [p for p in alone if Path(p).name not in ("classes.txt", "labels.txt")]
    if alone:
        raise ValueError(
            f"{labels}: {len(alone)} of {len(found)} label files have no image in "
            f"{images}: {describe(alone)}. Correct the folders or remove the files."
        )


def _add_line(instances: Instances, line: str, where: str, ids: list[int]) -> None:
    words = line.split()
    try:
        index, values = int(words[0]), np.array(words[1:], np.float64)
    except ValueError:
        raise ValueError(
            f"{where}: {line[:60]!r} is not `class x1 y1 x2 y2 ...` in numbers."
        ) from None
    if not 0 <= index < len(ids):
        raise ValueError(
            f"{where}: class {index}, but there are {len(ids)} names (0 to "
            f"{len(ids) - 1}); correct it or the names."
        )
    if len(values) == 4:
        raise ValueError(
            f"{where}: four numbers after the class are a box, not an outline; export "
            "the data set for segmentation."
        )
    if len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{where}: {len(values)} numbers after the class; an outline has x and y "
            "of at least 3 points."
        )
    if not (np.isfinite(values) & (values >= -_SLACK) & (values <= 1 + _SLACK)).all():
        raise ValueError(
            f"{where}: coordinates must be shares of the image's width and height, 0 "
            f"to 1; found {values.min():g} to {values.max():g}."
        )
    height, width = instances.size
    points = np.clip(values.reshape(-1, 2), 0, 1) * [width, height]
    instances.add_polygons(ids[index], [points])


def folders_of_yaml(path: str, split: str) -> tuple[str, str, dict[int, str]]:
    """Returns (images, labels, categories) of a split that a data.yaml names.

    As is usual there, the folder of the labels is that of the images with its last
    `images` replaced by `labels`.
    """
    content = read_yaml(path)
    names = names_of_yaml(content, path)
    folder = content.get(split)
    if not isinstance(folder, str):
        known = [k for k in ("train", "val", "test") if isinstance(content.get(k), str)]
        raise ValueError(f"{path}: has no folder of images under `{split}`; there are {known}.")
    base = os.path.dirname(os.path.abspath(path))
    root = os.path.join(base, str(content.get("path") or ""))
    candidates = [os.path.normpath(os.path.join(r, folder)) for r in (root, base)]
    images = next((c for c in candidates if os.path.isdir(c)), None)
    if images is None:
        tried = " and ".join(dict.fromkeys(candidates))
        raise ValueError(
            f"{path}: `{split}` is {folder}, but there is no folder {tried}; correct "
            "`path` or give --images and --labels."
        )
    parts = Path(images).parts
    if "images" not in parts:
        raise ValueError(
            f"{path}: `{split}` is {folder}, without a part `images` to replace by "
            "`labels`; give --images and --labels."
        )
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = str(Path(*parts[:last], "labels", *parts[last + 1 :]))
    return images, labels, dict(enumerate(names, start=1))
