"""A traced program as TensorFlow operations, for SavedModel and TFLite.

The array operations of `rules`, and loops and branches in the forms that TFLite has too;
they run while `tf.function` traces. JAX's own bridge, `jax2tf`, writes a StableHLO program
into the model instead, which TFLite cannot run and TensorFlow reads only if it is as new as
JAX.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.jaxpr import Equation, Rule, Value, is_constant, walk
from solov2_jax.tools.export.rules import ARRAY_RULES, scan_inputs, while_inputs

# Primitives that are one function.
_FUNCTIONS = {
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
_REDUCTIONS = {
    "reduce_and": "reduce_all",
    "reduce_max": "reduce_max",
    "reduce_min": "reduce_min",
    "reduce_or": "reduce_any",
    "reduce_sum": "reduce_sum",
}


def tensorflow() -> Any:
    """Returns the module, which brings 1.5 GB: the extra "export-tf"."""
    return importlib.import_module("tensorflow")


class TensorFlowGraph:
    """TensorFlow's functions as the operations of `rules`, for one format's name."""

    def __init__(self, file_format: str):
        self.format, self.tf = file_format, tensorflow()
        self._kernels: dict[tuple, tuple[Any, Any, Any]] = {}

    def tensors(self, values: Sequence[Value], avals: Sequence[Any]) -> list[Any]:
        """Returns values as tensors with the static shapes of a jaxpr's types."""
        tensors = map(self.tf.convert_to_tensor, values)
        return [self.tf.ensure_shape(x, a.shape) for x, a in zip(tensors, avals, strict=True)]

    def apply(self, name: str, *inputs: Value) -> Any:
        """Returns an elementwise primitive of the inputs."""
        x, *others = (self.tf.convert_to_tensor(value) for value in inputs)
        if name in ("div", "rem"):
            return (self._divide if name == "div" else self._remainder)(x, *others)
        function: Any = self.tf
        for part in _FUNCTIONS[name].split("."):
            function = getattr(function, part)
        return function(x, *others)

    def _divide(self, x: Any, y: Any) -> Any:
        if x.dtype.is_floating:
            return self.tf.divide(x, y)
        # Towards zero, as in C; TFLite has no truncatediv of this name.
        return self.tf.raw_ops.Div(x=x, y=y)

    def _remainder(self, x: Any, y: Any) -> Any:
        if x.dtype.is_floating:
            return self.tf.math.floormod(self.tf.abs(x), self.tf.abs(y)) * self.tf.sign(x)
        return x - self._divide(x, y) * y

    def cast(self, value: Value, dtype: Any) -> Any:
        """Returns the value as another type."""
        return self.tf.cast(value, self.tf.as_dtype(np.dtype(dtype)))

    def where(self, which: Value, yes: Value, no: Value, dtype: Any) -> Any:
        """Returns `yes` where the condition holds, else `no`."""
        return self.tf.where(which, yes, no)

    def transpose(self, value: Value, order: Sequence[Any]) -> Any:
        """Returns the value with its axes in another order."""
        order = [int(i) for i in order]
        return value if order == sorted(order) else self.tf.transpose(value, order)

    def reshape(self, value: Value, shape: Sequence[int]) -> Any:
        """Returns the value in another shape."""
        return self.tf.reshape(value, shape)

    def expand(self, value: Value, shape: Sequence[int]) -> Any:
        """Returns the value repeated along axes of size 1."""
        return self.tf.broadcast_to(value, shape)

    def concat(self, values: Sequence[Value], axis: int) -> Any:
        """Returns values one behind the other."""
        return self.tf.concat(list(values), axis)

    def stack(self, values: Sequence[Value], axis: int) -> Any:
        """Returns values along a new axis."""
        return self.tf.stack(list(values), axis)

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> Any:
        """Returns parts of these sizes."""
        return self.tf.split(value, list(sizes), axis)

    def slice(self, value: Value, starts: Any, ends: Any, strides: Any) -> Any:
        """Returns a part of every axis."""
        return self.tf.strided_slice(value, starts, ends, strides)

    def reverse(self, value: Value, axes: Sequence[int], shape: Sequence[int]) -> Any:
        """Returns the value with axes from the end."""
        return self.tf.reverse(value, list(axes))

    def pad(self, value: Value, pads: Sequence[tuple[int, int]], fill: Value, aval: Any) -> Any:
        """Returns the value with more (or, if negative, fewer) elements around it."""
        sizes = zip(pads, aval.shape, strict=True)
        cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in sizes)
        kept = self.tf.convert_to_tensor(value)[cut]
        more = [[max(a, 0), max(b, 0)] for a, b in pads]
        return self.tf.pad(kept, more, constant_values=fill) if np.any(more) else kept

    def reduce(self, name: str, value: Value, axes: Sequence[int]) -> Any:
        """Returns a reduction."""
        return getattr(self.tf, _REDUCTIONS[name])(value, list(axes))

    def argmax(self, value: Value, axis: int, dtype: Any) -> Any:
        """Returns the index of the first maximum."""
        return self.tf.argmax(value, axis, self.tf.as_dtype(np.dtype(dtype)))

    def matmul(self, a: Value, b: Value) -> Any:
        """Returns the product of the last two axes."""
        return self.tf.matmul(a, b)

    def conv(
        self,
        value: Value,
        kernel: Value,
        *,
        layouts: Any,
        strides: Sequence[int],
        dilations: Sequence[int],
        pads: Sequence[tuple[int, int]],
        groups: int,
    ) -> Any:
        """Returns a convolution, in the layouts of JAX's dimension numbers."""
        source, weights, out = layouts
        x = self.transpose(value, [source[0], *source[2:], source[1]])
        turned = self._kernel(kernel, [*weights[2:], weights[1], weights[0]])
        if np.any(pads):
            x = self.tf.pad(x, [(0, 0), *pads, (0, 0)])
        del groups  # told by the kernel's shape
        y = self.tf.nn.conv2d(x, turned, list(strides), "VALID", dilations=list(dilations))
        return self.transpose(y, np.argsort([out[0], *out[2:], out[1]]).tolist())

    def _kernel(self, value: Value, order: Sequence[int]) -> Any:
        """Returns a kernel in another layout; once where several levels share it."""
        if not is_constant(value):
            return self.transpose(value, order)
        graph = self.tf.compat.v1.get_default_graph()
        key = (id(value), id(graph), *order)
        if key not in self._kernels:
            turned = self.tf.constant(np.transpose(value, order))
            self._kernels[key] = (turned, value, graph)
        return self._kernels[key][0]

    def take(self, value: Value, index: Value, axis: int) -> Any:
        """Returns rows by their numbers, which are inside."""
        return self.tf.gather(value, index, axis=axis)

    def take_along(self, value: Value, index: Value, axis: int) -> Any:
        """Returns elements by their numbers along the last axis, anew in each row."""
        return self.tf.gather(value, index, axis=axis, batch_dims=axis)

    def top_k(self, value: Value, k: int, largest: bool) -> tuple[Any, Any]:
        """Returns the first k values along the last axis, sorted, and their indices."""
        if largest:
            return self.tf.math.top_k(value, k)
        _, index = self.tf.math.top_k(-value, k)
        return self.take_along(value, index, len(value.shape) - 1), index

    def starts(self, indices: Sequence[Value], last: Sequence[int]) -> Any:
        """Returns int32 [rank]: where a slice starts, moved so that it fits."""
        start = self.tf.stack([self.tf.cast(i, self.tf.int32) for i in indices])
        return self.tf.minimum(self.tf.maximum(start, 0), np.array(last, np.int32))

    def slice_at(self, value: Value, start: Any, sizes: Sequence[int]) -> Any:
        """Returns a part of these sizes from a computed start."""
        return self.tf.slice(value, start, sizes)

    def update_at(
        self, value: Value, update: Value, start: Any, axis: int, shape: Any, size: int
    ) -> Any:
        """Returns the value with `size` rows of an axis replaced from a computed start."""
        place = self.tf.range(shape[axis]) - start[axis]
        inside = self.tf.clip_by_value(place, 0, size - 1)
        rows = self.tf.gather(update, inside, axis=axis)
        replaced = self.tf.logical_and(place >= 0, place < size)
        replaced = self.tf.reshape(replaced, [-1] + [1] * (len(shape) - axis - 1))
        return self.tf.where(replaced, rows, value)


def _cond(w: TensorFlowGraph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    index, *operands = inputs
    branches = eqn["branches"]

    def choose(first: int) -> list[Any]:
        def take() -> list[Any]:
            return w.tensors(walk(branches[first], operands, RULES, w), eqn.outputs)

        if first == len(branches) - 1:
            return take()
        # TFLite has no operation that chooses one of many.
        return w.tf.cond(w.tf.equal(index, first), take, lambda: choose(first + 1))

    return list(choose(0))


def _while(w: TensorFlowGraph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    test_consts, body_consts, carried = while_inputs(eqn, inputs)
    test_program, body_program = eqn["cond_jaxpr"], eqn["body_jaxpr"]

    def test(*state: Any) -> Any:
        return walk(test_program, [*test_consts, *state], RULES, w)[0]

    def body(*state: Any) -> list[Any]:
        return w.tensors(walk(body_program, [*body_consts, *state], RULES, w), eqn.outputs)

    return list(w.tf.while_loop(test, body, w.tensors(carried, eqn.outputs)))


def _scan(w: TensorFlowGraph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    consts, carried, stacked = scan_inputs(eqn, inputs)
    program, length, num_carry = eqn["jaxpr"], eqn["length"], len(carried)
    carries, results = eqn.outputs[:num_carry], eqn.outputs[num_carry:]
    rows_of = [w.tf.convert_to_tensor(x) for x in stacked]

    def turn(at: Any, state: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        rows = [w.tf.gather(x, at) for x in rows_of]
        out = walk(program, [*consts, *state, *rows], RULES, w)
        return w.tensors(out[:num_carry], carries), out[num_carry:]

    if length == 1:  # a batch of one image: no loop
        state, made = turn(0, carried)
        return [*state, *(w.tf.expand_dims(x, 0) for x in made)]
    arrays = [
        w.tf.TensorArray(w.tf.as_dtype(aval.dtype), length, element_shape=aval.shape[1:])
        for aval in results
    ]

    def body(at: Any, state: list[Any], arrays: list[Any]) -> tuple[Any, ...]:
        state, made = turn(at, state)
        arrays = [a.write(at, x) for a, x in zip(arrays, made, strict=True)]
        return at + 1, state, arrays

    start = (w.tf.constant(0), w.tensors(carried, carries), arrays)
    _, state, arrays = w.tf.while_loop(lambda at, *_: at < length, body, start)
    return [*state, *w.tensors([a.stack() for a in arrays], results)]


RULES: dict[str, Rule] = {**ARRAY_RULES, "cond": _cond, "scan": _scan, "while": _while}
