"""A traced program as TensorFlow operations, for SavedModel and TFLite.

The array operations of `rules`, and loops and branches in the forms that TFLite has too;
they run while `tf.function` traces. JAX's own bridge, `jax2tf`, writes a StableHLO program
into the model instead, which TFLite cannot run and TensorFlow reads only if it is as new as
JAX.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.jaxpr import Value, is_constant

# Primitives whose function has another name than theirs.
_FUNCTIONS = {
    "and": "logical_and",
    "ceil": "math.ceil",
    "eq": "equal",
    "erf": "math.erf",
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
    "rsqrt": "math.rsqrt",
    "sub": "subtract",
    "reduce_and": "reduce_all",
    "reduce_or": "reduce_any",
}


def tensorflow() -> Any:
    """Returns the module, which brings 1.5 GB: the extra "export-tf"."""
    return importlib.import_module("tensorflow")


class TensorFlowGraph:
    """TensorFlow's functions as the operations of `rules`, for one format's name.

    `onnx_graph.Graph` says what each operation returns.
    """

    def __init__(self, file_format: str):
        self.format, self.tf = file_format, tensorflow()
        self._kernels: dict[tuple, tuple[Any, Any, Any]] = {}
        self.reshape = self.tf.reshape
        self.expand = self.tf.broadcast_to
        self.concat = self.tf.concat
        self.stack = self.tf.stack
        self.split = self.tf.split
        self.slice = self.tf.strided_slice
        self.matmul = self.tf.matmul
        self.slice_at = self.tf.slice

    def tensors(self, values: Sequence[Value], avals: Sequence[Any]) -> list[Any]:
        """Returns values as tensors with the static shapes of a jaxpr's types."""
        tensors = map(self.tf.convert_to_tensor, values)
        return [self.tf.ensure_shape(x, a.shape) for x, a in zip(tensors, avals, strict=True)]

    def apply(self, name: str, *inputs: Value) -> Any:
        x, *others = (self.tf.convert_to_tensor(value) for value in inputs)
        if name in ("div", "rem"):
            return (self._divide if name == "div" else self._remainder)(x, *others)
        function: Any = self.tf
        for part in _FUNCTIONS.get(name, name).split("."):
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
        return self.tf.cast(value, self.tf.as_dtype(np.dtype(dtype)))

    def where(self, which: Value, yes: Value, no: Value, dtype: Any) -> Any:
        return self.tf.where(which, yes, no)

    def transpose(self, value: Value, order: Sequence[Any]) -> Any:
        order = [int(i) for i in order]
        return value if order == sorted(order) else self.tf.transpose(value, order)

    def reverse(self, value: Value, axes: Sequence[int], shape: Sequence[int]) -> Any:
        return self.tf.reverse(value, list(axes))

    def pad(self, value: Value, pads: Sequence[tuple[int, int]], fill: Value, aval: Any) -> Any:
        sizes = zip(pads, aval.shape, strict=True)
        cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in sizes)
        kept = self.tf.convert_to_tensor(value)[cut]
        more = [[max(a, 0), max(b, 0)] for a, b in pads]
        return self.tf.pad(kept, more, constant_values=fill) if np.any(more) else kept

    def reduce(self, name: str, value: Value, axes: Sequence[int]) -> Any:
        return getattr(self.tf, _FUNCTIONS.get(name, name))(value, list(axes))

    def argmax(self, value: Value, axis: int, dtype: Any) -> Any:
        return self.tf.argmax(value, axis, self.tf.as_dtype(np.dtype(dtype)))

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
        return self.tf.gather(value, index, axis=axis)

    def take_along(self, value: Value, index: Value, axis: int) -> Any:
        return self.tf.gather(value, index, axis=axis, batch_dims=axis)

    def top_k(self, value: Value, k: int, largest: bool) -> tuple[Any, Any]:
        if largest:
            return self.tf.math.top_k(value, k)
        _, index = self.tf.math.top_k(-value, k)
        return self.take_along(value, index, len(value.shape) - 1), index

    def starts(self, indices: Sequence[Value], last: Sequence[int]) -> Any:
        start = self.tf.stack([self.tf.cast(i, self.tf.int32) for i in indices])
        return self.tf.minimum(self.tf.maximum(start, 0), np.array(last, np.int32))

    def update_at(
        self, value: Value, update: Value, start: Any, axis: int, shape: Any, size: int
    ) -> Any:
        place = self.tf.range(shape[axis]) - start[axis]
        inside = self.tf.clip_by_value(place, 0, size - 1)
        rows = self.tf.gather(update, inside, axis=axis)
        replaced = self.tf.logical_and(place >= 0, place < size)
        replaced = self.tf.reshape(replaced, [-1] + [1] * (len(shape) - axis - 1))
        return self.tf.where(replaced, rows, value)

    def choose(
        self, which: Value, yes: Callable[[], Any], no: Callable[[], Any], avals: Sequence[Any]
    ) -> list[Any]:
        return self.tf.cond(
            which, lambda: self.tensors(yes(), avals), lambda: self.tensors(no(), avals)
        )

    def loop(
        self,
        carried: Sequence[Value],
        avals: Sequence[Any],
        body: Callable[[Value, Sequence[Value]], tuple[Sequence[Value], Sequence[Value]]],
        *,
        length: int | None = None,
        test: Callable[[Sequence[Value]], Value] | None = None,
    ) -> list[Any]:
        carried_avals, row_avals = avals[: len(carried)], avals[len(carried) :]
        arrays = [
            self.tf.TensorArray(self.tf.as_dtype(a.dtype), length, element_shape=a.shape[1:])
            for a in row_avals
        ]

        def is_going(at: Any, state: list[Any], arrays: list[Any]) -> Any:
            return test(state) if test else at < length

        def turn(at: Any, state: list[Any], arrays: list[Any]) -> tuple[Any, ...]:
            after, rows = body(at, state)
            arrays = [a.write(at, x) for a, x in zip(arrays, rows, strict=True)]
            return at + 1, self.tensors(after, carried_avals), arrays

        start = (self.tf.constant(0), self.tensors(carried, carried_avals), arrays)
        _, state, arrays = self.tf.while_loop(is_going, turn, start)
        return [*state, *self.tensors([a.stack() for a in arrays], row_avals)]
