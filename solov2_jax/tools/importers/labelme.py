"""labelme's json: a file per image, a list of shapes with labels."""

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.annotations import as_json
from solov2_jax.data.images import list_files, read_header
from solov2_jax.data.outlines import MAX_COORDINATE, are_numbers
from solov2_jax.io import InputError, read_json, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, ellipse

_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def import_labelme(
    images: str,
    labels: str,
    categories: Mapping[int, str] | None = None,
    ignored: Sequence[str] = (),
) -> tuple[Instances, Counter[str]]:
    """Returns the instances of all json files below a folder, and what was left out.

    Shapes with the same label and `group_id` are one object. Shapes without an area
    (points, lines) are left out and counted.

    Args:
      images: folder that file names will be relative to.
      labels: folder of the json files; `imagePath` is relative to each file.
      categories: id -> name; None: the labels that occur, sorted, from id 1.
      ignored: labels that are no class.
    """
    names = list_files(labels, [".json"]) if os.path.isdir(labels) else []
    files = [Path(labels, name) for name in names]
    if not files:
        raise InputError(f"{labels}: has no json files of labelme; correct --labels.")
    records = {path: _read(path) for path in track(files, "reading labels")}
    if categories is None:
        labelled = {
            _label(s, f"{path}: shape {i}")
            for path, record in records.items()
            for i, s in enumerate(record["shapes"])
        }
        categories = dict(enumerate(sorted(labelled - set(ignored)), start=1))
    if not categories:
        raise InputError(f"{labels}: no shape has a label that is a class.")
    instances, left_out = Instances(categories), Counter[str]()
    seen: dict[str, Path] = {}
    for path, record in track(records.items(), "reading images"):
        name = _add_image(instances, path, record, images)
        other = seen.setdefault(name, path)
        if other != path:
            raise InputError(f"{path}: its image {name} is {other}'s too; remove one.")
        _add_shapes(instances, path, record, ignored, left_out)
    return instances, left_out


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path, "json")
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise InputError(
            f"{path}: has no list `shapes`; it is not labelme's. Move other json files elsewhere."
        )
    if not isinstance(record.get("imagePath"), str):
        raise InputError(f"{path}: has no `imagePath`; add the image's file name.")
    return record


def _add_image(instances: Instances, path: Path, record: dict[str, Any], images: str) -> str:
    """Returns the name of a json's image below `images`."""
    # labelme on Windows writes backslashes.
    relative = record["imagePath"].replace("\\", "/")
    beside = path.parent / relative
    file = beside if beside.exists() else Path(images, os.path.basename(relative))
    if not file.exists():
        raise InputError(
            f"{path}: `imagePath` {record['imagePath']}: there is neither {beside} nor "
            f"{file}; correct it or --images."
        )
    name = os.path.relpath(file, images).replace(os.sep, "/")
    if name.startswith("../"):
        raise InputError(f"{path}: its image {file} is not below --images {images}.")
    header = read_header(str(file))
    stated = record.get("imageHeight"), record.get("imageWidth")
    if stated != (None, None) and stated != (header.height, header.width):
        raise InputError(
            f"{path}: `imageHeight` and `imageWidth` are {stated}, but {file} is "
            f"{header.height} x {header.width}; was the image replaced? Correct them "
            "and the shapes."
        )
    instances.add_image(name, header.height, header.width)
    return name


def _label(shape: Any, where: str) -> str:
    label = shape.get("label") if isinstance(shape, dict) else None
    if label is None:
        raise InputError(f"{where}: has no `label`; add it.")
    if not isinstance(label, str):
        raise InputError(f"{where}: `label` is {as_json(label)}, not text; put it in quotes.")
    return label


def _add_shapes(
    instances: Instances,
    path: Path,
    record: dict[str, Any],
    ignored: Sequence[str],
    left_out: Counter[str],
) -> None:
    """Takes the objects of one json."""
    ids = {name: i for i, name in instances.categories.items()}
    groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for index, shape in enumerate(record["shapes"]):
        where = f"{path}: shape {index}"
        label = _label(shape, where)
        kind = shape.get("shape_type") or "polygon"
        if label in ignored:
            left_out[f"label {label}"] += 1
        elif label not in ids:
            raise InputError(
                f"{where}: `label` {label!r} is not among the class names "
                f"{sorted(ids)}; correct it, add the name, or give it to --ignore."
            )
        elif kind in _WITHOUT_AREA:
            left_out[f"shape_type {kind}"] += 1
        else:
            group = shape.get("group_id")
            # As text: a damaged file may hold a list there.
            key = index if group is None else (label, as_json(group))
            groups.setdefault(key, []).append((index, shape))
    for parts in groups.values():
        label = parts[0][1]["label"]
        drawn = [_draw(shape, f"{path}: shape {i}", instances.size) for i, shape in parts]
        instances.add_parts(ids[label], drawn)


def _draw(shape: dict[str, Any], where: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the outline, float64 [n, 2], or of a mask bool [height, width]."""
    kind = shape.get("shape_type") or "polygon"
    pairs = shape.get("points")
    if not isinstance(pairs, list) or not all(are_numbers(p) and len(p) == 2 for p in pairs):
        pairs = [[np.inf, np.inf]]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    if not (np.abs(points) < MAX_COORDINATE).all():
        raise InputError(f"{where}: `points` must be pairs of numbers [x, y], pixels.")
    if kind == "polygon" and len(points) >= 3:
        return points
    if kind == "rectangle" and len(points) in (2, 4):
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if kind == "circle" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        return ellipse(points[0], (radius, radius))
    if kind == "mask" and len(points) == 2:
        return _decode(shape, points, where, size)
    raise InputError(
        f"{where}: `shape_type` {kind!r} with {len(points)} points; an object is a "
        "polygon of 3 or more points, a rectangle or a circle of 2, or a mask."
    )


def _decode(
    shape: dict[str, Any], points: np.ndarray, where: str, size: tuple[int, int]
) -> np.ndarray:
    """Returns the mask in the whole image, bool [height, width]."""
    with reading(f"{where}: `mask`", "a PNG in base64", "Save it again."):
        data = base64.b64decode(shape["mask"], validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            part = np.asarray(image.convert("L")) > 0
    left, top = np.rint(points.min(axis=0)).astype(int).tolist()
    height, width = part.shape
    if min(left, top) < 0 or top + height > size[0] or left + width > size[1]:
        raise InputError(
            f"{where}: the mask of {height} x {width} pixels at {left}, {top} leaves "
            f"the image of {size[0]} x {size[1]}."
        )
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = part
    return mask
