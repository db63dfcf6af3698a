"""An ONNX graph in the making: nodes, initializers, and graphs inside nodes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.walk import Value, is_constant

# Opset 18: reductions take their axes as an input. Every runtime since 2023 reads it.
OPSET = 18
IR_VERSION = 9
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

    def reshape(self, value: Value, shape: Sequence[int]) -> str:
        """Returns the value in another shape."""
        return self.add("Reshape", value, self.ints(shape))

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

    def make(self, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Returns a graph inside a node."""
        return self.onnx.helper.make_graph(nodes, self._new("graph"), inputs, outputs)

    def new(self) -> str:
        """Returns a name that nothing has yet."""
        return self._new("value")

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
