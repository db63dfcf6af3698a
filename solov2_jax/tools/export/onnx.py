"""Export as ONNX, run by ONNX Runtime. Needs the extra "export".

The graph is written from the traced program, primitive by primitive; see `rules`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import solov2_jax
from solov2_jax.io import InputError, atomic_path
from solov2_jax.models.conv import portable_forms
from solov2_jax.tools.export.jaxpr import walk
from solov2_jax.tools.export.onnx_control import RULES
from solov2_jax.tools.export.onnx_graph import IR_VERSION, OPSET, Graph
from solov2_jax.tools.export.program import INPUTS, Program, output_names

PRECISIONS = ("float32", "float16", "int8")
METADATA_KEY = "solov2_jax"


def write(program: Program, inputs: tuple[Any, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Writes one padded shape's program, with the metadata inside.

    Raises:
      ValueError: naming what of the program has no form in ONNX.
    """
    model = make_model(program, inputs, metadata)
    import onnx

    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))


def make_model(program: Program, inputs: tuple[Any, Any], metadata: dict[str, Any]) -> Any:
    """Returns the ModelProto of a program."""
    names = output_names(metadata["masks"])

    def ordered(image: Any, image_size: Any) -> list[Any]:
        outputs = program(image, image_size)
        return [outputs[name] for name in names]

    with portable_forms():
        closed = jax.make_jaxpr(ordered)(*inputs)
    graph = Graph(half_weights=metadata["precision"] == "float16")
    results = walk(closed, list(INPUTS), RULES, graph)
    helper = graph.onnx.helper
    for name, value in zip(names, results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(value)], [name]))
    made = helper.make_graph(
        [*graph.casts, *graph.nodes],
        "solov2",
        [graph.info(n, v) for n, v in zip(INPUTS, closed.in_avals, strict=True)],
        [graph.info(n, v) for n, v in zip(names, closed.out_avals, strict=True)],
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
    return model


def quantize(path: Path, examples: Iterable[dict[str, np.ndarray]]) -> None:
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


def read(path: Path, outputs: tuple[str, ...]) -> Callable[..., dict[str, np.ndarray]]:
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
