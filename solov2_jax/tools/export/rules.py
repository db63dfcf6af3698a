"""Each primitive of a jaxpr in a few array operations, which every writer has.

A rule has the form (writer, equation, inputs) -> outputs. The writers are
`onnx_graph.Graph`, which documents the operations, and `tf_graph.TensorFlowGraph`.
Names of primitives are JAX's, see `jax.lax`. What has no form is refused here, once, in
the same words for all formats.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from solov2_jax.tools.export.jaxpr import Equation, Rule, Value, walk

Inputs = Sequence[Value]

# One operator on the same inputs, in every format.
ELEMENTWISE = (
    "abs add and ceil div eq erf exp floor ge gt le log logistic lt max min mul ne neg not or pow "
    "rem rsqrt sign sqrt square sub tanh"
).split()


def _elementwise(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    if "out_dtype" in eqn and eqn["out_dtype"] not in (None, eqn.outputs[0].dtype):
        raise eqn.refuse(f"{eqn.name} of mixed types")
    return [w.apply(eqn.name, *inputs)]


def _shift_right(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    """A division: what is shifted are sizes, which are not negative."""
    number, steps = inputs
    if not isinstance(steps, np.ndarray | np.generic | int):
        raise eqn.refuse("a shift by a computed number")
    return [w.apply("div", number, np.asarray(1 << np.asarray(steps), eqn.outputs[0].dtype))]


def _clamp(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    low, x, high = inputs
    return [w.apply("min", w.apply("max", x, low), high)]


def _select_n(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    which, *cases = inputs
    if len(cases) != 2 or eqn.inputs[0].dtype != np.bool_:
        raise eqn.refuse("select_n of more than two cases")
    return [w.where(which, cases[1], cases[0], eqn.outputs[0].dtype)]


def _broadcast_in_dim(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    shape, source = tuple(eqn["shape"]), eqn.inputs[0].shape
    placed = [1] * len(shape)
    for axis, size in zip(eqn["broadcast_dimensions"], source, strict=True):
        placed[axis] = size
    x = inputs[0] if tuple(placed) == source else w.reshape(inputs[0], placed)
    return [x if tuple(placed) == shape else w.expand(x, shape)]


def _split(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    return list(w.split(inputs[0], [int(n) for n in eqn["sizes"]], eqn["axis"]))


def _slice(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    starts, ends = eqn["start_indices"], eqn["limit_indices"]
    return [w.slice(inputs[0], starts, ends, eqn["strides"] or [1] * len(starts))]


def _pad(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    config = [tuple(int(n) for n in axis) for axis in eqn["padding_config"]]
    if any(interior for _, _, interior in config):
        raise eqn.refuse("padding between elements")
    x, fill = inputs
    pads = [(low, high) for low, high, _ in config]
    return [w.pad(x, pads, fill, eqn.inputs[0])]


def _argmax(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    (axis,) = eqn["axes"]
    is_bool = eqn.inputs[0].dtype == np.bool_
    x = w.cast(inputs[0], np.int32) if is_bool else inputs[0]
    return [w.argmax(x, axis, eqn["index_dtype"])]


def _iota(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    shape, axis = eqn["shape"], eqn["dimension"]
    row = [1] * len(shape)
    row[axis] = shape[axis]
    return [w.expand(np.arange(shape[axis], dtype=eqn["dtype"]).reshape(row), shape)]


def _dot_general(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    (over_a, over_b), (batch_a, batch_b) = eqn["dimension_numbers"]
    shape_a, shape_b = (aval.shape for aval in eqn.inputs)
    free_a = [i for i in range(len(shape_a)) if i not in (*over_a, *batch_a)]
    free_b = [i for i in range(len(shape_b)) if i not in (*over_b, *batch_b)]

    def size(shape: Sequence[int], axes: Sequence[int]) -> int:
        return int(np.prod([shape[i] for i in axes], dtype=np.int64))

    batch, inner = [shape_a[i] for i in batch_a], size(shape_a, over_a)
    a = w.transpose(inputs[0], [*batch_a, *free_a, *over_a])
    b = w.transpose(inputs[1], [*batch_b, *over_b, *free_b])
    a = w.reshape(a, [*batch, size(shape_a, free_a), inner])
    b = w.reshape(b, [*batch, inner, size(shape_b, free_b)])
    return [w.reshape(w.matmul(a, b), eqn.outputs[0].shape)]


def _conv(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    if any(n != 1 for n in eqn["lhs_dilation"]) or eqn["batch_group_count"] != 1:
        raise eqn.refuse("a transposed convolution")
    y = w.conv(
        *inputs,
        layouts=eqn["dimension_numbers"],
        strides=[int(n) for n in eqn["window_strides"]],
        dilations=[int(n) for n in eqn["rhs_dilation"]],
        pads=[(int(low), int(high)) for low, high in eqn["padding"]],
        groups=int(eqn["feature_group_count"]),
    )
    return [y]


def _gather(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    """Rows of one axis: the only form of gather that indexing by an array makes."""
    numbers, sizes, mode = eqn["dimension_numbers"], eqn["slice_sizes"], eqn["mode"]
    shape, index_shape = (aval.shape for aval in eqn.inputs)
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    whole = [n == s or i == axis for i, (n, s) in enumerate(zip(sizes, shape, strict=True))]
    count, rank = len(index_shape) - 1, len(eqn.outputs[0].shape)
    offsets = [i for i in range(rank) if not axis <= i < axis + count]
    if (
        axis < 0
        or not all(whole)
        or sizes[axis] != 1
        or numbers.collapsed_slice_dims != (axis,)
        or numbers.operand_batching_dims
        or list(numbers.offset_dims) != offsets
    ):
        raise eqn.refuse(f"a gather of {sizes} from {shape}")
    fill = _fill_value(eqn.outputs[0].dtype, eqn["fill_value"])
    index_type = eqn.inputs[1].dtype
    index = w.reshape(inputs[1], index_shape[:-1])
    if mode == GatherScatterMode.PROMISE_IN_BOUNDS:
        return [w.take(inputs[0], index, axis)]
    last = np.asarray(shape[axis] - 1, index_type)
    inside = w.apply("min", w.apply("max", index, np.zeros_like(last)), last)
    rows = w.take(inputs[0], inside, axis)
    if mode == GatherScatterMode.CLIP:
        return [rows]
    is_inside = w.apply("eq", index, inside)
    is_inside = w.reshape(is_inside, [*index_shape[:-1], *[1] * (rank - axis - count)])
    return [w.where(is_inside, rows, fill, eqn.outputs[0].dtype)]


def _fill_value(dtype: Any, fill: Any) -> np.ndarray:
    if fill is None:
        floating = np.issubdtype(dtype, np.floating)
        fill = np.nan if floating else np.iinfo(dtype).min
    return np.asarray(fill, dtype)


def _dynamic_slice(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    sizes, shape = eqn["slice_sizes"], eqn.inputs[0].shape
    start = w.starts(inputs[1:], [n - s for n, s in zip(shape, sizes, strict=True)])
    return [w.slice_at(inputs[0], start, sizes)]


def _dynamic_update_slice(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    x, update, *indices = inputs
    shape, sizes = (aval.shape for aval in eqn.inputs[:2])
    axes = [i for i, (a, b) in enumerate(zip(shape, sizes, strict=True)) if a != b]
    if not axes:
        return [update]
    if len(axes) > 1:
        raise eqn.refuse(f"an update of {sizes} in {shape}")
    start = w.starts(indices, [n - s for n, s in zip(shape, sizes, strict=True)])
    return [w.update_at(x, update, start, axes[0], shape, sizes[axes[0]])]


def _sorted(w: Any, x: Value, k: int, largest: bool, order: Sequence[int]) -> tuple[Value, Value]:
    """Returns the first k values and their indices along the axis that `order` puts last.

    Of equal values the one with the lower index comes first, as in a stable sort.
    """
    values, index = w.top_k(w.transpose(x, order), k, largest)
    return w.transpose(values, order), index


def _to_last(axis: int, rank: int) -> list[int]:
    """Returns the axes with `axis` and the last one exchanged: its own inverse."""
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    return order


def _top_k(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    order = _to_last(eqn["axis"], len(eqn.inputs[0].shape))
    values, index = _sorted(w, inputs[0], eqn["k"], largest=True, order=order)
    return [values, w.cast(w.transpose(index, order), eqn.outputs[1].dtype)]


def _sort(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    shape, axis = eqn.inputs[0].shape, eqn["dimension"]
    if eqn["num_keys"] != 1:
        raise eqn.refuse("a sort by several keys")
    order = _to_last(axis, len(shape))
    values, index = _sorted(w, inputs[0], shape[axis], largest=False, order=order)
    others = [w.take_along(w.transpose(x, order), index, len(shape) - 1) for x in inputs[1:]]
    return [values, *(w.transpose(x, order) for x in others)]


def _cond(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    index, *operands = inputs
    branches = eqn["branches"]

    def from_branch(first: int) -> list[Value]:
        """Returns the outputs of branch `index`, which is not before `first`."""

        def take() -> list[Value]:
            return walk(branches[first], operands, RULES, w)

        if first == len(branches) - 1:
            return take()
        # TFLite has no operation that chooses one of many.
        is_first = w.apply("eq", index, np.asarray(first, eqn.inputs[0].dtype))
        return w.choose(is_first, take, lambda: from_branch(first + 1), eqn.outputs)

    return from_branch(0)


def _while(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    num_test = eqn["cond_nconsts"]
    first_carried = num_test + eqn["body_nconsts"]
    test_program, body_program = eqn["cond_jaxpr"], eqn["body_jaxpr"]

    def test(state: Inputs) -> Value:
        return walk(test_program, [*inputs[:num_test], *state], RULES, w)[0]

    def body(_: Value, state: Inputs) -> tuple[list[Value], list[Value]]:
        return walk(body_program, [*inputs[num_test:first_carried], *state], RULES, w), []

    return w.loop(inputs[first_carried:], eqn.outputs, body, test=test)


def _scan(w: Any, eqn: Equation, inputs: Inputs) -> list[Value]:
    consts, carried, stacked = scan_inputs(eqn, inputs)
    program, length, num_carry = eqn["jaxpr"], eqn["length"], len(carried)

    def body(at: Value, state: Inputs) -> tuple[list[Value], list[Value]]:
        rows = [w.take(x, at, 0) for x in stacked]
        out = walk(program, [*consts, *state, *rows], RULES, w)
        return out[:num_carry], out[num_carry:]

    if length == 1:  # a batch of one image: no loop
        state, made = body(np.asarray(0, np.int64), carried)
        shapes = [aval.shape for aval in eqn.outputs[num_carry:]]
        return [*state, *(w.reshape(x, shape) for x, shape in zip(made, shapes, strict=True))]
    return w.loop(carried, eqn.outputs, body, length=length)


def scan_inputs(eqn: Equation, inputs: Inputs) -> tuple[list[Value], list[Value], list[Value]]:
    """Returns a scan's (constants, carried values, stacked rows).

    JAX 0.10 counts them in two parameters, JAX 0.12 has a tree of them.
    """
    if eqn["reverse"]:
        raise eqn.refuse("a scan from the end")
    if "ft_in" in eqn:
        consts, carried, rows = (list(part) for part in eqn["ft_in"].update(inputs).unpack())
        eqn["ft_out"]  # its number of carried values is that of the inputs
        return consts, carried, rows
    num_consts, num_carry = eqn["num_consts"], eqn["num_carry"]
    after = num_consts + num_carry
    return list(inputs[:num_consts]), list(inputs[num_consts:after]), list(inputs[after:])


# Rules of one line are written in the table.
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ("expand_dims", "reshape", "squeeze"),
        lambda w, eqn, inputs: [w.reshape(inputs[0], eqn.outputs[0].shape)],
    ),
    **dict.fromkeys(("copy", "stop_gradient"), lambda w, eqn, inputs: list(inputs)),
    **dict.fromkeys(
        ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"),
        lambda w, eqn, inputs: [w.reduce(eqn.name, inputs[0], [int(a) for a in eqn["axes"]])],
    ),
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": lambda w, eqn, inputs: [w.concat(inputs, eqn["dimension"])],
    "cond": _cond,
    "conv_general_dilated": _conv,
    "convert_element_type": lambda w, eqn, inputs: [w.cast(inputs[0], eqn["new_dtype"])],
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "integer_pow": lambda w, eqn, inputs: [
        w.apply("pow", inputs[0], np.asarray(eqn["y"], eqn.outputs[0].dtype))
    ],
    "iota": _iota,
    "pad": _pad,
    "rev": lambda w, eqn, inputs: [w.reverse(inputs[0], eqn["dimensions"], eqn.inputs[0].shape)],
    "scan": _scan,
    "shift_right_logical": _shift_right,
    "select_n": _select_n,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "stack": lambda w, eqn, inputs: [w.stack(inputs, eqn["axis"])],
    "top_k": _top_k,
    "transpose": lambda w, eqn, inputs: [w.transpose(inputs[0], eqn["permutation"])],
    "while": _while,
}
