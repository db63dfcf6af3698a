"""NumPy arrays inside pickles: what of `numpy` a weights file may name."""

import math
import re
from typing import Any

import numpy as np

from solov2_jax.weights.formats.pickles import (
    Buildable,
    Builder,
    Machine,
    Marker,
    UnsafePickle,
    check_key,
)


def _raw(value: Any, machine: Machine) -> bytes:
    """Returns an array's bytes; Python 2 pickled them as a latin-1 string."""
    if isinstance(value, str):
        machine.charge(len(value))
        return value.encode("latin-1")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise UnsafePickle("array data that is not bytes: refused")


class DType(Buildable):
    """A numpy.dtype of plain numbers."""

    def __init__(self, code: Any):
        if isinstance(code, bytes):
            code = code.decode("ascii")
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[fiub][1248]", code):
            raise UnsafePickle(f"arrays of type {str(code)[:20]!r} are no numbers: refused")
        self.value = np.dtype(code)

    def build(self, state: Any, machine: Machine) -> None:
        """Takes (version, byte order, ...)."""
        order = state[1]
        order = order.decode() if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or any(state[2:5]):
            raise UnsafePickle("a structured array type: refused")
        self.value = self.value.newbyteorder(order)


def _as_array(shape: Any, dtype: Any, fortran: Any, data: bytes) -> np.ndarray:
    if not isinstance(dtype, DType):
        raise UnsafePickle("an array without a number type: refused")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise UnsafePickle("an array with a malformed shape: refused")
    need = math.prod(shape) * dtype.value.itemsize
    if need != len(data):
        raise UnsafePickle(
            f"an array {tuple(shape)} of {dtype.value} needs {need} bytes, the file has {len(data)}"
        )
    array = np.frombuffer(data, dtype.value)
    return array.reshape(shape, order="F" if fortran else "C")


class Array(Buildable):
    """A numpy.ndarray; `value` is None until its state was read."""

    value: np.ndarray | None = None

    def build(self, state: Any, machine: Machine) -> None:
        """Takes (version, shape, dtype, is_fortran, data)."""
        _, shape, dtype, fortran, data = state
        self.value = _as_array(shape, dtype, fortran, _raw(data, machine))


def _reconstruct(machine: Machine, args: tuple) -> Array:
    if not isinstance(args[0], Marker) or args[0].name != "numpy.ndarray":
        raise UnsafePickle("an array of another class: refused")
    return Array()


def _from_buffer(machine: Machine, args: tuple) -> Array:
    data, dtype, shape, order = args
    array = Array()
    array.value = _as_array(shape, dtype, order == "F", _raw(data, machine))
    return array


def _scalar(machine: Machine, args: tuple) -> Any:
    return _as_array((), args[0], False, _raw(args[1], machine)).item()


def _encode(machine: Machine, args: tuple) -> bytes:
    text, encoding = args
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise UnsafePickle(f"text encoded as {str(encoding)[:20]!r}: refused")
    machine.charge(len(text))
    return text.encode("latin-1")


def _list(machine: Machine, args: tuple) -> list:
    items = args[0] if args else ()
    if len(args) > 1 or not isinstance(items, list | tuple | set):
        raise UnsafePickle("a malformed list")
    machine.charge(8 * len(items))
    return list(items)


def _set(machine: Machine, args: tuple) -> set:
    items = _list(machine, args)
    for item in items:
        check_key(item)
    return set(items)


def _dict(machine: Machine, args: tuple) -> dict:
    if args and isinstance(args[0], dict):
        args = (list(args[0].items()),)
    result = {}
    for key, value in _list(machine, args):
        check_key(key)
        if key in result:
            raise UnsafePickle(f"duplicate key {str(key)[:80]!r}")
        result[key] = value
    return result


def _default_dict(machine: Machine, args: tuple) -> dict:
    return {}  # its factory, a marker, is never called


SYMBOLS: dict[str, Builder | Marker] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "numpy.dtype": lambda machine, args: DType(args[0]),
    "numpy.ndarray": Marker("numpy.ndarray"),
}
for _module in ("builtins", "__builtin__"):
    SYMBOLS[f"{_module}.set"] = _set
    SYMBOLS[f"{_module}.frozenset"] = _set
    SYMBOLS[f"{_module}.list"] = _list
    SYMBOLS[f"{_module}.dict"] = _dict
    SYMBOLS[f"{_module}.bytearray"] = lambda machine, args: _raw(args[0] if args else b"", machine)
for _module in ("numpy.core", "numpy._core"):
    SYMBOLS[f"{_module}.multiarray._reconstruct"] = _reconstruct
    SYMBOLS[f"{_module}.multiarray.scalar"] = _scalar
    SYMBOLS[f"{_module}.numeric._frombuffer"] = _from_buffer
