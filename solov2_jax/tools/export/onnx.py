"""Export as ONNX, run by ONNX Runtime. Needs the extra "export".

The graph is written from the traced program, primitive by primitive; see `onnx_rules`.
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
from solov2_jax.models.conv import portable_forms
from solov2_jax.tools.export.onnx_control import RULES
from solov2_jax.tools.export.onnx_graph import IR_VERSION, OPSET, Graph
from solov2_jax.tools.export.program import INPUTS, Program, output_names
from solov2_jax.tools.export.walk import walk

PRECISIONS = ("float32", "float16", "int8")
METADATA_KEY = "solov2_jax"


def write(program: Program, inputs: tuple[Any, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Writes one padded shape's program, with the metadata inside.

    Raises:
      ValueError: naming what of the program has no form in ONNX.
    """
    model = make_model(program, inputs, metadata)
    import onnx

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    onnx.save(model, str(temporary))
    os.replace(temporary, path)


def make_model(program: Program, inputs: tuple[Any, Any], metadata: dict[str, Any]) -> Any:
    """Returns the ModelProto of a program."""
    names = output_names(metadata["masks"])

    def ordered(image: Any, image_size: Any) -> list[Any]:
        outputs = program(image, image_size)
        return [outputs[name] for name in names]

    with portable_forms():
        closed = jax.make_jaxpr(ordered)(*inputs)
    graph = Graph(half_weights=metadata["precision"] == "float16")
    found = walk(closed, list(INPUTS), RULES, graph)
    helper = graph.onnx.helper
    for name, value in zip(names, found, strict=True):
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

    def run(image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        given = dict(zip(INPUTS, (image, image_size), strict=True))
        return dict(zip(outputs, session.run(list(outputs), given), strict=True))

    return run
