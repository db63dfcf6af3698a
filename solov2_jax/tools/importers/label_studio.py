"""Label Studio's json: tasks with results in per cent of the image, brushes as run lengths."""

import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.data.images import list_images, read_header
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances, ellipse, number_names, rectangle
from solov2_jax.tools.importers.parts import by_name, find_picture

_SHAPES = ("polygonlabels", "brushlabels", "rectanglelabels", "ellipselabels")
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # that Label Studio puts before an upload's name


def is_label_studio(content: Any) -> bool:
    """Returns whether a json is a list of tasks with annotations."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(t, dict) and "data" in t and "annotations" in t for t in content)
    )


def import_tasks(tasks: list[dict[str, Any]], path: Path) -> tuple[str, Instances, tuple[str, ...]]:
    """Returns (image folder, instances, notes): of each task its first finished annotation.

    Args:
      path: of the json; the images are below its folder.
    """
    images = str(path.parent)
    places = by_name(list_images(images))
    notes = Counter[str]()
    with reading(path, "a json of Label Studio"):
        results = [(t, _results(t, notes)) for t in tasks]
        names = sorted({_label(r) for _, rs in results for r in rs} or {"object"})
    instances = Instances(number_names(names, str(path)))
    ids = {name: i for i, name in instances.categories.items()}
    for task, shapes in track(results, "reading labels"):
        name = _image_of(task, places, path)
        header = read_header(os.path.join(images, name))
        instances.add_image(name, header.height, header.width)
        for number, result in enumerate(shapes):
            where = f"{path}: task {task.get('id')}: result {number}"
            with reading(where, f"a result of type {result['type']}"):
                part = _draw(result, instances.size)
            instances.add_parts(ids[_label(result)], [part])
    return images, instances, tuple(f"{n} {what}" for what, n in notes.items())


def _results(task: dict[str, Any], notes: Counter[str]) -> list[dict[str, Any]]:
    """Returns the results of a task that have an area."""
    finished = [a for a in task["annotations"] if not a.get("was_cancelled")]
    if len(finished) > 1:
        notes["tasks with several annotations: the first is taken"] += 1
    results = finished[0]["result"] if finished else []
    kept = [r for r in results if r.get("type") in _SHAPES]
    notes["results without an area: left out"] += len(results) - len(kept)
    notes += Counter()  # what is 0 goes
    return kept


def _label(result: dict[str, Any]) -> str:
    return str(result["value"][result["type"]][0]).strip()


def _image_of(task: dict[str, Any], places: Mapping[str, Sequence[str]], path: Path) -> str:
    """Returns the image of a task, by the name in its data."""
    texts = [v for v in task["data"].values() if isinstance(v, str)]
    for text in [*texts, str(task.get("file_upload") or "")]:
        whole = urllib.parse.unquote(text.replace("\\", "/"))
        folders, slash, base = whole.rpartition("/")
        for name in dict.fromkeys((whole, folders + slash + _UPLOAD.sub("", base))):
            if found := find_picture(places, name, f"{path}: task {task.get('id')}"):
                return found
    raise InputError(
        f"{path}: the image of task {task.get('id')} ({', '.join(texts)[:100]}) is not below "
        f"{path.parent}; put the images there."
    )


def _draw(result: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Returns an outline [n, 2], or of a brush bool [height, width]."""
    height, width = size
    value, kind = result["value"], result["type"]
    if kind == "brushlabels":
        if (result["original_height"], result["original_width"]) != size:
            raise ValueError(
                f"it was drawn on {result['original_height']} x {result['original_width']} "
                f"pixels, the image has {height} x {width}"
            )
        return decode_brush(value["rle"]).reshape(height, width, 4)[..., 3] > 0
    scale = np.array([width, height]) / 100
    if kind == "polygonlabels":
        return np.array(value["points"], np.float64).reshape(-1, 2) * scale
    x, y = np.array([value["x"], value["y"]], np.float64) * scale
    if kind == "ellipselabels":
        radii = np.array([value["radiusX"], value["radiusY"]], np.float64) * scale
        degrees = float(value.get("rotation") or 0)
        return ellipse([x, y], (float(radii[0]), float(radii[1])), degrees)
    w, h = np.array([value["width"], value["height"]], np.float64) * scale
    turn = np.deg2rad(float(value.get("rotation") or 0))  # around the first corner
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return rectangle(0, 0, w, h) @ turned + [x, y]


def decode_brush(data: list[int]) -> np.ndarray:
    """Returns the values of a brush's run lengths, uint8.

    A stream of bits: the number of values (32), the bits of a value less 1 (5), four
    lengths less 1 (4 each); then blocks of a flag whether one value repeats (1), which of
    the lengths the count has (2), the count less 1, and one value or all of them.
    Source: the format of thi.ng/rle-pack, which Label Studio writes.
    """
    bits = np.unpackbits(np.array(data, np.uint8))
    position = 0

    def read(number: int) -> int:
        nonlocal position
        if position + number > len(bits):
            raise ValueError("the run lengths end early")
        value = int("".join(map(str, bits[position : position + number])), 2)
        position += number
        return value

    total, depth = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    if total > 4 * 2**31 or depth > 8:
        raise ValueError(f"{total} values of {depth} bits are no brush")
    values = np.zeros(total, np.uint8)
    start = 0
    while start < total:
        repeated = read(1)
        end = start + 1 + read(lengths[read(2)])
        if end > total:
            raise ValueError("the run lengths are longer than the image")
        values[start:end] = read(depth) if repeated else [read(depth) for _ in range(end - start)]
        start = end
    return values
