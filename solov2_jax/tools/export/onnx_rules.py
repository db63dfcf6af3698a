"""Each primitive of a jaxpr as nodes of ONNX.

A rule has the form (graph, equation, inputs) -> outputs. Names on the left are JAX's,
see `jax.lax`; what an operator of ONNX means is in its own documentation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.onnx_graph import Graph
from solov2_jax.tools.export.onnx_indexing import INDEXING_RULES
from solov2_jax.tools.export.walk import Rule, Value, is_constant

Inputs = Sequence[Value]


def _plain(op: str, **attributes: Any) -> Rule:
    """Returns the rule of a primitive that is one operator on the same inputs."""

    def rule(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
        return [g.add(op, *inputs, **attributes)]

    return rule


def _same(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return list(inputs)


def _not_equal(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.add("Not", g.add("Equal", *inputs))]


def _square(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.add("Mul", inputs[0], inputs[0])]


def _integer_pow(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    exponent = np.asarray(eqn.params["y"], eqn.outvars[0].aval.dtype)
    return [g.add("Pow", inputs[0], exponent)]


def _rsqrt(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.add("Reciprocal", g.add("Sqrt", inputs[0]))]


def _clamp(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    low, x, high = inputs
    return [g.add("Min", g.add("Max", x, low), high)]


def _convert(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.cast(inputs[0], eqn.params["new_dtype"])]


def _select_n(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    which, *cases = inputs
    if len(cases) != 2 or eqn.invars[0].aval.dtype != np.bool_:
        raise ValueError("onnx: select_n with more than two cases has no form")
    if eqn.outvars[0].aval.dtype != np.bool_:
        return [g.add("Where", which, cases[1], cases[0])]
    yes = g.add("And", which, cases[1])
    no = g.add("And", g.add("Not", which), cases[0])
    return [g.add("Or", yes, no)]


def _broadcast_in_dim(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    shape, source = eqn.params["shape"], eqn.invars[0].aval.shape
    placed = [1] * len(shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], source, strict=True):
        placed[axis] = size
    x = inputs[0]
    if tuple(placed) != source:
        x = np.reshape(x, placed) if is_constant(x) else g.reshape(x, placed)
    return [x if tuple(placed) == tuple(shape) else g.add("Expand", x, g.ints(shape))]


def _reshape(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.reshape(inputs[0], eqn.outvars[0].aval.shape)]


def _transpose(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.add("Transpose", inputs[0], perm=list(eqn.params["permutation"]))]


def _concatenate(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    return [g.add("Concat", *inputs, axis=eqn.params["dimension"])]


def _stack(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    axis = eqn.params["axis"]
    parts = [g.add("Unsqueeze", x, g.ints([axis])) for x in inputs]
    return [g.add("Concat", *parts, axis=axis)]


def _split(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    sizes = eqn.params["sizes"]
    arguments = (inputs[0], g.ints(sizes))
    return g.add_many("Split", len(sizes), *arguments, axis=eqn.params["axis"])


def _slice(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(starts)
    axes = g.ints(range(len(starts)))
    return [g.add("Slice", inputs[0], g.ints(starts), g.ints(ends), axes, g.ints(strides))]


def _rev(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    x = inputs[0]
    for axis in eqn.params["dimensions"]:
        size = eqn.invars[0].aval.shape[axis]
        x = g.add("Gather", x, g.ints(range(size - 1, -1, -1)), axis=axis)
    return [x]


def _pad(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    config = eqn.params["padding_config"]
    if any(interior for _, _, interior in config):
        raise ValueError("onnx: padding between elements has no form")
    pads = g.ints([low for low, _, _ in config] + [high for _, high, _ in config])
    x, fill = inputs
    # Runtimes pad few types besides these.
    dtype = eqn.outvars[0].aval.dtype
    if dtype == np.bool_:
        x, fill = g.cast(x, np.int32), g.cast(fill, np.int32)
        return [g.cast(g.add("Pad", x, pads, fill), np.bool_)]
    return [g.add("Pad", x, pads, fill)]


def _reduce(op: str, through: Any = None) -> Rule:
    """Returns the rule of a reduction; booleans go through another type."""

    def rule(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
        x = g.cast(inputs[0], through) if through else inputs[0]
        y = g.add(op, x, g.ints(eqn.params["axes"]), keepdims=0)
        return [g.cast(y, eqn.outvars[0].aval.dtype) if through else y]

    return rule


def _argmax(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    (axis,) = eqn.params["axes"]
    x = inputs[0]
    if eqn.invars[0].aval.dtype == np.bool_:
        x = g.cast(x, np.int32)
    index = g.add("ArgMax", x, axis=axis, keepdims=0)
    return [g.cast(index, eqn.params["index_dtype"])]


def _dot_general(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shape_a, shape_b = (v.aval.shape for v in eqn.invars)
    free_a = [i for i in range(len(shape_a)) if i not in (*over_a, *batch_a)]
    free_b = [i for i in range(len(shape_b)) if i not in (*over_b, *batch_b)]

    def size(shape, axes):
        return int(np.prod([shape[i] for i in axes], dtype=np.int64))

    batch = [shape_a[i] for i in batch_a]
    inner = size(shape_a, over_a)
    a = g.transpose(inputs[0], [*batch_a, *free_a, *over_a])
    b = g.transpose(inputs[1], [*batch_b, *over_b, *free_b])
    a = _shaped(g, a, [*batch, size(shape_a, free_a), inner])
    b = _shaped(g, b, [*batch, inner, size(shape_b, free_b)])
    product = g.add("MatMul", a, b)
    return [g.reshape(product, eqn.outvars[0].aval.shape)]


def _shaped(g: Graph, x: Value, shape: list[int]) -> Value:
    if is_constant(x):
        return np.ascontiguousarray(np.reshape(x, shape))
    return g.reshape(x, shape)


def _conv(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    params = eqn.params
    lhs, rhs, out = params["dimension_numbers"]
    if any(n != 1 for n in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise ValueError("onnx: a transposed convolution has no form here")
    x, kernel = g.transpose(inputs[0], lhs), g.transpose(inputs[1], rhs)
    pads = params["padding"]
    y = g.add(
        "Conv",
        *(x, kernel),
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[low for low, _ in pads] + [high for _, high in pads],
    )
    return [g.transpose(y, np.argsort(out).tolist())]


def _iota(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    row = [1] * len(shape)
    row[axis] = shape[axis]
    line = np.arange(shape[axis], dtype=eqn.params["dtype"]).reshape(row)
    return [g.add("Expand", line, g.ints(shape))]


_OPERATORS: dict[str, str] = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "ceil": "Ceil",
    "div": "Div",
    "eq": "Equal",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}

ARRAY_RULES: dict[str, Rule] = {
    **INDEXING_RULES,
    **{name: _plain(op) for name, op in _OPERATORS.items()},
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _convert,
    "copy": _same,
    "dot_general": _dot_general,
    "expand_dims": _reshape,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "ne": _not_equal,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax", through=np.int32),
    "reduce_and": _reduce("ReduceMin", through=np.int32),
    "reduce_sum": _reduce("ReduceSum"),
    "rem": _plain("Mod", fmod=1),
    "reshape": _reshape,
    "rev": _rev,
    "rsqrt": _rsqrt,
    "select_n": _select_n,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": _same,
    "transpose": _transpose,
}
