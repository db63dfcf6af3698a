"""Cityscapes' ground truth, a folder of gtFine, as COCO instances.

    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_instanceIds.png
    leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png

A pixel of `_instanceIds.png` is 1000 times the class's id plus the object's number, or
the class's id alone: of a class with objects, that is a group that could not be told
apart, which becomes a crowd. Source: cityscapesscripts helpers/labels.py and
preparation/json2instanceImg.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.images import list_files
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.rle import rle_of_crop, rle_to_strings

# The classes whose objects are evaluated, by the data set's own ids.
CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
INSTANCE_IDS = "_gtFine_instanceIds.png"
IMAGE = "_leftImg8bit.png"
GT_FINE = "gt_fine"  # in a json's `info`: the folder of gtFine that it was made from
FIRST_OBJECT = 1000  # the least value of a pixel of an object; below it are classes


def find_gt_fine(content: Mapping[str, Any]) -> str:
    """Returns the folder of gtFine that an instances json was made from, "" of any other."""
    info = content.get("info")
    folder = info.get(GT_FINE) if isinstance(info, dict) else None
    return folder if isinstance(folder, str) else ""


def find_instance_ids(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the `_instanceIds.png` of a folder of gtFine, sorted."""
    names = list_files(folder, [".png"])
    return [Path(folder, name) for name in names if name.endswith(INSTANCE_IDS)]


def instance_ids_of(folder: str | os.PathLike[str], file_name: str) -> Path:
    """Returns where the ground truth of an image is."""
    return Path(folder) / (file_name.removesuffix(IMAGE) + INSTANCE_IDS)


def read_instance_ids(path: Path) -> np.ndarray:
    """Returns the pixels of an `_instanceIds.png`, int32 [H, W].

    Raises:
      InputError: for a file that is no such picture.
    """
    with reading(path, "a Cityscapes picture of instance ids"), Image.open(path) as image:
        pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: is no picture of instance ids: {pixels.dtype} {pixels.shape}, and not whole "
            "numbers [height, width]; take the file that Cityscapes' gtFine has."
        )
    return pixels.astype(np.int32)


def read_cityscapes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the content of an instances json for a folder of gtFine.

    Images count from 1 in the order of their paths; `file_name` is relative to
    leftImg8bit's folder of the same name.

    Raises:
      InputError: for a folder without such files.
    """
    paths = find_instance_ids(folder)
    if not paths:
        raise InputError(
            f"{folder}: is a folder without a file *{INSTANCE_IDS}; give an instances json, or of "
            "Cityscapes gtFine/train or gtFine/val."
        )
    images, annotations = [], []
    for number, path in enumerate(track(paths, "reading Cityscapes", unit="images"), start=1):
        ids = read_instance_ids(path)
        name = path.relative_to(folder).as_posix().removesuffix(INSTANCE_IDS) + IMAGE
        height, width = ids.shape
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        least = int(ids.min())
        counts = np.bincount((ids - least).ravel())  # far faster than np.unique
        for value in (np.flatnonzero(counts) + least).tolist():
            label = value // 1000 if value >= FIRST_OBJECT else value
            if label in CLASSES:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": label,
                        "iscrowd": int(value < FIRST_OBJECT),
                        **_outline(ids == value),
                    }
                )
    categories = [{"id": i, "name": name} for i, name in CLASSES.items()]
    info = {GT_FINE: os.path.abspath(folder)}
    return {"info": info, "images": images, "categories": categories, "annotations": annotations}


def _outline(mask: np.ndarray) -> dict[str, Any]:
    """Returns the fields of a mask that has a pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, height, width = (
        int(n) for n in (rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    )
    tight = mask[top : top + height, left : left + width]
    (counts,) = rle_to_strings([rle_of_crop(tight, top, left, mask.shape)])
    return {
        "bbox": [left, top, width, height],
        "area": int(tight.sum()),
        "segmentation": {"size": list(mask.shape), "counts": counts},
    }
