"""An ONNX graph in the making: nodes, initializers, and the array operations of `rules`.

What an operator means is in ONNX's own documentation.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.jaxpr import Value, is_constant

# Opset 18: reductions take their axes as an input. Every runtime since 2023 reads it.
OPSET = 18
IR_VERSION = 9
# Primitives whose operator has another name than theirs.
_OPERATORS = {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "logistic": "Sigmoid",
    "lt": "Less",
}
_REDUCTIONS = {
    "reduce_and": "ReduceMin",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_or": "ReduceMax",
    "reduce_prod": "ReduceProd",
    "reduce_sum": "ReduceSum",
}
# Smaller initializers are compared by value, so that each shape is stored once.
_SHARED_BYTES = 1024


class Graph:
    """Writes nodes; a value is a name in the graph, or a constant not yet stored.

    Args:
      half_weights: store large float32 constants as float16; a Cast follows them.
    """

    format = "onnx"

    def __init__(self, half_weights: bool = False):
        import onnx  # the extra "export"

        self.onnx = onnx
        self.half_weights = half_weights
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.casts: list[Any] = []  # of weights, before all other nodes
        self._shared: dict[tuple, str] = {}
        self._large: dict[int, tuple[np.ndarray, str]] = {}
        self._turned: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self._count = 0

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Returns the name of the only output of a new node."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, outputs: int, *inputs: Value, **attributes: Any) -> list[str]:
        """Returns the names of a new node's outputs."""
        names = [self.name(x) for x in inputs]
        made = [self._new(op) for _ in range(outputs)]
        node = self.onnx.helper.make_node(op, names, made, name=made[0], **attributes)
        self.nodes.append(node)
        return made

    def name(self, value: Value) -> str:
        """Returns a value's name; a constant is stored for that."""
        if not is_constant(value):
            return value
        value = np.asarray(value)
        if value.nbytes > _SHARED_BYTES:
            kept = self._large.get(id(value))
            if kept is None:
                kept = self._large[id(value)] = (value, self._store_large(value))
            return kept[1]
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self._shared:
            self._shared[key] = self._store(value)
        return self._shared[key]

    def ints(self, values: Sequence[Any]) -> np.ndarray:
        """Returns int64 [n], the type of shapes, axes and indices."""
        return np.array([int(v) for v in values], np.int64)

    def cast(self, value: Value, dtype: Any) -> str:
        """Returns the value as another type."""
        return self.add("Cast", value, to=self.dtype(dtype))

    def dtype(self, dtype: Any) -> int:
        """Returns ONNX's number of a numpy type."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def apply(self, name: str, *inputs: Value) -> str:
        """Returns an elementwise primitive of the inputs."""
        if name == "ne":
            return self.add("Not", self.add("Equal", *inputs))
        if name == "rem":
            return self.add("Mod", *inputs, fmod=1)
        if name == "rsqrt":
            return self.add("Reciprocal", self.add("Sqrt", *inputs))
        if name == "square":
            return self.add("Mul", inputs[0], inputs[0])
        return self.add(_OPERATORS.get(name, name.capitalize()), *inputs)

    def where(self, which: Value, yes: Value, no: Value, dtype: Any) -> str:
        """Returns `yes` where the condition holds, else `no`."""
        if dtype != np.bool_:
            return self.add("Where", which, yes, no)
        inverse = self.add("And", self.add("Not", which), no)
        return self.add("Or", self.add("And", which, yes), inverse)

    def transpose(self, value: Value, order: Sequence[Any]) -> Value:
        """Returns the value with its axes in another order; a constant at once."""
        order = [int(i) for i in order]
        if order == sorted(order):
            return value
        if not is_constant(value):
            return self.add("Transpose", value, perm=order)
        # Once for a kernel that several levels share.
        key = (id(value), *order)
        if key not in self._turned:
            turned = np.ascontiguousarray(np.transpose(value, order))
            self._turned[key] = (value, turned)
        return self._turned[key][1]

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Returns the value in another shape; a constant at once."""
        if is_constant(value):
            return np.ascontiguousarray(np.reshape(value, shape))
        return self.add("Reshape", value, self.ints(shape))

    def expand(self, value: Value, shape: Sequence[int]) -> str:
        """Returns the value repeated along axes of size 1."""
        return self.add("Expand", value, self.ints(shape))

    def concat(self, values: Sequence[Value], axis: int) -> str:
        """Returns values one behind the other."""
        return self.add("Concat", *values, axis=axis)

    def stack(self, values: Sequence[Value], axis: int) -> str:
        """Returns values along a new axis."""
        rows = [self.add("Unsqueeze", x, self.ints([axis])) for x in values]
        return self.concat(rows, axis)

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> list[str]:
        """Returns parts of these sizes."""
        return self.add_many("Split", len(sizes), value, self.ints(sizes), axis=axis)

    def slice(self, value: Value, starts: Any, ends: Any, strides: Any) -> str:
        """Returns a part of every axis."""
        axes = self.ints(range(len(starts)))
        bounds = self.ints(starts), self.ints(ends)
        return self.add("Slice", value, bounds[0], bounds[1], axes, self.ints(strides))

    def reverse(self, value: Value, axes: Sequence[int], shape: Sequence[int]) -> Value:
        """Returns the value with axes from the end."""
        for axis in axes:
            backwards = self.ints(range(shape[axis] - 1, -1, -1))
            value = self.add("Gather", value, backwards, axis=axis)
        return value

    def pad(self, value: Value, pads: Sequence[tuple[int, int]], fill: Value, aval: Any) -> str:
        """Returns the value with more (or, if negative, fewer) elements around it."""
        sizes = self.ints([low for low, _ in pads] + [high for _, high in pads])
        if aval.dtype == np.bool_:  # runtimes pad few types besides numbers
            value, fill = self.cast(value, np.int32), self.cast(fill, np.int32)
            return self.cast(self.add("Pad", value, sizes, fill), np.bool_)
        return self.add("Pad", value, sizes, fill)

    def reduce(self, name: str, value: Value, axes: Sequence[int]) -> str:
        """Returns a reduction; booleans go through integers."""
        logical = name in ("reduce_and", "reduce_or")
        value = self.cast(value, np.int32) if logical else value
        reduced = self.add(_REDUCTIONS[name], value, self.ints(axes), keepdims=0)
        return self.cast(reduced, np.bool_) if logical else reduced

    def argmax(self, value: Value, axis: int, dtype: Any) -> str:
        """Returns the index of the first maximum."""
        return self.cast(self.add("ArgMax", value, axis=axis, keepdims=0), dtype)

    def matmul(self, a: Value, b: Value) -> str:
        """Returns the product of the last two axes."""
        return self.add("MatMul", a, b)

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
    ) -> Value:
        """Returns a convolution, in the layouts of JAX's dimension numbers."""
        source, weights, out = layouts
        y = self.add(
            "Conv",
            self.transpose(value, source),
            self.transpose(kernel, weights),
            strides=strides,
            dilations=dilations,
            group=groups,
            pads=[low for low, _ in pads] + [high for _, high in pads],
        )
        return self.transpose(y, np.argsort(out).tolist())

    def take(self, value: Value, index: Value, axis: int) -> str:
        """Returns rows by their numbers, which are inside."""
        return self.add("Gather", value, index, axis=axis)

    def take_along(self, value: Value, index: Value, axis: int) -> str:
        """Returns elements by their numbers, anew in each row."""
        return self.add("GatherElements", value, index, axis=axis)

    def top_k(self, value: Value, k: int, largest: bool) -> list[str]:
        """Returns the first k values along the last axis, sorted, and their indices."""
        count = self.ints([k])
        return self.add_many("TopK", 2, value, count, axis=-1, largest=int(largest), sorted=1)

    def starts(self, indices: Sequence[Value], last: Sequence[int]) -> str:
        """Returns int64 [rank]: where a slice starts, moved so that it fits."""
        rows = [self.reshape(self.cast(x, np.int64), [1]) for x in indices]
        start = self.apply("max", self.concat(rows, 0), self.ints([0] * len(last)))
        return self.apply("min", start, self.ints(last))

    def slice_at(self, value: Value, start: Value, sizes: Sequence[int]) -> Value:
        """Returns a part of these sizes from a computed start."""
        end = self.add("Add", start, self.ints(sizes))
        axes = self.ints(range(len(sizes)))
        return self.reshape(self.add("Slice", value, start, end, axes), sizes)

    def update_at(
        self, value: Value, update: Value, start: Value, axis: int, shape: Any, size: int
    ) -> Value:
        """Returns the value with `size` rows of an axis replaced from a computed start."""
        first = self.add("Gather", start, self.ints([axis]), axis=0)
        end = self.add("Add", first, self.ints([size]))
        along, top = self.ints([axis]), self.ints([shape[axis]])
        before = self.add("Slice", value, self.ints([0]), first, along)
        after = self.add("Slice", value, end, top, along)
        return self.reshape(self.concat([before, update, after], axis), shape)

    def info(self, name: str, aval: Any) -> Any:
        """Returns a graph's input or output of a jaxpr value's type and shape."""
        dtype = self.dtype(aval.dtype)
        return self.onnx.helper.make_tensor_value_info(name, dtype, aval.shape)

    @contextlib.contextmanager
    def inner(self) -> Iterator[list[Any]]:
        """Collects the nodes of a graph inside a node; it sees the names outside."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def output(self, value: Value) -> str:
        """Returns a name that is new in this graph: an output has to be."""
        return self.add("Identity", value)

    def choose(
        self,
        which: Value,
        yes: Callable[[], Sequence[Value]],
        no: Callable[[], Sequence[Value]],
        avals: Sequence[Any],
    ) -> list[str]:
        """Returns what `yes` makes where the condition holds, else what `no` makes.

        Args:
          avals: types and shapes of the values.
        """

        def graph(make: Callable[[], Sequence[Value]]) -> Any:
            with self.inner() as nodes:
                names = [self.output(x) for x in make()]
            return self._inner_graph(nodes, [], self.infos(names, avals))

        branches = {"then_branch": graph(yes), "else_branch": graph(no)}
        return self.add_many("If", len(avals), which, **branches)

    def loop(
        self,
        carried: Sequence[Value],
        avals: Sequence[Any],
        body: Callable[[Value, Sequence[Value]], tuple[Sequence[Value], Sequence[Value]]],
        *,
        length: int | None = None,
        test: Callable[[Sequence[Value]], Value] | None = None,
    ) -> list[str]:
        """Returns what a loop carries at its end, and the rows that its turns make.

        Args:
          avals: types and shapes of what is returned.
          body: (number of the turn, carried) -> (carried, a row of each).
          length: of turns; without it `test(carried)` says whether there is a next one.
        """
        at, going = self._new("value"), self._new("value")
        names = [self._new("value") for _ in carried]
        first = test(carried) if test else np.asarray(True)
        with self.inner() as nodes:
            state, rows = body(at, names)
            again = self.output(test(state) if test else np.asarray(True))
            state_names = [self.output(x) for x in state]
            row_names = [self.output(x) for x in rows]
        make_info, types = self.onnx.helper.make_tensor_value_info, self.onnx.TensorProto
        carried_avals, row_avals = avals[: len(carried)], avals[len(carried) :]
        inputs = [make_info(at, types.INT64, []), make_info(going, types.BOOL, [])]
        outputs = [make_info(again, types.BOOL, []), *self.infos(state_names, carried_avals)]
        outputs += [
            make_info(name, self.dtype(aval.dtype), aval.shape[1:])
            for name, aval in zip(row_names, row_avals, strict=True)
        ]
        graph = self._inner_graph(nodes, [*inputs, *self.infos(names, carried_avals)], outputs)
        limit = np.asarray(np.iinfo(np.int64).max if length is None else length, np.int64)
        return self.add_many("Loop", len(avals), limit, first, *carried, body=graph)

    def infos(self, names: Sequence[str], avals: Sequence[Any]) -> list[Any]:
        return [self.info(name, aval) for name, aval in zip(names, avals, strict=True)]

    def _inner_graph(self, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Any) -> Any:
        return self.onnx.helper.make_graph(nodes, self._new("graph"), inputs, outputs)

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"

    def _store(self, value: np.ndarray) -> str:
        name = self._new("constant")
        tensor = self.onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        self.initializers.append(tensor)
        return name

    def _store_large(self, value: np.ndarray) -> str:
        if not (self.half_weights and value.dtype == np.float32 and value.ndim == 4):
            return self._store(value)
        made = self._new("weight")
        to = self.dtype(np.float32)
        half = self._store(value.astype(np.float16))
        cast = self.onnx.helper.make_node("Cast", [half], [made], name=made, to=to)
        self.casts.append(cast)
        return made
