"""A run and a folder of pictures -> labels that the network made, to train on beside others.

Only what is sure is taken: detections from their class's threshold on. A picture without
any is left out, because an empty one would say that there is nothing. The json says in its
`info` that it is for training only: `train --data` takes no validation image from it.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.inference.prediction import Prediction, to_coco_results
from solov2_jax.inference.preprocess import load_image
from solov2_jax.io import InputError
from solov2_jax.tools.importers.merge import TRAINING_ONLY
from solov2_jax.tools.labelling.pictures import (
    PictureFolder,
    fit_shapes,
    open_pictures,
    place_pictures,
    read_pictures,
)

log = logging.getLogger(__name__)

LABELS = "pseudo.json"


@dataclass(frozen=True)
class PseudoOptions:
    """What is taken as a label, and what is written.

    Attributes:
      least: least score of each class, in the order of the labels.
      keep_empty: keep pictures in which nothing is sure, as pictures without objects.
      link: put links to the pictures beside the json, not copies.
      origin: what made the labels, for the json's `info`.
    """

    least: tuple[float, ...]
    keep_empty: bool = False
    link: bool = True
    batch_size: int = 1
    overwrite: bool = False
    origin: str = ""


def pseudo(
    predictor: Any, views: Any, workdir: str, text: str, output: str, options: PseudoOptions
) -> PictureFolder:
    """Writes the labels and the pictures; returns these, with what could not be read.

    Args:
      predictor: of the run.
      views: predictor -> what predicts with it: several views of a picture, or itself.

    Raises:
      InputError: if nothing is left to write.
    """
    new = open_pictures(workdir, text, output, [LABELS], overwrite=options.overwrite)
    (path,), pictures = new.paths, new.pictures
    fitted = views(fit_shapes(predictor, map(pictures.path, pictures.names)))
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    read = 0
    pixels = predictor.input.pixels
    for name, image, prediction in _predictions(fitted, pictures, options.batch_size, pixels):
        read += 1
        found = annotations(prediction, predictor.category_ids, options.least)
        if not found and not options.keep_empty:
            continue
        number, (height, width) = len(images) + 1, image.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for record in found:
            records.append({"id": len(records) + 1, **record, "image_id": number})
    if not images:
        raise InputError(
            f"--input {text}: no label: of {read} pictures none has a detection from its class's "
            f"threshold on, {len(new.left)} are the run's own data, {len(pictures.problems)} "
            "cannot be read. Lower --score, or train longer."
        )
    ids, names = predictor.category_ids, predictor.class_names
    content = {
        "info": _info(predictor, options),
        "images": images,
        "annotations": records,
        "categories": [{"id": i, "name": n} for i, n in zip(ids, names, strict=True)],
    }
    taken = [image["file_name"] for image in images]
    new.check(taken)
    with new.folder.opened():
        place_pictures(new.folder, pictures, taken, link=options.link)
        with new.folder.replacing(path) as temporary:
            temporary.write_text(json.dumps(content), "utf-8")
    log.info("%d objects in %d of %d pictures: %s", len(records), len(images), read, path)
    return pictures


def _info(predictor: Any, options: PseudoOptions) -> dict[str, Any]:
    return {
        "description": "labels that a network made",
        TRAINING_ONLY: True,
        "origin": options.origin,
        "thresholds": dict(zip(predictor.class_names, options.least, strict=True)),
    }


def _predictions(
    predictor: Any, pictures: PictureFolder, batch_size: int, pixels: PixelFormat
) -> Iterator[tuple[str, np.ndarray, Prediction]]:
    """Yields (name, image, prediction) of each picture that can be read, in order."""
    waiting: list[tuple[str, np.ndarray]] = []

    def done() -> Iterator[tuple[str, np.ndarray, Prediction]]:
        found = predictor.predict_images([image for _, image in waiting], batch_size)
        for (name, image), prediction in zip(waiting, found, strict=True):
            yield name, image, prediction

    for item in read_pictures(pictures, lambda path: load_image(path, path, pixels), "labelling"):
        waiting.append(item)
        if len(waiting) == batch_size:
            yield from done()
            waiting = []
    if waiting:
        yield from done()


def annotations(
    prediction: Prediction, category_ids: Sequence[int], least: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns the detections from their class's threshold on as annotations of COCO,
    with `score`, without ids."""
    records = []
    for result in to_coco_results(prediction.above(np.asarray(least)), category_ids):
        rle: Any = result["segmentation"]
        records.append({**result, "iscrowd": 0, "area": int(coco_mask.area(rle))})
    return records
