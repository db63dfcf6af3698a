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
from solov2_jax.inference.preprocess import make_batches, make_example
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
            for inputs in calibration(exported, images, bucket):
                want = jax.device_get(original(inputs["image"], inputs["image_size"]))
                yield want, exported.run(inputs["image"], inputs["image_size"])

    threshold = exported.metadata["options"]["mask_threshold"]
    return compare(outputs(), threshold)


def calibration(
    exported: ExportedPredictor, images: Sequence[str], bucket: Bucket
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the images as a file takes them: of its shape, else turned.

    A data set of landscapes shows a file for portraits something too.
    """
    own, turned = [], []
    one = dataclasses.replace(exported.input, buckets=(bucket,))
    for number, path in enumerate(images):
        picture = read_image(path)
        example = make_example(picture, number, exported.input)
        if example["image"].shape[:2] == tuple(bucket):
            own.append(example)
        elif not own and (bucket[1], bucket[0]) == example["image"].shape[:2]:
            picture = np.ascontiguousarray(np.rot90(picture))
            turned.append(make_example(picture, number, one))
    if not own and not turned:
        raise ValueError(
            f"--images: none of {len(images)} images has the padded shape "
            f"{bucket[0]}x{bucket[1]}, so its file cannot be compared; give images "
            "that do with --images, or leave the shape out of --shape"
        )
    examples, size = own or turned, exported.batch
    for start in range(0, len(examples), size):
        for batch in make_batches(examples[start : start + size], size):
            yield {key: batch[key] for key in ("image", "image_size")}


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
