"""Gathers, dynamic slices and sorts of a jaxpr as nodes of ONNX; see `onnx_rules`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from solov2_jax.tools.export.onnx_graph import Graph
from solov2_jax.tools.export.walk import Rule, Value

Inputs = Sequence[Value]


def _gather(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    """Rows of one axis: the only form of gather that indexing by an array makes."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, index_shape = (v.aval.shape for v in eqn.invars)
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    whole = [n == s or i == axis for i, (n, s) in enumerate(zip(sizes, shape, strict=True))]
    count, out = len(index_shape) - 1, len(eqn.outvars[0].aval.shape)
    offsets = [i for i in range(out) if not axis <= i < axis + count]
    if (
        axis < 0
        or not all(whole)
        or sizes[axis] != 1
        or numbers.collapsed_slice_dims != (axis,)
        or numbers.operand_batching_dims
        or list(numbers.offset_dims) != offsets
    ):
        raise ValueError(f"onnx: a gather of {sizes} from {shape} has no form here")
    index = g.reshape(inputs[1], index_shape[:-1])
    last = np.asarray(shape[axis] - 1, eqn.invars[1].aval.dtype)
    zero = np.zeros_like(last)
    mode = eqn.params["mode"]
    inside = index
    if mode != GatherScatterMode.PROMISE_IN_BOUNDS:
        inside = g.add("Min", g.add("Max", index, zero), last)
    taken = g.add("Gather", inputs[0], inside, axis=axis)
    if mode in (GatherScatterMode.PROMISE_IN_BOUNDS, GatherScatterMode.CLIP):
        return [taken]
    there = g.reshape(
        g.add("Equal", index, inside), [*index_shape[:-1], *[1] * (out - axis - count)]
    )
    return [g.add("Where", there, taken, _fill_value(eqn))]


def _fill_value(eqn: Any) -> np.ndarray:
    dtype, fill = eqn.outvars[0].aval.dtype, eqn.params["fill_value"]
    if fill is None:
        floating = np.issubdtype(dtype, np.floating)
        fill = np.nan if floating else np.iinfo(dtype).min
    return np.asarray(fill, dtype)


def _starts(g: Graph, eqn: Any, indices: Inputs, sizes: Sequence[int]) -> str:
    """Returns int64 [rank]: where a slice starts, moved so that it fits."""
    rows = [g.reshape(g.cast(x, np.int64), [1]) for x in indices]
    last = np.array(eqn.invars[0].aval.shape, np.int64) - np.array(sizes, np.int64)
    start = g.add("Concat", *rows, axis=0)
    return g.add("Min", g.add("Max", start, g.ints([0] * len(sizes))), last)


def _dynamic_slice(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    sizes = eqn.params["slice_sizes"]
    start = _starts(g, eqn, inputs[1:], sizes)
    end = g.add("Add", start, g.ints(sizes))
    axes = g.ints(range(len(sizes)))
    return [g.reshape(g.add("Slice", inputs[0], start, end, axes), sizes)]


def _dynamic_update_slice(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    x, update, *indices = inputs
    shape, sizes = (v.aval.shape for v in eqn.invars[:2])
    axes = [i for i, (a, b) in enumerate(zip(shape, sizes, strict=True)) if a != b]
    if len(axes) > 1:
        raise ValueError(f"onnx: an update of {sizes} in {shape} has no form here")
    if not axes:
        return [update]
    (axis,) = axes
    start = g.add("Gather", _starts(g, eqn, indices, sizes), g.ints([axis]), axis=0)
    end = g.add("Add", start, g.ints([sizes[axis]]))
    along, top = g.ints([axis]), g.ints([shape[axis]])
    before = g.add("Slice", x, g.ints([0]), start, along)
    after = g.add("Slice", x, end, top, along)
    return [g.reshape(g.add("Concat", before, update, after, axis=axis), shape)]


def _top(g: Graph, x: Value, k: int, axis: int, largest: int) -> list[str]:
    # Equal values come in the order of their indices, as lax.top_k and a stable sort.
    return g.add_many("TopK", 2, x, g.ints([k]), axis=axis, largest=largest, sorted=1)


def _top_k(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    axis = eqn.params["axis"] % len(eqn.invars[0].aval.shape)
    values, index = _top(g, inputs[0], eqn.params["k"], axis, largest=1)
    return [values, g.cast(index, eqn.outvars[1].aval.dtype)]


def _sort(g: Graph, eqn: Any, inputs: Inputs) -> list[Value]:
    axis, size = eqn.params["dimension"], eqn.invars[0].aval.shape
    if eqn.params["num_keys"] != 1:
        raise ValueError("onnx: a sort by several keys has no form")
    values, index = _top(g, inputs[0], size[axis], axis, largest=0)
    rest = [g.add("GatherElements", x, index, axis=axis) for x in inputs[1:]]
    return [values, *rest]


INDEXING_RULES: dict[str, Rule] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "sort": _sort,
    "top_k": _top_k,
}
