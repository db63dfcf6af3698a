"""Export as TensorFlow's SavedModel of plain operations: the extra "export-tf"."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from solov2_jax.io import write_json
from solov2_jax.models.conv import portable_forms
from solov2_jax.tools.export.jaxpr import walk
from solov2_jax.tools.export.program import INPUTS, Program, output_names
from solov2_jax.tools.export.tf_graph import RULES, TensorFlowGraph, tensorflow

PRECISIONS = ("float32",)


def make_function(program: Program, inputs: tuple[Any, Any], masks: str, file_format: str) -> Any:
    """Returns the program as a `tf.function` (image, image_size) -> outputs by name."""
    tf = tensorflow()

    names = output_names(masks)

    def ordered(image: Any, image_size: Any) -> list[Any]:
        outputs = program(image, image_size)
        return [outputs[name] for name in names]

    with portable_forms():
        closed = jax.make_jaxpr(ordered)(*inputs)
    writer = TensorFlowGraph(file_format)

    def run(image: Any, image_size: Any) -> dict[str, Any]:
        results = walk(closed, [image, image_size], RULES, writer)
        return dict(zip(names, map(tf.convert_to_tensor, results), strict=True))

    specs = [
        tf.TensorSpec(v.shape, tf.as_dtype(v.dtype), name=name)
        for name, v in zip(INPUTS, inputs, strict=True)
    ]
    return tf.function(run, input_signature=specs, autograph=False)


def write(program: Program, inputs: tuple[Any, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Writes one padded shape's program as a folder, with the metadata inside."""
    tf = tensorflow()

    function = make_function(program, inputs, metadata["masks"], "savedmodel")
    module = tf.Module()
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as temporary:
        folder = Path(temporary) / "new"
        tf.saved_model.save(module, str(folder), signatures=function.get_concrete_function())
        (folder / "assets.extra").mkdir()
        write_json(metadata, folder / "assets.extra" / "metadata.json")
        if path.exists():
            os.replace(path, Path(temporary) / "old")
        os.replace(folder, path)


def read(path: Path, outputs: tuple[str, ...]) -> Callable[..., dict[str, np.ndarray]]:
    """Returns the program of a folder, as TensorFlow runs it."""
    tf = tensorflow()

    loaded: Any = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]

    def run(image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        feed = dict(zip(INPUTS, map(tf.constant, (image, image_size)), strict=True))
        results = signature(**feed)
        return {name: results[name].numpy() for name in outputs}

    run.loaded = loaded  # its functions hold it weakly
    return run
