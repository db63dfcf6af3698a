"""Results in Cityscapes' own format -> results in COCO's.

A folder with a text file for each image, CITY_SEQUENCE_FRAME*.txt, of lines
`PATH CLASS_ID SCORE`: the path of a picture, relative to the text file, whose pixels above
0 are the object. Source: cityscapesscripts evaluation/evalInstanceLevelSemanticLabeling.py,
getPrediction and readPredInfo.
"""

import math
import os
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from solov2_jax.data.cityscapes import CLASSES, IMAGE
from solov2_jax.data.coco import is_inside
from solov2_jax.evaluation.coco_score import GroundTruth
from solov2_jax.io import InputError, reading
from solov2_jax.progress import track
from solov2_jax.rle import mask_to_rle


def read_cityscapes_results(folder: str, truth: GroundTruth) -> list[dict[str, Any]]:
    """Returns the results of a folder, in COCO's format.

    Classes that are not evaluated and masks without a pixel are left out, as Cityscapes'
    program leaves them out.

    Raises:
      InputError: naming file and line, also for an image without a file or with two.
    """
    files = sorted(Path(folder).rglob("*.txt"))
    if not files:
        raise InputError(
            f"{folder}: is a folder without a .txt; give a results json, or of Cityscapes' format "
            "the folder with a .txt for each image."
        )
    results = []
    for image_id, record in track(truth.images.items(), "reading results", unit="images"):
        stem = posixpath.basename(str(record["file_name"])).removesuffix(IMAGE)
        own = [path for path in files if path.name.startswith(stem)]
        if len(own) != 1:
            raise InputError(
                f"{folder}: has {len(own)} files {stem}*.txt, and must have one for each image of "
                f"{truth.source}, empty where nothing was detected."
            )
        size = int(record["height"]), int(record["width"])
        with reading(own[0], "a text file of results"):
            lines = own[0].read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                result = _result(folder, own[0], number, line, size)
                results += [{"image_id": image_id, **result}] if result else []
    return results


def _result(
    folder: str, file: Path, number: int, line: str, size: tuple[int, int]
) -> dict[str, Any] | None:
    """Returns the result of a line; None for one that does not count."""
    place = f"{file}, line {number}"
    words = line.split()
    try:
        name, label, score = words[0], int(float(words[1])), float(words[2])
        if len(words) != 3 or not math.isfinite(score):
            raise ValueError
    except (ValueError, IndexError, OverflowError):
        raise InputError(
            f"{place}: is {line[:80]!r}, and must be PATH CLASS_ID SCORE, without spaces in the "
            "path; correct it."
        ) from None
    if label not in CLASSES:
        return None
    path = file.parent / name
    if os.path.isabs(name) or not is_inside(folder, os.path.relpath(path, folder)):
        raise InputError(f"{place}: {name} leads out of {folder}; write it relative to the file.")
    with reading(path, "a picture of a mask"), Image.open(path) as image:
        mask = np.asarray(image.convert("L")) > 0
    if mask.shape != size:
        raise InputError(
            f"{place}: {name} is {mask.shape} (height, width), and its image {size}; write masks "
            "of the image's size."
        )
    if not mask.any():
        return None
    rle: Any = mask_to_rle(mask)
    return {
        "category_id": label,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "score": score,
        "segmentation": {"size": list(size), "counts": rle["counts"].decode()},
    }
