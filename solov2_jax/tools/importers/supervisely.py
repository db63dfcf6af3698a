"""Supervisely's projects: meta.json, and for each data set the folders `img` and `ann`."""

import base64
import io
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.images import list_images, read_header
from solov2_jax.io import InputError, read_json, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, fill, number_names, rectangle

_SHAPES = ("polygon", "bitmap", "rectangle")


def is_project(folder: Path) -> bool:
    """Returns whether a folder has a meta.json and a data set."""
    return (folder / "meta.json").is_file() and bool(_datasets(folder))


def _datasets(folder: Path) -> list[Path]:
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    return [p for p in places if (p / "img").is_dir() and (p / "ann").is_dir()]


def import_project(folder: Path) -> list[tuple[str, str, Instances, tuple[str, ...]]]:
    """Returns (name, image folder, instances, notes) of each data set of a project."""
    meta = folder / "meta.json"
    content = read_json(meta, "json")
    with reading(meta, "a project of Supervisely"):
        names = [str(c["title"]) for c in content["classes"]]
    found = []
    for place in _datasets(folder):
        instances, left_out = Instances(number_names(names, str(meta))), Counter[str]()
        ids = {name: i for i, name in instances.categories.items()}
        for name in track(list_images(place / "img"), "reading labels"):
            header = read_header(str(place / "img" / name))
            instances.add_image(name, header.height, header.width)
            stems = (f"{name}.json", f"{os.path.splitext(name)[0]}.json")
            path = next((place / "ann" / s for s in stems if (place / "ann" / s).is_file()), None)
            if path is None:
                left_out["images without a file in `ann`: they have no objects"] += 1
                continue
            _add_objects(instances, read_json(path, "json"), path, ids, left_out)
        notes = tuple(f"{n} {what}" for what, n in left_out.items())
        name = "" if place == folder else place.name
        found.append((name, str(place / "img"), instances, notes))
    return found


def _add_objects(
    instances: Instances, record: Any, path: Path, ids: dict[str, int], left_out: Counter[str]
) -> None:
    with reading(path, "an annotation of Supervisely"):
        objects = [(str(o["classTitle"]), str(o["geometryType"]), o) for o in record["objects"]]
    for number, (label, kind, values) in enumerate(objects):
        where = f"{path}: object {number}"
        if kind not in _SHAPES:
            left_out[f"objects left out: a {kind} has no area"] += 1
            continue
        if label not in ids:
            raise InputError(f"{where}: the class {label!r} is not among {sorted(ids)}.")
        with reading(where, f"a {kind} of Supervisely"):
            part = _draw(kind, values, instances.size)
        instances.add_parts(ids[label], [part])


def _draw(kind: str, values: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Returns an outline [n, 2], or a mask, bool [height, width]."""
    if kind == "bitmap":
        data = zlib.decompress(base64.b64decode(values["bitmap"]["data"]))
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # A palette or grey picture of one bit, or one with transparency.
            pixels = np.asarray(image.convert("RGBA" if "A" in image.mode else "L"))
        part = (pixels[..., -1] if pixels.ndim == 3 else pixels) > 0
        left, top = (int(v) for v in values["bitmap"]["origin"])
        mask = np.zeros(size, bool)
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        return mask
    outline = np.array(values["points"]["exterior"], np.float64).reshape(-1, 2)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = outline.min(axis=0).tolist(), outline.max(axis=0).tolist()
        return rectangle(x0, y0, x1, y1)
    holes = [np.array(h, np.float64) for h in values["points"].get("interior") or []]
    if not holes:
        return outline
    return fill(outline, size) & ~np.any([fill(hole, size) for hole in holes], axis=0)
