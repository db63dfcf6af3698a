"""An export beside its original: the same images through both, and AP of both."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from solov2_jax.data.buckets import Bucket
from solov2_jax.data.images import read_image
from solov2_jax.evaluation.coco import CocoEvaluator, json_metrics
from solov2_jax.evaluation.evaluate import evaluate
from solov2_jax.inference.preprocess import InputOptions, make_batches, make_example
from solov2_jax.io import InputError
from solov2_jax.tools.export.exported import ExportedPredictor
from solov2_jax.tools.export.parity import Outputs, Parity, compare
from solov2_jax.tools.export.program import Program
from solov2_jax.tools.report.full_resolution import FullResolutionBatches, FullResolutionPredictor

log = logging.getLogger(__name__)


def measure_parity(program: Program, exported: ExportedPredictor, images: Sequence[str]) -> Parity:
    """Returns how far the exported files are from the original on the images.

    Args:
      program: the original, which runs in the form that is fastest here.
    """
    original = jax.jit(program)

    def outputs() -> Iterator[tuple[Outputs, Outputs]]:
        for bucket in exported.input.buckets:
            for inputs in calibration(exported.input, exported.batch, images, bucket):
                want = jax.device_get(original(inputs["image"], inputs["image_size"]))
                yield want, exported.run(inputs["image"], inputs["image_size"])

    threshold = exported.metadata["options"]["mask_threshold"]
    return compare(outputs(), threshold)


def calibration(
    options: InputOptions, batch_size: int, images: Sequence[str], bucket: Bucket
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of the images as a file takes them: of its shape, else turned.

    A data set of landscapes shows a file for portraits something too.

    Args:
      options: of the exported program, with all its padded shapes.
    """
    examples = _examples(options, images, bucket)
    for start in range(0, len(examples), batch_size):
        for batch in make_batches(examples[start : start + batch_size], batch_size):
            yield {key: batch[key] for key in ("image", "image_size")}


def check_images(images: Sequence[str], bucket: Bucket, options: InputOptions) -> None:
    """Raises InputError when no image has a padded shape."""
    if not _examples(options, images, bucket, first=True):
        raise InputError(
            f"--images: none of {len(images)} images has the padded shape "
            f"{bucket[0]}x{bucket[1]}, so its file cannot be compared; give images "
            "that do with --images, or leave the shape out of --shape"
        )


def _examples(
    options: InputOptions, images: Sequence[str], bucket: Bucket, first: bool = False
) -> list[dict[str, np.ndarray]]:
    """Returns the images of a padded shape, or those that have it when turned.

    Args:
      first: one of either suffices.
    """
    straight, turned = [], []
    only = dataclasses.replace(options, buckets=(bucket,))
    for number, path in enumerate(images):
        picture = read_image(path)
        example = make_example(picture, number, options)
        if example["image"].shape[:2] == tuple(bucket):
            straight.append(example)
        elif not straight and (bucket[1], bucket[0]) == example["image"].shape[:2]:
            picture = np.ascontiguousarray(np.rot90(picture))
            turned.append(make_example(picture, number, only))
        if first and (straight or turned):
            break
    return straight or turned


def measure_ap(
    original: Any,
    exported: ExportedPredictor,
    dataset: Any,
    folder: str | os.PathLike[str],
    max_images: int,
) -> dict[str, dict[str, float | None]]:
    """Returns AP of the original and of the export, on the same images.

    Args:
      folder: each writes its predictions and metrics to a folder below it.
    """
    evaluator = CocoEvaluator(dataset.annotation_file, dataset.category_ids, dataset.class_names)
    measured = {}
    for name, predictor in (("original", original), ("exported", exported)):
        metrics = evaluate(
            FullResolutionPredictor(predictor),
            evaluator,
            dataset,
            FullResolutionBatches(dataset, max_images),
            Path(folder) / name,
        )
        names = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP", "num_images")
        measured[name] = json_metrics({key: metrics[key] for key in names if key in metrics})
    return measured
