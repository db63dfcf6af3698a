"""A COCO instances json, put together image by image; class names from files of any form."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from solov2_jax.data.rasterize import spans_to_masks
from solov2_jax.io import InputError, read_json, reading, write_text
from solov2_jax.rle import mask_to_rle, polygons_to_rle, spans_from_rle

_CIRCLE_ERROR = 0.1  # pixels between a circle and the polygon that stands for it


class Instances:
    """Collects images and objects; `write` makes the file."""

    def __init__(self, categories: Mapping[int, str]):
        self.categories = dict(categories)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, file_name: str, height: int, width: int) -> None:
        """Takes an image; the objects that follow are in it."""
        number = len(self.images) + 1
        size = {"height": int(height), "width": int(width)}
        self.images.append({"id": number, "file_name": file_name} | size)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the last image."""
        return self.images[-1]["height"], self.images[-1]["width"]

    def add_polygons(self, category: int, polygons: Sequence[np.ndarray]) -> None:
        """Takes an object of the last image: outlines [n, 2], x and y in pixels."""
        flat: Any = [np.asarray(p, np.float64).ravel() for p in polygons]
        corners = np.concatenate(flat).reshape(-1, 2)
        low, high = corners.min(axis=0), corners.max(axis=0)
        whole: Any = polygons_to_rle(flat, self.size)
        area = coco_mask.area(whole)
        box = [*low.tolist(), *(high - low).tolist()]
        self._add(category, [p.round(3).tolist() for p in flat], box, float(area))

    def add_box(
        self, category: int, x0: float, y0: float, x1: float, y1: float, *, where: str
    ) -> None:
        """Takes an object of the last image of which only the box is known, in pixels.

        Raises:
          InputError: naming the place `where` it stands, if it has no extent in the image.
        """
        height, width = self.size
        left, right = max(float(x0), 0.0), min(float(x1), float(width))
        top, bottom = max(float(y0), 0.0), min(float(y1), float(height))
        if right <= left or bottom <= top:
            raise InputError(
                f"{where}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} (x0, y0, x1, y1 in pixels) "
                f"covers nothing of its image of {height} x {width}; correct or remove it."
            )
        box = [left, top, right - left, bottom - top]
        self._add(category, [], box, box[2] * box[3])

    def add_mask(self, category: int, mask: np.ndarray) -> None:
        """Takes an object of the last image: its mask, bool [height, width]."""
        runs: Any = mask_to_rle(mask)
        segmentation = {"size": list(mask.shape), "counts": runs["counts"].decode()}
        box = coco_mask.toBbox(runs).tolist()
        self._add(category, segmentation, box, float(coco_mask.area(runs)))

    def add_parts(self, category: int, parts: Sequence[np.ndarray]) -> None:
        """Takes an object in parts: outlines [n, 2], or masks, bool [height, width]."""
        if any(part.dtype == bool for part in parts):
            masks = [p if p.dtype == bool else fill(p, self.size) for p in parts]
            self.add_mask(category, np.any(masks, axis=0))
        else:
            self.add_polygons(category, parts)

    def _add(self, category: int, segmentation: Any, box: list, area: float) -> None:
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": self.images[-1]["id"],
                "category_id": int(category),
                "segmentation": segmentation,
                "bbox": [round(v, 3) for v in box],
                "area": area,
                "iscrowd": 0,
            }
        )

    def content(self) -> dict[str, Any]:
        """Returns what the json holds."""
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in sorted(self.categories.items())],
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the json, whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(self.content()), path)


def part_of(content: dict[str, Any], ids: Collection[int]) -> dict[str, Any]:
    """Returns a json's content with the images of these ids."""
    return {
        **content,
        "images": [i for i in content["images"] if i["id"] in ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
    }


# --- Shapes --------------------------------------------------------------------------


def rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Returns an outline [4, 2]."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def ellipse(
    center: Sequence[float] | np.ndarray, radii: tuple[float, float], degrees: float = 0.0
) -> np.ndarray:
    """Returns a polygon [n, 2] of the ellipse's area, turned clockwise as one sees it."""
    number = max(12, int(np.ceil(np.pi * np.sqrt(max(radii) / (2 * _CIRCLE_ERROR)))))
    angle = np.arange(number) * (2 * np.pi / number)
    grow = np.sqrt(2 * np.pi / number / np.sin(2 * np.pi / number))
    x, y = radii[0] * grow * np.cos(angle), radii[1] * grow * np.sin(angle)
    turn = np.deg2rad(degrees)
    turned = [x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)]
    return np.asarray(center, np.float64) + np.stack(turned, axis=-1)


def fill(outline: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a polygon's pixels, bool [height, width]."""
    runs = polygons_to_rle([outline.ravel()], size)
    return spans_to_masks(spans_from_rle([runs["counts"]], size), 1, size)[0]


# --- Class names ---------------------------------------------------------------------


def read_names(source: str) -> dict[int, str]:
    """Returns category id -> name; ids count from 1 where the source has none.

    Args:
      source: a text file with a name a line; a YAML file with `names`; a json with
        COCO's `categories`, or a run's classes.json, whose ids are kept; or the names
        themselves, separated by commas.
    """
    suffix = Path(source).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return number_names(names_of_yaml(read_yaml(source), source), source)
    if suffix == ".json":
        return _from_json(source)
    if suffix in (".txt", ".names"):
        lines = read_text(source).splitlines()
        return number_names([line.strip() for line in lines if line.strip()], source)
    return number_names([name.strip() for name in source.split(",")], source)


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, or UTF-16 as Windows programs write it."""
    with reading(path, "text", "Save it as UTF-8."):
        data = Path(path).read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; its values stay text, as they are written."""
    text = read_text(path)
    with reading(path, "YAML"):
        content = yaml.load(text, yaml.BaseLoader)  # "no", "1.0", "null" are names
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a YAML file of keys and values.")
    return content


def names_of_yaml(content: dict[str, Any], path: str) -> list[str]:
    """Returns `names`, a list or a mapping from 0, 1, ..., as a list."""
    names = content.get("names")
    if isinstance(names, dict):
        numbers = [int(key) if key.isdecimal() else key for key in names]
        if set(numbers) != set(range(len(names))):
            raise InputError(
                f"{path}: the keys of `names` are {sorted(numbers, key=str)}; number the "
                "classes 0, 1, 2, ... without gaps."
            )
        names = [name for _, name in sorted(zip(numbers, names.values(), strict=True))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: has no `names`; list the class names there.")
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: `names` must be a list of texts; put quotes around them.")
    number = content.get("nc")
    if number is not None and number != str(len(names)):
        raise InputError(
            f"{path}: `nc` is {number}, but `names` has {len(names)}; correct one of them."
        )
    return [name.strip() for name in names]


def _from_json(path: str) -> dict[int, str]:
    kind = "COCO's `categories` with id and name, or the `names` and `ids` of a classes.json"
    content = read_json(path, "json")
    with reading(path, kind):
        if "categories" in content:
            pairs = [(c["id"], c["name"]) for c in content["categories"]]
        else:
            pairs = list(zip(content["ids"], content["names"], strict=True))
        ids, names = [i for i, _ in pairs], [name for _, name in pairs]
        if not all(type(i) is int for i in ids) or not all(isinstance(n, str) for n in names):
            raise TypeError("an id is no whole number, or a name no text")
        if len(set(ids)) < len(ids):
            raise ValueError("an id more than once")
    number_names(names, path)
    return dict(pairs)


def number_names(names: Sequence[str], source: str) -> dict[int, str]:
    """Returns the names with ids from 1, or raises if two are equal or one is empty."""
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated or "" in names or not names:
        what = f"{repeated} more than once" if repeated else "an empty name"
        raise InputError(f"{source}: class names: {what}; give every class one name.")
    return dict(enumerate(names, start=1))
