"""An export from start to end: its files, and their comparison with the original.

The folder then holds a file for each padded shape, `metadata.json`, and in
`export.json` what was measured: parity, sizes, and AP where it was asked for.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from solov2_jax.data.buckets import check_buckets
from solov2_jax.io import InputError, make_folder, write_json
from solov2_jax.progress import working
from solov2_jax.tools.export.exported import (
    FILE,
    REPORT,
    ExportedPredictor,
    ExportOptions,
    describe_export,
    file_name,
    input_of,
    written_by_exports,
)
from solov2_jax.tools.export.formats import Format, find_format, quantize_onnx
from solov2_jax.tools.export.parity import calibration, check_images, measure_parity
from solov2_jax.tools.export.program import MASKS, Program, make_program

log = logging.getLogger(__name__)


def export(
    model: Any,
    predictor: Any,
    options: ExportOptions,
    folder: str | os.PathLike[str],
    images: Sequence[str],
    source: str,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes an export's folder; returns what `export.json` holds.

    Every file is run in its format's own runtime, beside the original program in the
    form that is fastest here.

    Args:
      model: the predictor's network.
      images: paths; for the comparison and, with int8, the ranges of activations.
      source: where the weights are from, for the metadata.
      overwrite: replace files that no export wrote, too.

    Raises:
      InputError: naming what the format cannot do, the shape that no image has, or the
        file that is not an export's; before anything is written.
    """
    check_options(find_format(options.file_format), model, options)
    buckets = check_buckets(options.buckets, "--shape") or predictor.input.buckets
    metadata = describe_export(options, buckets, predictor, source)

    def program_of(half_weights: bool) -> Program:
        weights, preprocessing = predictor.variables, predictor.input
        detection, masks = predictor.options, options.masks
        return make_program(model, weights, preprocessing, detection, masks, half_weights)

    original = program_of(half_weights=False)
    # The other formats store halved weights themselves.
    halved = options.precision == "float16" and options.file_format == "stablehlo"
    program = program_of(half_weights=True) if halved else original
    path = Path(folder)
    for bucket in buckets:
        check_images(images, bucket, input_of(metadata))
    own = written_by_exports(path)
    targets = {FILE, REPORT, *metadata["files"]}
    if not overwrite:
        refuse_foreign(path, targets - own)
    make_folder(path)
    write_json(metadata, path / FILE)
    exported = ExportedPredictor(path)
    sizes = _write_programs(program, exported, options, path, images)
    with working("comparing the file with the original"):
        parity = measure_parity(original, exported, images)
    written = sorted(targets | {name for name in own if (path / name).exists()})
    report = {"parity": asdict(parity), "bytes": sizes, "written": written}
    write_json(report, path / REPORT)
    log.info("parity: %s", parity.summary())
    return report


def _write_programs(
    program: Any, exported: ExportedPredictor, options: ExportOptions, folder: Path, images: Any
) -> dict[str, int]:
    """Writes a program for each image shape; returns the files' sizes in bytes."""
    chosen, sizes = find_format(options.file_format), {}
    pixels = exported.input.pixels
    for bucket in exported.input.buckets:
        file = folder / file_name(bucket, options.file_format)
        image = jax.ShapeDtypeStruct((options.batch, *bucket, pixels.channels), pixels.dtype)
        image_size = jax.ShapeDtypeStruct((options.batch, 2), jnp.int32)
        with working(f"writing {file.name}"):
            chosen.write(program, (image, image_size), file, exported.metadata)
        if options.precision == "int8":
            quantize_onnx(file, calibration(exported.input, exported.batch, images, bucket))
        parts = file.rglob("*") if file.is_dir() else [file]
        sizes[file.name] = sum(part.stat().st_size for part in parts if part.is_file())
        log.info("written: %s, %.1f MB", file, sizes[file.name] / 1e6)
    return sizes


def refuse_foreign(folder: Path, names: set[str]) -> None:
    """Raises InputError when a file of these names is there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file; --output must be a folder")
    for name in sorted(names):
        if (folder / name).exists():
            raise InputError(
                f"{folder / name}: exists and was not written by an export; choose another "
                "--output, or add --overwrite"
            )


def check_options(chosen: Format, model: Any, options: ExportOptions) -> None:
    """Raises an InputError that names what a format cannot do."""
    name = options.file_format
    if options.precision not in chosen.precisions:
        raise InputError(
            f"--precision={options.precision}: {name} has only {', '.join(chosen.precisions)}"
        )
    if options.masks not in MASKS:
        raise InputError(f"--masks={options.masks}: choose one of {', '.join(MASKS)}")
    if name != "stablehlo" and model.dtype != jnp.float32:
        raise InputError(
            f"--format={name}: its runtime has no bfloat16 convolutions on the CPU; "
            "add --config.model.dtype=float32, which the same weights fit"
        )
