"""Each primitive of a jaxpr as TensorFlow operations, for SavedModel and TFLite.

A rule has the form (writer, equation, inputs) -> outputs; it runs while `tf.function`
traces. JAX's own bridge, `jax2tf`, writes a StableHLO program into the model instead,
which TFLite cannot run and TensorFlow reads only if it is as new as JAX.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from solov2_jax.tools.export.walk import Rule, Value, is_constant

Inputs = Sequence[Value]


def tensorflow() -> Any:
    """Returns the module, which brings 1.5 GB: the extra "export-tf"."""
    return importlib.import_module("tensorflow")


class TensorFlowBuilder:
    """What the rules write to: TensorFlow's functions, for one format's name."""

    def __init__(self, name: str):
        self.format, self.tf = name, tensorflow()
        self._kernels: dict[tuple, tuple[Any, Any, Any]] = {}

    def kernel(self, value: Value, order: Sequence[int]) -> Any:
        """Returns a kernel in another layout; once where several levels share it."""
        if not is_constant(value):
            return self.tf.transpose(value, order)
        graph = self.tf.compat.v1.get_default_graph()
        key = (id(value), id(graph), *order)
        if key not in self._kernels:
            turned = self.tf.constant(np.transpose(value, order))
            self._kernels[key] = (turned, value, graph)
        return self._kernels[key][0]

    def shaped(self, value: Any, variable: Any) -> Any:
        """Returns the value with the static shape of a jaxpr's variable."""
        return self.tf.ensure_shape(value, variable.aval.shape)


def _plain(name: str) -> Rule:
    """Returns the rule of a primitive that is one function on the same inputs."""

    def rule(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
        function: Any = w.tf
        for part in name.split("."):
            function = getattr(function, part)
        return [function(*(w.tf.convert_to_tensor(x) for x in inputs))]

    return rule


def _same(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return list(inputs)


def _convert(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.cast(inputs[0], w.tf.as_dtype(np.dtype(eqn.params["new_dtype"])))]


def _reshape(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.reshape(inputs[0], eqn.outvars[0].aval.shape)]


def _select_n(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    which, *cases = inputs
    if len(cases) != 2 or eqn.invars[0].aval.dtype != np.bool_:
        raise ValueError(f"{w.format}: select_n of more than two cases has no form")
    return [w.tf.where(which, cases[1], cases[0])]


def _clamp(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    low, x, high = inputs
    return [w.tf.minimum(w.tf.maximum(x, low), high)]


def _broadcast_in_dim(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    shape, source = eqn.params["shape"], eqn.invars[0].aval.shape
    placed = [1] * len(shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], source, strict=True):
        placed[axis] = size
    x = w.tf.reshape(inputs[0], placed)
    return [x if tuple(placed) == tuple(shape) else w.tf.broadcast_to(x, shape)]


def _transpose(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.transpose(inputs[0], eqn.params["permutation"])]


def _concatenate(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.concat(list(inputs), eqn.params["dimension"])]


def _stack(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.stack(list(inputs), eqn.params["axis"])]


def _split(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return w.tf.split(inputs[0], list(eqn.params["sizes"]), eqn.params["axis"])


def _slice(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(starts)
    return [w.tf.strided_slice(inputs[0], starts, ends, strides)]


def _rev(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    return [w.tf.reverse(inputs[0], list(eqn.params["dimensions"]))]


def _pad(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    config = [tuple(int(n) for n in c) for c in eqn.params["padding_config"]]
    if any(interior for _, _, interior in config):
        raise ValueError(f"{w.format}: padding between elements has no form")
    x, fill = inputs
    sizes = zip(config, eqn.invars[0].aval.shape, strict=True)
    cut = [slice(max(-a, 0), n - max(-b, 0)) for (a, b, _), n in sizes]
    x = w.tf.convert_to_tensor(x)[tuple(cut)]
    pads = [[max(a, 0), max(b, 0)] for a, b, _ in config]
    return [w.tf.pad(x, pads, constant_values=fill) if np.any(pads) else x]


def _reduce(name: str) -> Rule:
    def rule(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
        return [getattr(w.tf, name)(inputs[0], list(eqn.params["axes"]))]

    return rule


def _dot_general(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shape_a, shape_b = (v.aval.shape for v in eqn.invars)
    free_a = [i for i in range(len(shape_a)) if i not in (*over_a, *batch_a)]
    free_b = [i for i in range(len(shape_b)) if i not in (*over_b, *batch_b)]
    batch = [shape_a[i] for i in batch_a]
    inner = int(np.prod([shape_a[i] for i in over_a], dtype=np.int64))
    a = w.tf.transpose(inputs[0], [*batch_a, *free_a, *over_a])
    b = w.tf.transpose(inputs[1], [*batch_b, *over_b, *free_b])
    a, b = w.tf.reshape(a, [*batch, -1, inner]), w.tf.reshape(b, [*batch, inner, -1])
    return [w.tf.reshape(w.tf.matmul(a, b), eqn.outvars[0].aval.shape)]


def _conv(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    params = eqn.params
    lhs, rhs, out = params["dimension_numbers"]
    plain = all(n == 1 for n in params["lhs_dilation"])
    if not plain or params["batch_group_count"] != 1:
        raise ValueError(f"{w.format}: a transposed convolution has no form here")
    x = w.tf.transpose(inputs[0], [lhs[0], *lhs[2:], lhs[1]])
    kernel = w.kernel(inputs[1], [*rhs[2:], rhs[1], rhs[0]])
    pads = [tuple(int(n) for n in pair) for pair in params["padding"]]
    if np.any(pads):
        x = w.tf.pad(x, [(0, 0), *pads, (0, 0)])
    strides, dilations = list(params["window_strides"]), list(params["rhs_dilation"])
    y = w.tf.nn.conv2d(x, kernel, strides, "VALID", dilations=dilations)
    order = [out[0], *out[2:], out[1]]
    return [w.tf.transpose(y, np.argsort(order).tolist())]


def _gather(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    """Rows of one axis: the only form of gather that indexing by an array makes."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, index_shape = (v.aval.shape for v in eqn.invars)
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    rest = [n == s for i, (n, s) in enumerate(zip(sizes, shape, strict=True)) if i != axis]
    count, out = len(index_shape) - 1, len(eqn.outvars[0].aval.shape)
    offsets = [i for i in range(out) if not axis <= i < axis + count]
    one = numbers.collapsed_slice_dims == (axis,) and not numbers.operand_batching_dims
    whole = axis >= 0 and all(rest) and sizes[axis] == 1
    if not (whole and one and list(numbers.offset_dims) == offsets):
        raise ValueError(f"{w.format}: a gather of {sizes} from {shape} has no form")
    index = w.tf.reshape(inputs[1], index_shape[:-1])
    inside = w.tf.clip_by_value(index, 0, shape[axis] - 1)
    taken = w.tf.gather(inputs[0], inside, axis=axis)
    if eqn.params["mode"] in (
        GatherScatterMode.PROMISE_IN_BOUNDS,
        GatherScatterMode.CLIP,
    ):
        return [taken]
    there = w.tf.reshape(index == inside, [*index_shape[:-1], *[1] * (out - axis - count)])
    dtype, fill = eqn.outvars[0].aval.dtype, eqn.params["fill_value"]
    if fill is None:
        floating = np.issubdtype(dtype, np.floating)
        fill = np.nan if floating else np.iinfo(dtype).min
    return [w.tf.where(there, taken, np.asarray(fill, dtype))]


def _starts(w: TensorFlowBuilder, eqn: Any, indices: Inputs, sizes: Sequence[int]) -> Any:
    last = np.array(eqn.invars[0].aval.shape, np.int32) - np.array(sizes, np.int32)
    start = w.tf.stack([w.tf.cast(i, w.tf.int32) for i in indices])
    return w.tf.minimum(w.tf.maximum(start, 0), last)


def _dynamic_slice(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    sizes = eqn.params["slice_sizes"]
    return [w.tf.slice(inputs[0], _starts(w, eqn, inputs[1:], sizes), sizes)]


def _dynamic_update_slice(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    x, update, *indices = inputs
    shape, sizes = (v.aval.shape for v in eqn.invars[:2])
    axes = [i for i, (a, b) in enumerate(zip(shape, sizes, strict=True)) if a != b]
    if len(axes) > 1:
        raise ValueError(f"{w.format}: an update of {sizes} in {shape} has no form")
    if not axes:
        return [update]
    (axis,) = axes
    start = _starts(w, eqn, indices, sizes)[axis]
    place = w.tf.range(shape[axis]) - start
    rows = w.tf.gather(update, w.tf.clip_by_value(place, 0, sizes[axis] - 1), axis=axis)
    there = w.tf.logical_and(place >= 0, place < sizes[axis])
    there = w.tf.reshape(there, [-1] + [1] * (len(shape) - axis - 1))
    return [w.tf.where(there, rows, x)]


def _top_k(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    if eqn.params["axis"] not in (-1, len(eqn.invars[0].aval.shape) - 1):
        raise ValueError(f"{w.format}: top_k along another axis than the last")
    values, index = w.tf.math.top_k(inputs[0], eqn.params["k"])
    return [values, w.tf.cast(index, w.tf.int32)]


def _sort(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    shape = eqn.invars[0].aval.shape
    if eqn.params["num_keys"] != 1 or len(shape) != 1:
        raise ValueError(f"{w.format}: only a sort of vectors by one key has a form")
    # top_k takes the lower index of equal values first: a stable sort.
    _, index = w.tf.math.top_k(-inputs[0], shape[0])
    return [w.tf.gather(x, index) for x in inputs]


def _argmax(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    (axis,) = eqn.params["axes"]
    x = inputs[0]
    x = w.tf.cast(x, w.tf.int32) if eqn.invars[0].aval.dtype == np.bool_ else x
    return [w.tf.argmax(x, axis, w.tf.as_dtype(np.dtype(eqn.params["index_dtype"])))]


def _iota(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    row = [1] * len(shape)
    row[axis] = shape[axis]
    line = np.arange(shape[axis], dtype=eqn.params["dtype"]).reshape(row)
    return [w.tf.broadcast_to(line, shape)]


def _div(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    if np.issubdtype(eqn.outvars[0].aval.dtype, np.floating):
        return [w.tf.divide(*inputs)]
    return [_whole_div(w, *inputs)]


def _rem(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    x, y = inputs
    if np.issubdtype(eqn.outvars[0].aval.dtype, np.floating):
        return [w.tf.math.floormod(w.tf.abs(x), w.tf.abs(y)) * w.tf.sign(x)]
    return [x - _whole_div(w, x, y) * y]


def _whole_div(w: TensorFlowBuilder, x: Value, y: Value) -> Any:
    # Towards zero, as in C; TFLite has no truncatediv of this name.
    return w.tf.raw_ops.Div(x=x, y=y)


def _integer_pow(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    exponent = np.asarray(eqn.params["y"], eqn.outvars[0].aval.dtype)
    return [w.tf.pow(inputs[0], exponent)]


_FUNCTIONS: dict[str, str] = {
    "abs": "abs",
    "add": "add",
    "and": "logical_and",
    "ceil": "math.ceil",
    "eq": "equal",
    "exp": "exp",
    "floor": "floor",
    "ge": "greater_equal",
    "gt": "greater",
    "le": "less_equal",
    "log": "math.log",
    "logistic": "sigmoid",
    "lt": "less",
    "max": "maximum",
    "min": "minimum",
    "mul": "multiply",
    "ne": "not_equal",
    "neg": "negative",
    "not": "logical_not",
    "or": "logical_or",
    "pow": "pow",
    "rsqrt": "math.rsqrt",
    "sign": "sign",
    "sqrt": "sqrt",
    "square": "square",
    "sub": "subtract",
    "tanh": "tanh",
}

ARRAY_RULES: dict[str, Rule] = {
    **{name: _plain(function) for name, function in _FUNCTIONS.items()},
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _convert,
    "copy": _same,
    "div": _div,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _reduce("reduce_all"),
    "reduce_max": _reduce("reduce_max"),
    "reduce_min": _reduce("reduce_min"),
    "reduce_or": _reduce("reduce_any"),
    "reduce_sum": _reduce("reduce_sum"),
    "rem": _rem,
    "reshape": _reshape,
    "rev": _rev,
    "select_n": _select_n,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": _same,
    "top_k": _top_k,
    "transpose": _transpose,
}
