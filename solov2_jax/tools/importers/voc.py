"""Pascal VOC's XML: a file per image, a box (or polygon) per object.

Objects with a box only stay so: `loss.box_supervised` says what training does with them.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.images import Header, list_files, list_images, read_header
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, number_names, part_of, read_text

_SIDES = ("xmin", "ymin", "xmax", "ymax")


def is_voc(path: Path) -> bool:
    """Returns whether an XML file is one of VOC's."""
    with reading(path, "XML"):
        for _, element in ElementTree.iterparse(path, ["start"]):
            return element.tag == "annotation"
    return False


def import_voc(
    images: str, labels: str, categories: Mapping[int, str] | None = None
) -> tuple[Instances, tuple[str, ...]]:
    """Returns the instances of all XML files below a folder, and what was assumed.

    Coordinates are whole pixels from 1 on, both ends included, as VOC defines them; where
    some object starts at 0 or the numbers are not whole, the data set counts from 0.

    Args:
      images: folder that file names will be relative to; each image has the name of its XML
        file, or the one that stands in it.
      categories: id -> name; None: the names that occur, sorted, from id 1.
    """
    names = list_files(labels, [".xml"]) if os.path.isdir(labels) else []
    if not names:
        raise InputError(f"{labels}: has no XML files of Pascal VOC; correct --labels.")
    roots = {}
    for path in track([Path(labels, name) for name in names], "reading labels"):
        with reading(path, "VOC's XML"):
            roots[path] = ElementTree.parse(path).getroot()
        if roots[path].tag != "annotation":
            raise InputError(f"{path}: its root is `{roots[path].tag}`, not VOC's `annotation`.")
    objects = {path: _objects(path, root) for path, root in roots.items()}
    every = [o for found in objects.values() for o in found]
    if categories is None:
        if not every:
            raise InputError(f"{labels}: none of its {len(names)} XML files has an object.")
        categories = number_names(sorted({name for name, _, _ in every}), labels)
    instances, ids = Instances(categories), {name: i for i, name in categories.items()}
    corners = np.array([box for _, box, _ in every]).reshape(-1, 4)
    from_one = bool((corners >= 1).all() and (corners == np.rint(corners)).all())
    places = list_images(images)
    by_stem = {os.path.splitext(place)[0]: place for place in reversed(places)}
    for path in track(objects, "reading images"):
        image, header = _image(path, labels, roots[path], images, by_stem)
        instances.add_image(image, header.height, header.width)
        for i, (name, box, polygon) in enumerate(objects[path]):
            where = f"{path}: object {i}"
            if name not in ids:
                raise InputError(
                    f"{where}: {name!r} is not among the names ({describe(list(ids))}); correct "
                    "it or add the name."
                )
            if polygon is not None:
                instances.add_polygons(ids[name], [polygon])
            else:
                low = box[:2] - from_one
                instances.add_box(ids[name], *low, *box[2:], where=where)
    left = len(places) - len(instances.images)
    notes = (f"{left} images have no XML file: left out",) if left > 0 else ()
    return instances, notes


def import_parts(
    images: str, labels: Path, lists: Path
) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Returns (split, COCO instances, notes) of the parts that `Main/train.txt` and the like
    below `lists` name, or ("", all, notes)."""
    instances, notes = import_voc(images, str(labels))
    content, parts = instances.content(), []
    stems = {i["id"]: Path(i["file_name"]).stem for i in content["images"]}
    for split in ("train", "val", "test"):
        listed = lists / "Main" / f"{split}.txt"
        if listed.is_file():
            names = {line.split()[0] for line in read_text(listed).splitlines() if line.strip()}
            part = part_of(content, {i for i, stem in stems.items() if stem in names})
            parts += [(split, part, notes)] if part["images"] else []
    return parts or [("", content, notes)]


def _objects(
    path: Path, root: ElementTree.Element
) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """Returns name, (xmin, ymin, xmax, ymax) as written, and the polygon [n, 2] if there is
    one, of each object."""
    found = []
    for i, element in enumerate(root.iterfind("object")):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path}: object {i}: has no `name`; add its class.")
        try:
            box = np.array([float(element.findtext(f"bndbox/{s}") or "") for s in _SIDES])
            points = [float(e.text or "") for e in element.iterfind("polygon/*")]
        except ValueError:
            box, points = np.full(4, np.nan), []
        if not np.isfinite([*box, *points]).all():
            raise InputError(
                f"{path}: object {i} ({name}): needs `bndbox` with {', '.join(_SIDES)} in numbers."
            )
        is_polygon = len(points) >= 6 and len(points) % 2 == 0
        found.append((name, box, np.array(points).reshape(-1, 2) if is_polygon else None))
    return found


def _image(
    path: Path, labels: str, root: ElementTree.Element, images: str, by_stem: Mapping[str, str]
) -> tuple[str, Header]:
    """Returns the name of an XML file's image below `images`, and its header."""
    stated = (root.findtext("filename") or "").strip().replace("\\", "/")
    own = os.path.relpath(path, labels).replace(os.sep, "/")
    stems = [os.path.splitext(name)[0] for name in (own, stated, os.path.basename(own)) if name]
    name = next((by_stem[stem] for stem in stems if stem in by_stem), None)
    if name is None:
        raise InputError(
            f"{path}: its image, {stated or stems[0]}, is not in {images}; add it or remove the "
            "XML file."
        )
    header = read_header(os.path.join(images, name))
    size = [root.findtext(f"size/{s}", "").strip().removesuffix(".0") for s in ("height", "width")]
    if all(size) and "0" not in size and size != [str(header.height), str(header.width)]:
        raise InputError(
            f"{path}: the image is {size[0]} x {size[1]} there, but {name} is {header.height} x "
            f"{header.width}; was it replaced, turned or resized?"
        )
    return name, header
