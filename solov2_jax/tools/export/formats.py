"""The file formats: how a program is written, and how its own runtime runs the file.

StableHLO is `jax.export`'s file, which needs JAX and nothing of ours; it and ONNX need the
extra "export". SavedModel and TFLite hold TensorFlow's plain operations and need the extra
"export-tf".
"""

import importlib.util
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import solov2_jax
from solov2_jax.io import InputError, atomic_path, reason, write_bytes, write_json
from solov2_jax.platforms import portable_forms
from solov2_jax.tools.export.jaxpr import walk
from solov2_jax.tools.export.onnx_graph import IR_VERSION, OPSET, Graph
from solov2_jax.tools.export.program import INPUTS, Program, output_names
from solov2_jax.tools.export.rules import RULES
from solov2_jax.tools.export.tf_graph import TensorFlowGraph, tensorflow

Inputs = tuple[Any, Any]  # types and shapes of a program's image and image_size
Metadata = dict[str, Any]
# (image, image_size) -> outputs by name.
Runner = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]

METADATA_KEY = "solov2_jax"
# One StableHLO file runs on all of them.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def trace(program: Program, inputs: Inputs, masks: str) -> tuple[Any, tuple[str, ...]]:
    """Returns the closed jaxpr of a program, and the names of its outputs in order."""
    with portable_forms():
        shapes = jax.eval_shape(program, *inputs)
    names = output_names(masks, "keypoints" in shapes)

    def ordered(image: Any, image_size: Any) -> list[Any]:
        outputs = program(image, image_size)
        return [outputs[name] for name in names]

    with portable_forms():
        return jax.make_jaxpr(ordered)(*inputs), names


# --- StableHLO -----------------------------------------------------------------------


def write_stablehlo(program: Program, inputs: Inputs, path: Path, metadata: Metadata) -> None:
    """Writes one padded shape's program; the metadata stays in its own file."""
    from jax import export

    with portable_forms():
        exported = export.export(jax.jit(program), platforms=PLATFORMS)(*inputs)
    write_bytes(bytes(exported.serialize()), path)


def read_stablehlo(path: Path, outputs: tuple[str, ...]) -> Runner:
    """Returns the program of a file, as JAX runs it."""
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    # Compiled here: what a damaged file raises belongs to reading it.
    call = jax.jit(exported.call).lower(*exported.in_avals).compile()
    return lambda image, image_size: jax.device_get(call(image, image_size))


# --- ONNX ----------------------------------------------------------------------------


def write_onnx(program: Program, inputs: Inputs, path: Path, metadata: Metadata) -> None:
    """Writes one padded shape's program, with the metadata inside.

    Raises:
      InputError: naming what of the program has no form in ONNX.
    """
    closed, names = trace(program, inputs, metadata["masks"])
    graph = Graph(half_weights=metadata["precision"] == "float16")
    results = walk(closed, list(INPUTS), RULES, graph)
    helper = graph.onnx.helper
    for name, value in zip(names, results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(value)], [name]))
    made = helper.make_graph(
        [*graph.casts, *graph.nodes],
        "solov2",
        graph.infos(INPUTS, closed.in_avals),
        graph.infos(names, closed.out_avals),
        graph.initializers,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="solov2_jax",
        producer_version=solov2_jax.__version__,
    )
    helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    with atomic_path(path) as temporary:
        graph.onnx.save(model, str(temporary))


def quantize_onnx(path: Path, examples: Iterable[dict[str, np.ndarray]]) -> None:
    """Rewrites a file's convolutions in 8-bit integers, by ONNX Runtime's tools.

    Args:
      examples: inputs by name, from which the ranges of activations are taken.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(examples)

        def get_next(self) -> Any:
            return next(self.rows, None)

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            str(path),
            str(target),
            Reader(),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        os.replace(target, path)


def read_onnx(path: Path, outputs: tuple[str, ...]) -> Runner:
    """Returns the program of a file, as ONNX Runtime runs it on the CPU."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    has_inputs = {value.name for value in session.get_inputs()}
    has_outputs = {value.name for value in session.get_outputs()}
    if has_inputs != set(INPUTS) or not has_outputs.issuperset(outputs):
        raise InputError(
            f"{path}: has the inputs {sorted(has_inputs)} and outputs {sorted(has_outputs)}, so "
            "it is no export of this program. Export again"
        )

    def run(image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        feed = dict(zip(INPUTS, (image, image_size), strict=True))
        return dict(zip(outputs, session.run(list(outputs), feed), strict=True))

    return run


# --- TensorFlow ----------------------------------------------------------------------


def save_tensorflow(
    program: Program, inputs: Inputs, folder: str, masks: str, file_format: str
) -> None:
    """Writes a program as a SavedModel of plain operations.

    Args:
      file_format: for messages.
    """
    tf = tensorflow()
    closed, names = trace(program, inputs, masks)
    writer = TensorFlowGraph(file_format)

    def run(image: Any, image_size: Any) -> dict[str, Any]:
        results = walk(closed, [image, image_size], RULES, writer)
        return dict(zip(names, map(tf.convert_to_tensor, results), strict=True))

    specs = [
        tf.TensorSpec(v.shape, tf.as_dtype(v.dtype), name=name)
        for name, v in zip(INPUTS, inputs, strict=True)
    ]
    module = tf.Module()
    module.predict = tf.function(run, input_signature=specs, autograph=False)
    signature = module.predict.get_concrete_function()
    tf.saved_model.save(module, folder, signatures=signature)


def write_savedmodel(program: Program, inputs: Inputs, path: Path, metadata: Metadata) -> None:
    """Writes one padded shape's program as a folder, with the metadata inside."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as temporary:
        folder = Path(temporary) / "new"
        save_tensorflow(program, inputs, str(folder), metadata["masks"], "savedmodel")
        (folder / "assets.extra").mkdir()
        write_json(metadata, folder / "assets.extra" / "metadata.json")
        if path.exists():
            os.replace(path, Path(temporary) / "old")
        os.replace(folder, path)


def read_savedmodel(path: Path, outputs: tuple[str, ...]) -> Runner:
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


def write_tflite(program: Program, inputs: Inputs, path: Path, metadata: Metadata) -> None:
    """Writes one padded shape's program; the metadata follows as a zip archive.

    That is where TFLite's tools look for files that belong to a model, and what every
    unpacker finds in it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Straight from the function, the converter takes one loop for another.
        save_tensorflow(program, inputs, folder, metadata["masks"], "tflite")
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


def read_tflite(path: Path, outputs: tuple[str, ...]) -> Runner:
    """Returns the program of a file, as TFLite's interpreter runs it."""
    interpreter = tensorflow().lite.Interpreter(str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner()

    def run(image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        results = runner(**dict(zip(INPUTS, (image, image_size), strict=True)))
        return {name: results[name] for name in outputs}

    return run


# --- All of them ---------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format's extra, the modules of it that must be there, and what it can do."""

    extra: str
    needs: tuple[str, ...]
    precisions: tuple[str, ...]
    write: Callable[[Program, Inputs, Path, Metadata], None]
    read: Callable[[Path, tuple[str, ...]], Runner]  # of outputs by these names


FORMATS = {
    "stablehlo": Format(
        extra="export",
        needs=("flatbuffers",),
        precisions=("float32", "float16"),
        write=write_stablehlo,
        read=read_stablehlo,
    ),
    "onnx": Format(
        extra="export",
        needs=("onnx", "onnxruntime"),
        precisions=("float32", "float16", "int8"),
        write=write_onnx,
        read=read_onnx,
    ),
    "savedmodel": Format(
        extra="export-tf",
        needs=("tensorflow",),
        precisions=("float32",),
        write=write_savedmodel,
        read=read_savedmodel,
    ),
    "tflite": Format(
        extra="export-tf",
        needs=("tensorflow",),
        precisions=("float32", "float16"),
        write=write_tflite,
        read=read_tflite,
    ),
}


def find_format(name: str) -> Format:
    """Returns a format by its name.

    Raises:
      InputError: for a format that does not exist, or whose packages are missing.
    """
    if name not in FORMATS:
        raise InputError(f"--format={name}: choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    if missing := [m for m in chosen.needs if importlib.util.find_spec(m) is None]:
        raise InputError(
            f"--format={name} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install "
            f'"solov2_jax[{chosen.extra}]"'
        )
    return chosen
