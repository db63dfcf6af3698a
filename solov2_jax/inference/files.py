"""Image files -> overlay pictures and `predictions.json`.

Source: AdelaiDet demo/demo.py, whose threshold never reaches SOLOv2; here it does.
"""

import glob
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from solov2_jax.data.images import read_image
from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.prediction import (
    Prediction,
    to_coco_results,
    write_results,
)

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
JPEG_QUALITY = 92
# Seconds between two lines of progress.
PROGRESS_EVERY = 2.0


@runtime_checkable
class ImagePredictor(Protocol):
    """What predicting files needs of a `Predictor`."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def predict_images(
        self, images: Iterable[np.ndarray | str]
    ) -> Iterable[Prediction]: ...


def find_images(source: str) -> list[str]:
    """Returns the image files of a file name, a folder or a glob, sorted.

    Of a folder, the files whose names end like images'; of a glob, every file it gives.
    """
    if os.path.isdir(source):
        found = [
            os.path.join(source, name)
            for name in sorted(os.listdir(source))
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        if not found:
            raise ValueError(
                f"--input {source}: no image in this folder; names must end in "
                f"{', '.join(SUFFIXES)}, and folders in it are not searched"
            )
        return found
    if os.path.exists(source):
        return [source]
    found = sorted(p for p in glob.glob(source, recursive=True) if os.path.isfile(p))
    if not found:
        raise ValueError(
            f"--input {source}: no such file, and as a pattern it matches none; give "
            "an image, a folder or a quoted pattern such as 'photos/*.jpg'"
        )
    return found


def name_pictures(paths: Sequence[str], output: str) -> list[str]:
    """Returns the overlay's path for each image: `<stem>.jpg` of a JPEG, else .png.

    A name that is taken gets a number. Refuses to write over an input.
    """
    inputs = {os.path.realpath(path) for path in paths}
    taken: set[str] = set()
    named = []
    for path in paths:
        stem, suffix = os.path.splitext(os.path.basename(path))
        suffix = ".jpg" if suffix.lower() in (".jpg", ".jpeg") else ".png"
        name, number = stem + suffix, 2
        while name.lower() in taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(name.lower())
        named.append(os.path.join(output, name))
        if os.path.realpath(named[-1]) in inputs:
            raise ValueError(
                f"--output {output}: the picture {name} would overwrite an input; "
                "choose another folder"
            )
    return named


def predict_files(
    predictor: ImagePredictor, paths: Sequence[str], output: str, score: float
) -> list[str]:
    """Predicts every file; returns what was wrong with those that cannot be read.

    Writes a picture for each image and `predictions.json`: COCO's results format, and
    `file_name` and `class_name` besides. `image_id` is the number of the image, from 0;
    `file_name` is relative to the folder that holds all images.

    Args:
      score: least score of a detection that is drawn and written.
    """
    pictures = name_pictures(paths, output)
    folder = os.path.commonpath(
        [os.path.dirname(p) for p in map(os.path.abspath, paths)]
    )
    names = [os.path.relpath(path, folder) for path in paths]
    os.makedirs(output, exist_ok=True)
    results: list[dict[str, Any]] = []
    problems: list[str] = []
    shown = 0.0
    for i, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        start = time.perf_counter()
        try:
            image = read_image(path)
        except ValueError as error:
            problems.append(str(error))
            log.error("%d/%d %s", i + 1, len(paths), error)
            continue
        (prediction,) = predictor.predict_images([image])
        prediction = prediction.above(score)
        results += describe(prediction, i, names[i], predictor)
        save(draw_prediction(image, prediction, predictor.class_names), picture)
        now = time.perf_counter()
        if now - shown > PROGRESS_EVERY or i + 1 == len(paths):
            shown = now
            log.info(
                *("%d/%d %s: %d objects, %.2f s -> %s", i + 1, len(paths), path),
                *(len(prediction), now - start, picture),
            )
    write_results(results, Path(output) / "predictions.json")
    done = len(paths) - len(problems)
    log.info("%d images, %d objects: %s", done, len(results), output)
    return problems


def describe(
    prediction: Prediction, image_id: int, file_name: str, predictor: ImagePredictor
) -> list[dict[str, Any]]:
    """Returns a prediction's COCO results with file and class names."""
    results = to_coco_results(prediction, predictor.category_ids)
    for result, label in zip(results, prediction.labels.tolist(), strict=True):
        result["image_id"] = image_id
        result["file_name"] = file_name
        result["class_name"] = predictor.class_names[label]
    return results


def save(picture: np.ndarray, path: str) -> None:
    """Writes a picture, whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    Image.fromarray(picture).save(temporary, quality=JPEG_QUALITY)
    os.replace(temporary, path)
