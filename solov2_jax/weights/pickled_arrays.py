"""NumPy's arrays and plain containers inside pickles: what a weights file may name."""

import math
import re
from typing import Any

import numpy as np

from solov2_jax.weights.array_files import WeightsError
from solov2_jax.weights.pickles import (
    AllowedGlobal,
    Builder,
    RestrictedUnpickler,
    Stateful,
    as_count,
    as_key,
    as_text,
    fill_dict,
)

MAX_RANK = 64  # axes of an array, numpy's own limit


def _raw(value: Any, unpickler: RestrictedUnpickler) -> bytes:
    """Returns an array's bytes; Python 2 pickled them as a latin-1 string."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str | bytearray):
        raise WeightsError("array data that is not bytes: refused")
    unpickler.charge(len(value))
    return value.encode("latin-1") if isinstance(value, str) else bytes(value)


class DType(Stateful):
    """A numpy.dtype of plain numbers."""

    def __init__(self, code: Any):
        code = as_text(code)
        if not re.fullmatch(r"[<>|=]?[fiub][1248]", code):
            raise WeightsError(f"arrays of type {code[:20]!r} are no numbers: refused")
        self.value = np.dtype(code)

    def set_state(self, state: Any, unpickler: RestrictedUnpickler) -> None:
        """Takes (version, byte order, ...)."""
        order = as_text(state[1])
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise WeightsError("a structured array type: refused")
        self.value = self.value.newbyteorder(order)


class PickledArray(Stateful):
    """A numpy.ndarray; `value` is None until its state was read."""

    value: np.ndarray | None = None

    def set_state(self, state: Any, unpickler: RestrictedUnpickler) -> None:
        """Takes (version, shape, dtype, is_fortran, data)."""
        _, shape, dtype, fortran, data = state
        self.value = _as_array(shape, dtype, bool(fortran), _raw(data, unpickler), unpickler)


def _as_array(
    shape: Any, dtype: Any, fortran: bool, data: bytes, unpickler: RestrictedUnpickler
) -> np.ndarray:
    if not isinstance(dtype, DType):
        raise WeightsError("an array without a number type: refused")
    if not isinstance(shape, tuple) or len(shape) > MAX_RANK:
        raise WeightsError("an array with a malformed shape: refused")
    need = math.prod(map(as_count, shape)) * dtype.value.itemsize
    if need != len(data):
        raise WeightsError(
            f"an array {shape} of {dtype.value} needs {need} bytes, the file has {len(data)}"
        )
    unpickler.charge(need)  # several arrays may have the same bytes, and are copied later
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def _reconstruct(unpickler: RestrictedUnpickler, args: tuple) -> PickledArray:
    if not isinstance(args[0], AllowedGlobal) or args[0].name != "numpy.ndarray":
        raise WeightsError("an array of another class: refused")
    return PickledArray()


def _from_buffer(unpickler: RestrictedUnpickler, args: tuple) -> PickledArray:
    data, dtype, shape, order = args[:4]
    if as_text(order) not in ("C", "F"):
        raise WeightsError("an array in another order than C or Fortran: refused")
    array = PickledArray()
    array.value = _as_array(shape, dtype, order == "F", _raw(data, unpickler), unpickler)
    return array


def _scalar(unpickler: RestrictedUnpickler, args: tuple) -> Any:
    data = _raw(args[1], unpickler)
    return _as_array((), args[0], False, data, unpickler).item()


def _encode(unpickler: RestrictedUnpickler, args: tuple) -> bytes:
    text, encoding = args
    if as_text(encoding) not in ("latin1", "latin-1") or not isinstance(text, str):
        raise WeightsError("text encoded as another thing than latin-1: refused")
    return _raw(text, unpickler)


def _bytearray(unpickler: RestrictedUnpickler, args: tuple) -> bytes:
    return _raw(args[0] if args else b"", unpickler)


def _list(unpickler: RestrictedUnpickler, args: tuple) -> list:
    items = args[0] if args else ()
    if len(args) > 1 or not isinstance(items, list | tuple | set):
        raise WeightsError("a malformed list")
    unpickler.charge(8 * len(items))
    return list(items)


def _set(unpickler: RestrictedUnpickler, args: tuple) -> set:
    items = _list(unpickler, args)
    unpickler.charge(256 * len(items))
    return set(map(as_key, items))


def _dict(unpickler: RestrictedUnpickler, args: tuple) -> dict:
    if args and isinstance(args[0], dict):
        pairs = args[0].items()
    else:
        pairs = _list(unpickler, args)
    unpickler.charge(256 * len(pairs))
    result: dict = {}
    fill_dict(result, pairs)
    return result


def as_tuple(unpickler: RestrictedUnpickler, args: tuple) -> tuple:
    """Builds a torch.Size."""
    return tuple(_list(unpickler, args))


def empty_dict(unpickler: RestrictedUnpickler, args: tuple) -> dict:
    """Builds a dict class: what it is called with, a factory say, is never called."""
    return {}


SYMBOLS: dict[str, Builder] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": empty_dict,
    "numpy.dtype": lambda unpickler, args: DType(args[0]),
    "numpy.ndarray": None,
}
for _module in ("builtins", "__builtin__"):
    SYMBOLS[f"{_module}.set"] = _set
    SYMBOLS[f"{_module}.frozenset"] = _set
    SYMBOLS[f"{_module}.list"] = _list
    SYMBOLS[f"{_module}.dict"] = _dict
    SYMBOLS[f"{_module}.bytearray"] = _bytearray
for _module in ("numpy.core", "numpy._core"):
    SYMBOLS[f"{_module}.multiarray._reconstruct"] = _reconstruct
    SYMBOLS[f"{_module}.multiarray.scalar"] = _scalar
    SYMBOLS[f"{_module}.numeric._frombuffer"] = _from_buffer
