"""VGG Image Annotator's json, versions 1 and 2: regions with attributes, per image."""

import os
from collections import Counter
from typing import Any

import numpy as np

from solov2_jax.data.images import list_images, read_header
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, ellipse, number_names, rectangle
from solov2_jax.tools.importers.parts import by_name, find_picture

_PREFERRED = ("class", "label", "name", "type", "category", "object")
_WITHOUT_AREA = ("point", "polyline", "line")


def is_via(content: Any) -> bool:
    """Returns whether a json is a project or an export of VIA."""
    if not isinstance(content, dict):
        return False
    records = list(_records(content).values())
    return bool(records) and all(
        isinstance(r, dict) and "filename" in r and "regions" in r for r in records
    )


def _records(content: dict[str, Any]) -> dict[str, Any]:
    records = content.get("_via_img_metadata", content)
    return records if isinstance(records, dict) else {}


def import_via(
    content: dict[str, Any], images: str, path: str
) -> tuple[Instances, tuple[str, ...]]:
    """Returns the instances, and what was assumed or left out.

    The class is the region attribute that is called so, or the only one.

    Args:
      images: folder that has the images, in subfolders too.
      path: of the json, for messages.
    """
    places = by_name(list_images(images))
    records = [(str(r["filename"]), _regions(r)) for r in _records(content).values()]
    with reading(path, "a json of VGG Image Annotator"):
        attribute = _attribute([a for _, regions in records for _, a in regions])
        labelled = {_label(a, attribute) for _, regions in records for _, a in regions}
    instances = Instances(number_names(sorted(labelled) or ["object"], path))
    ids = {name: i for i, name in instances.categories.items()}
    left_out = Counter[str]()
    for file_name, regions in track(records, "reading labels"):
        name = find_picture(places, file_name, path)
        if name is None:
            raise InputError(f"{path}: the image {file_name} is not below {images}; add it.")
        header = read_header(os.path.join(images, name))
        instances.add_image(name, header.height, header.width)
        for number, (shape, attributes) in enumerate(regions):
            kind = shape.get("name")
            if kind in _WITHOUT_AREA:
                left_out[f"{kind}s have no area"] += 1
                continue
            with reading(f"{path}: region {number} of {file_name}", "a shape of VIA"):
                outline = _outline(shape)
            instances.add_polygons(ids[_label(attributes, attribute)], [outline])
    notes = [f"{n} regions left out: {what}" for what, n in left_out.items()]
    if not attribute:
        notes.append("one class, called `object`: no region has an attribute that names it")
    elif attribute not in _PREFERRED:
        notes.append(f"the class is the region attribute `{attribute}`")
    return instances, tuple(notes)


def _regions(record: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns (shape, attributes) of an image's regions; version 1 numbers them."""
    regions = record["regions"]
    regions = list(regions.values()) if isinstance(regions, dict) else regions
    return [(r["shape_attributes"], r.get("region_attributes") or {}) for r in regions]


def _attribute(attributes: list[dict[str, Any]]) -> str:
    """Returns the attribute that holds the class, "" if there is none."""
    names = Counter(name for each in attributes for name in each)
    preferred = [n for n in names if n.lower() in _PREFERRED]
    return next(iter(preferred), "") or (names.most_common(1)[0][0] if names else "")


def _label(attributes: dict[str, Any], attribute: str) -> str:
    value = attributes.get(attribute) or "object"
    if isinstance(value, dict):  # checkboxes: {"cat": true}
        value = next((name for name, on in value.items() if on), "object")
    return str(value).strip()


def _outline(shape: dict[str, Any]) -> np.ndarray:
    """Returns an outline [n, 2]."""
    kind = shape["name"]
    if kind == "polygon":
        points = np.stack([shape["all_points_x"], shape["all_points_y"]], axis=-1)
        if len(points) < 3:
            raise ValueError(f"{len(points)} points are no outline")
        return points.astype(np.float64)
    if kind == "rect":
        x, y, w, h = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return rectangle(x, y, x + w, y + h)
    center = [float(shape["cx"]), float(shape["cy"])]
    if kind == "circle":
        return ellipse(center, (float(shape["r"]), float(shape["r"])))
    if kind == "ellipse":
        radii = float(shape["rx"]), float(shape["ry"])
        return ellipse(center, radii, np.rad2deg(float(shape.get("theta") or 0)))
    raise ValueError(f"unknown shape {kind!r}")
