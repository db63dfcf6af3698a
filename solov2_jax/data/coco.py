"""A COCO-style data set: an image folder and an instances json, in flat arrays.

Nothing here is a Python object per annotation, so a data set of a million objects
costs a worker process a few mapped pages instead of gigabytes.
Source: detectron2 data/datasets/coco.py, load_coco_json (without its registry).
"""

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.data import records
from solov2_jax.data.annotations import Segmentations, collect, describe

log = logging.getLogger(__name__)

_LARGEST_ID = 2**31 - 1  # ids travel as int32; -1 marks padding


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """N images in the json's order and their A usable objects, sorted by image.

    The objects of image i are `start[i]:start[i + 1]`, in the json's order. Crowds are
    not among them: evaluation reads those from `annotation_file` itself.
    """

    image_root: str
    annotation_file: str
    class_names: tuple[str, ...]  # in the order of category_ids
    category_ids: tuple[int, ...]  # sorted; label k is category_ids[k]
    image_ids: np.ndarray  # int64 [N]
    file_names: np.ndarray  # str [N], relative to image_root
    heights: np.ndarray  # int32 [N]
    widths: np.ndarray  # int32 [N]
    start: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float64 [A, 4], (x0, y0, x1, y1) as annotated, not clipped
    labels: np.ndarray  # int32 [A]
    annotation_ids: np.ndarray  # int64 [A]
    segmentations: Segmentations
    counts: Mapping[str, int]  # what was found and dropped, for `summary`

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> str:
        """Returns where image `index` is: a path, or a record for `records.source`."""
        if records.is_records(self.image_root):
            return records.record_path(self.image_root, index, str(self.file_names[index]))
        return os.path.join(self.image_root, str(self.file_names[index]))

    @property
    def objects_per_image(self) -> np.ndarray:
        """Returns the number of usable objects of each image, int64 [N]."""
        return np.diff(self.start)

    def summary(self) -> str:
        """Returns what the data set holds and what was dropped, several lines."""
        c = self.counts
        lines = [
            f"{self.annotation_file}: {c['images']} images "
            f"({c['images_without_objects']} without objects), {c['objects']} objects "
            f"of {len(self.class_names)} classes, at most {c['max_objects']} an image"
        ]
        for key, text in DROPPED.items():
            if c.get(key, 0):
                lines.append(f"  {c[key]} {text}")
        return "\n".join(lines)


DROPPED = {
    "crowds": "crowd regions: not trained on, ignored by the evaluation",
    "no_segmentation": "annotations dropped: no segmentation",
    "bad_polygons": "polygons dropped: fewer than 3 points or an odd number of values",
    "no_valid_polygon": "annotations dropped: none of their polygons was usable",
    "empty": "annotations dropped: zero area or outside of their image",
    "derived_boxes": "boxes derived from the segmentation: no bbox was given",
}


def load_coco(
    images: str,
    annotations: str,
    *,
    categories: Mapping[int, str] | None = None,
) -> CocoDataset:
    """Returns the data set, or raises one ValueError that names file, field and mend.

    Args:
      images: folder that the json's file names are relative to, or records, see
        `records.split_root`.
      annotations: COCO instances json.
      categories: id -> name that the json must have, e.g. the training data's.

    It is what `read_coco` returns, and every image file must be there.
    """
    dataset = read_coco(images, annotations, categories=categories)
    if missing := missing_files(dataset):
        names = dataset.file_names[missing].tolist()
        raise ValueError(
            f"{annotations}: {len(missing)} of {len(dataset)} images are not in "
            f"{images}: {describe(names)}. `file_name` is relative to that folder: "
            "correct the folder, add the files, or remove the images from the json."
        )
    log.info("%s", dataset.summary())
    return dataset


def read_coco(
    images: str,
    annotations: str,
    *,
    categories: Mapping[int, str] | None = None,
) -> CocoDataset:
    """Returns the data set of a json; the image files need not be there.

    What is dropped and counted instead of an error: crowds, objects without
    segmentation, unusable polygons, objects of zero area or outside of their image.
    """
    return dataset_of(read_json(annotations), images, annotations, categories)


def dataset_of(
    content: Mapping[str, Any],
    images: str,
    annotations: str,
    categories: Mapping[int, str] | None = None,
) -> CocoDataset:
    """Returns the data set of a json's content; `annotations` names it in messages."""
    ids, names = _read_categories(content["categories"], annotations)
    if categories is not None:
        _compare_categories(dict(zip(ids, names, strict=True)), categories, annotations)
    table = _read_images(content["images"], annotations)
    objects, counts = collect(content["annotations"], annotations, table, ids)
    number = np.diff(objects["start"])
    counts["images"] = len(number)
    counts["images_without_objects"] = int((number == 0).sum())
    counts["objects"] = int(number.sum())
    counts["max_objects"] = int(number.max())
    return CocoDataset(
        image_root=images,
        annotation_file=annotations,
        class_names=names,
        category_ids=ids,
        **table,
        **objects,
        counts=dict(counts),
    )


def read_json(path: str) -> dict[str, Any]:
    """Returns the parsed file with its three lists present."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such annotation file. Set data.train.annotations and "
            "data.val.annotations to COCO instances json files."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read as json ({error}). A COCO instances file is a "
            "json object with images, annotations and categories."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a json {type(content).__name__}, not an object with "
            "images, annotations and categories. Is it a results file?"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(
                f"{path}: has no list `{key}`. A COCO instances file needs images, "
                "annotations and categories; add it, even if it is empty for "
                "annotations."
            )
        if key != "annotations" and not content[key]:
            raise ValueError(f"{path}: `{key}` is empty; list at least one.")
    return content


def _column(records: Sequence[Any], key: str, kind: str, path: str) -> list[Any]:
    """Returns one field of every record."""
    try:
        return [record[key] for record in records]
    except (KeyError, TypeError):
        bad = [r for r in records if not isinstance(r, dict) or key not in r]
        raise ValueError(
            f"{path}: {len(bad)} of the {kind} have no `{key}`, the first is "
            f"{str(bad[0])[:120]}; add it."
        ) from None


def _integers(values: list[Any], key: str, kind: str, path: str) -> np.ndarray:
    """Returns an int64 array of numbers that are whole."""
    bad = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]
    bad = bad or [v for v in values if v != int(v)]
    if bad:
        raise ValueError(
            f"{path}: `{key}` of the {kind} must be whole numbers; found "
            f"{describe(bad)}. Renumber them."
        )
    return np.array(values, np.int64)


def _check_unique(ids: Iterable[int], kind: str, path: str) -> None:
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise ValueError(
            f"{path}: {kind} ids must be unique; repeated: {describe(repeated)}. "
            "Renumber them or remove the duplicates."
        )


def _read_categories(records: list[Any], path: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns ids, sorted, and their names."""
    ids = _integers(_column(records, "id", "categories", path), "id", "categories", path)
    names = _column(records, "name", "categories", path)
    _check_unique(ids.tolist(), "category", path)
    order = np.argsort(ids)
    return tuple(ids[order].tolist()), tuple(str(names[i]) for i in order)


def _compare_categories(found: Mapping[int, str], expected: Mapping[int, str], path: str) -> None:
    if dict(found) == dict(expected):
        return
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    renamed = [
        f"{i} ({expected[i]!r} became {found[i]!r})"
        for i in sorted(set(found) & set(expected))
        if found[i] != expected[i]
    ]
    parts = [
        f"{text}: {describe(values)}"
        for text, values in (
            ("missing ids", [f"{i} ({expected[i]})" for i in missing]),
            ("unknown ids", [f"{i} ({found[i]})" for i in extra]),
            ("other names", renamed),
        )
        if values
    ]
    raise ValueError(
        f"{path}: `categories` differ from the training data's ({'; '.join(parts)}). "
        "List the same ids and names in both files, also classes without objects."
    )


def _read_images(records: list[Any], path: str) -> dict[str, np.ndarray]:
    """Returns the columns of the image table."""
    table: dict[str, np.ndarray] = {}
    for name, key, dtype in (
        ("image_ids", "id", np.int64),
        ("heights", "height", np.int32),
        ("widths", "width", np.int32),
    ):
        values = _column(records, key, "images", path)
        table[name] = _integers(values, key, "images", path).astype(dtype)
    _check_unique(table["image_ids"].tolist(), "image", path)
    if np.abs(table["image_ids"]).max() > _LARGEST_ID or table["image_ids"].min() < 0:
        raise ValueError(f"{path}: image ids must be in 0..{_LARGEST_ID}; renumber the images.")
    bad = (table["heights"] < 1) | (table["widths"] < 1)
    if bad.any():
        raise ValueError(
            f"{path}: `height` and `width` must be at least 1; image ids "
            f"{describe(table['image_ids'][bad].tolist())} are not. Correct them."
        )
    names = [str(n) for n in _column(records, "file_name", "images", path)]
    table["file_names"] = np.array(names)
    return table


def missing_files(dataset: CocoDataset) -> list[int]:
    """Returns the images whose file is missing; lists every folder once."""
    if records.is_records(dataset.image_root):
        records.check(dataset.image_root, len(dataset))
        return []
    if not os.path.isdir(dataset.image_root):
        raise ValueError(
            f"{dataset.image_root}: no such image folder (for "
            f"{dataset.annotation_file}). Set data.train.images and data.val.images to "
            "the folders that hold the images."
        )
    folders: dict[str, set[str]] = {}
    missing = []
    for index in range(len(dataset)):
        folder, base = os.path.split(dataset.path(index))
        if folder not in folders:
            exists = os.path.isdir(folder)
            folders[folder] = set(os.listdir(folder)) if exists else set()
        if base not in folders[folder]:
            missing.append(index)
    return missing
