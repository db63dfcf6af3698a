"""Export as a TFLite file of built-in operations: the extra "export-tf"."""

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.io import InputError, reason, write_bytes
from solov2_jax.tools.export.program import INPUTS, Program
from solov2_jax.tools.export.savedmodel import make_function
from solov2_jax.tools.export.tf_graph import tensorflow

PRECISIONS = ("float32", "float16")


def write(program: Program, inputs: tuple[Any, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Writes one padded shape's program; the metadata follows as a zip archive.

    That is where TFLite's tools look for files that belong to a model, and what every
    unpacker finds in it.
    """
    tf = tensorflow()

    function = make_function(program, inputs, metadata["masks"], "tflite")
    module = tf.Module()
    module.predict = function
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Straight from the function, the converter takes one loop for another.
        signature = function.get_concrete_function()
        tf.saved_model.save(module, folder, signatures=signature)
        model = _convert(folder, metadata["precision"])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("metadata.json", json.dumps(metadata, indent=2) + "\n")
    write_bytes(model + archive.getvalue(), path)


def _convert(folder: str, precision: str) -> bytes:
    """Returns the TFLite model of a SavedModel."""
    tf = tensorflow()

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if precision == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    try:
        return converter.convert()
    except Exception as error:
        raise InputError(
            f"tflite: TensorFlow's converter refuses the program ({reason(error)}); export "
            "to savedmodel or onnx instead"
        ) from error


def read(path: Path, outputs: tuple[str, ...]) -> Callable[..., dict[str, np.ndarray]]:
    """Returns the program of a file, as TFLite's interpreter runs it."""
    tf = tensorflow()

    interpreter = tf.lite.Interpreter(str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner()

    def run(image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        results = runner(**dict(zip(INPUTS, (image, image_size), strict=True)))
        return {name: results[name] for name in outputs}

    return run
