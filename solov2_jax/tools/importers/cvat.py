"""CVAT's XML for images, version 1.1: shapes and masks, per image."""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np

from solov2_jax.data.images import list_images, read_header
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, ellipse, number_names, rectangle

_WITHOUT_AREA = ("points", "polyline", "cuboid", "skeleton")
_SHAPES = ("polygon", "box", "ellipse", "mask")
Group = tuple[str, str, Instances, tuple[str, ...]]


def is_cvat(path: Path) -> bool:
    """Returns whether an XML file's root is CVAT's."""
    with reading(path, "XML"):
        for _, element in ElementTree.iterparse(path, ["start"]):
            return element.tag == "annotations"
    return False


def import_cvat(path: Path) -> list[Group]:
    """Returns (subset, image folder, instances, notes) of each subset that CVAT named.

    Shapes of one label and group are one object, as in CVAT's own COCO export.
    """
    with reading(path, "CVAT's XML"):
        root = ElementTree.parse(path).getroot()
    folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    places = list_images(folder)
    names = [e.text or "" for e in root.iterfind("meta//labels/label/name")]
    names = names or sorted({e.get("label", "") for i in root.iterfind("image") for e in i})
    subsets: dict[str, list[ElementTree.Element]] = {}
    for image in root.iterfind("image"):
        subsets.setdefault(image.get("subset", ""), []).append(image)
    groups = []
    for subset, images in subsets.items():
        instances = Instances(number_names(list(dict.fromkeys(names)), str(path)))
        left_out = Counter[str]()
        for image in track(images, "reading labels"):
            _add_image(instances, image, folder, places, path, left_out)
        notes = tuple(f"{n} shapes left out: {kind}" for kind, n in left_out.items())
        groups.append((subset, str(folder), instances, notes))
    return groups


def _add_image(
    instances: Instances,
    image: ElementTree.Element,
    folder: Path,
    places: list[str],
    path: Path,
    left_out: Counter[str],
) -> None:
    stated = image.get("name", "")
    wanted = f"/{os.path.join(image.get('subset', ''), stated)}", f"/{stated}"
    name = next((p for w in wanted for p in places if f"/{p}".endswith(w)), None)
    if name is None:
        raise InputError(f"{path}: the image {stated} is not below {folder}; add it.")
    header = read_header(os.path.join(folder, name))
    instances.add_image(name, header.height, header.width)
    if (image.get("height"), image.get("width")) != (str(header.height), str(header.width)):
        raise InputError(
            f"{path}: image {stated} is {image.get('height')} x {image.get('width')} there, but "
            f"the file is {header.height} x {header.width}; was it replaced or resized?"
        )
    ids = {text: i for i, text in instances.categories.items()}
    objects: dict[object, tuple[int, list[np.ndarray]]] = {}
    for number, shape in enumerate(image):
        where = f"{path}: image {stated}: shape {number}"
        if shape.tag in _WITHOUT_AREA:
            left_out[shape.tag] += 1
        elif shape.tag in _SHAPES:
            label, group = shape.get("label", ""), shape.get("group_id") or "0"
            if label not in ids:
                raise InputError(f"{where}: the label {label!r} is not among {sorted(ids)}.")
            with reading(where, f"a {shape.tag} of CVAT"):
                part = _draw(shape, instances.size)
            key = number if group == "0" else (label, group)
            objects.setdefault(key, (ids[label], []))[1].append(part)
    for category, parts in objects.values():
        instances.add_parts(category, parts)


def _draw(shape: ElementTree.Element, size: tuple[int, int]) -> np.ndarray:
    """Returns an outline [n, 2], or of a mask bool [height, width]."""
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in shape.attrib["points"].split(";")]
        return np.array(pairs, np.float64).reshape(-1, 2)
    if shape.tag == "mask":
        left, top, width, height = (
            int(float(shape.attrib[key])) for key in ("left", "top", "width", "height")
        )
        runs = np.array(shape.attrib["rle"].split(","), np.int64)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        mask = np.zeros(size, bool)
        mask[top : top + height, left : left + width] = part
        return mask
    if shape.tag == "box":
        x0, y0, x1, y1 = (float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        return rectangle(x0, y0, x1, y1)
    x, y, rx, ry = (float(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry"))
    return ellipse([x, y], (rx, ry), float(shape.get("rotation") or 0))
