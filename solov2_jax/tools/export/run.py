"""An export from start to end: its files, and their comparison with the original.

The folder then holds a file for each padded shape, `metadata.json`, and in
`export.json` what was measured: parity, sizes, and AP where it was asked for.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from solov2_jax.data.buckets import Bucket, check_buckets
from solov2_jax.io import write_json
from solov2_jax.tools.export.exported import ExportedPredictor, format_module
from solov2_jax.tools.export.measure import calibration, measure_parity
from solov2_jax.tools.export.metadata import (
    default_buckets,
    describe_export,
    file_name,
    write_metadata,
)
from solov2_jax.tools.export.program import MASKS, Program, make_program

log = logging.getLogger(__name__)

REPORT = "export.json"


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how."""

    file_format: str
    precision: str = "float32"
    masks: str = "input"  # see `program.MASKS`
    batch: int = 1  # images per call
    buckets: tuple[Bucket, ...] = ()  # (): the config's, or landscape and portrait


def export(
    model: Any,
    predictor: Any,
    options: ExportOptions,
    folder: str | os.PathLike[str],
    images: Sequence[str],
    source: str,
) -> dict[str, Any]:
    """Writes an export's folder; returns what `export.json` holds.

    Every file is run in its format's own runtime, beside the original program in the
    form that is fastest here.

    Args:
      model: the predictor's network.
      images: paths; for the comparison and, with int8, the ranges of activations.
      source: where the weights are from, for the metadata.

    Raises:
      ValueError: naming what the format cannot do.
    """
    module = format_module(options.file_format)
    check_options(module, model, options)
    buckets = check_buckets(options.buckets, "--shape")
    buckets = buckets or default_buckets(predictor.input)
    metadata = describe_export(
        file_format=options.file_format,
        precision=options.precision,
        masks=options.masks,
        batch=options.batch,
        buckets=buckets,
        input_options=predictor.input,
        detect_options=predictor.options,
        class_names=predictor.class_names,
        category_ids=predictor.category_ids,
        source=source,
    )
    original = _program(model, predictor, options.masks)
    program = original
    if options.precision == "float16" and options.file_format == "stablehlo":
        program = _program(model, predictor, options.masks, half_weights=True)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_metadata(path, metadata)
    exported = ExportedPredictor(path)
    sizes = {}
    for bucket in buckets:
        file = path / file_name(bucket, options.file_format)
        module.write(program, input_shapes(options.batch, bucket), file, metadata)
        if options.precision == "int8":
            module.quantize(file, calibration(exported, images, bucket))
        sizes[file.name] = size_of(file)
        log.info("written: %s, %.1f MB", file, sizes[file.name] / 1e6)
    parity = measure_parity(original, exported, images)
    report = {"parity": parity.to_dict(), "bytes": sizes}
    write_json(report, path / REPORT)
    log.info("parity: %s", parity.summary())
    return report


def check_options(module: Any, model: Any, options: ExportOptions) -> None:
    """Raises a ValueError that names what a format cannot do."""
    name = options.file_format
    if options.precision not in module.PRECISIONS:
        raise ValueError(
            f"--precision={options.precision}: {name} has only {', '.join(module.PRECISIONS)}"
        )
    if options.masks not in MASKS:
        raise ValueError(f"--masks={options.masks}: choose one of {', '.join(MASKS)}")
    if name != "stablehlo" and model.dtype != jnp.float32:
        raise ValueError(
            f"--format={name}: its runtime has no bfloat16 convolutions on the CPU; "
            "add --config.model.dtype=float32, which the same weights fit"
        )


def input_shapes(batch: int, bucket: Bucket) -> tuple[Any, Any]:
    """Returns the types and shapes of a program's inputs."""
    image = jax.ShapeDtypeStruct((batch, *bucket, 3), jnp.uint8)
    return image, jax.ShapeDtypeStruct((batch, 2), jnp.int32)


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


def _program(model: Any, predictor: Any, masks: str, half_weights: bool = False) -> Program:
    return make_program(
        model,
        predictor.variables,
        predictor.input,
        predictor.options,
        masks,
        half_weights,
    )
