"""What the pickles of weights may name, and PyTorch's checkpoint files of both formats.

Since 1.6 a checkpoint is an uncompressed zip archive: NAME/data.pkl describes the
tensors, NAME/data/KEY are the storages that they view. Before, it was a sequence of
pickles (magic number, protocol, system, objects, keys) followed by the storages.

Source: torch/serialization.py and torch/_utils.py (names and layouts only).
"""

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import Any, no_type_check

import numpy as np

from solov2_jax.weights.array_files import WeightsError, check_members, read_member
from solov2_jax.weights.pickles import (
    AllowedGlobal,
    Builder,
    RestrictedUnpickler,
    Stateful,
    as_count,
    as_key,
    as_text,
    fill_dict,
    opaque,
)

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ORDERS = {b"little": "<", b"big": ">"}
# Storage class -> numpy type.
_STORAGES = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bf16",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
# Objects of training programs around the weights; noted, not looked into.
_OPAQUE = (
    "argparse.Namespace",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.device",
)
# Dict classes of theirs, which become dicts.
_DICTS = (
    "detectron2.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
# A tensor may view a storage that others view too; more than this many times over
# is no checkpoint.
_MAX_SHARING = 4
_MAX_RANK = 64  # axes of an array, numpy's own limit


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
            raise WeightsError(f"arrays of type {code[:20]!r} are not numeric: refused")
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
        raise WeightsError("an array without a numeric type: refused")
    if not isinstance(shape, tuple) or len(shape) > _MAX_RANK:
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


def _from_buffer(unpickler: RestrictedUnpickler, args: tuple) -> np.ndarray:
    data, dtype, shape, order = args[:4]
    if as_text(order) not in ("C", "F"):
        raise WeightsError("an array in another order than C or Fortran: refused")
    return _as_array(shape, dtype, order == "F", _raw(data, unpickler), unpickler)


def _scalar(unpickler: RestrictedUnpickler, args: tuple) -> Any:
    return _as_array((), args[0], False, _raw(args[1], unpickler), unpickler).item()


def _encode(unpickler: RestrictedUnpickler, args: tuple) -> bytes:
    text, encoding = args
    if as_text(encoding) not in ("latin1", "latin-1") or not isinstance(text, str):
        raise WeightsError("text in an encoding other than latin-1: refused")
    return _raw(text, unpickler)


def _list(unpickler: RestrictedUnpickler, args: tuple) -> list:
    items = args[0] if args else ()
    if len(args) > 1 or not isinstance(items, list | tuple | set):
        raise WeightsError("a malformed list")
    unpickler.charge(8 * len(items))
    return list(items)


def _set(unpickler: RestrictedUnpickler, args: tuple) -> set:
    items = _list(unpickler, args)
    unpickler.charge(256 * len(items))
    return {as_key(item) for item in items}


def _dict(unpickler: RestrictedUnpickler, args: tuple) -> dict:
    is_copy = args and isinstance(args[0], dict)
    pairs = args[0].items() if is_copy else _list(unpickler, args)
    unpickler.charge(256 * len(pairs))
    result: dict = {}
    fill_dict(result, pairs)
    return result


def _empty_dict(unpickler: RestrictedUnpickler, args: tuple) -> dict:
    """Builds a dict class: what it is called with, a factory say, is never called."""
    return {}


ARRAY_SYMBOLS: dict[str, Builder] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _empty_dict,
    "numpy.dtype": lambda unpickler, args: DType(args[0]),
    "numpy.ndarray": None,
}
for _module in ("builtins", "__builtin__"):
    ARRAY_SYMBOLS[f"{_module}.set"] = _set
    ARRAY_SYMBOLS[f"{_module}.frozenset"] = _set
    ARRAY_SYMBOLS[f"{_module}.list"] = _list
    ARRAY_SYMBOLS[f"{_module}.tuple"] = lambda u, args: tuple(_list(u, args))
    ARRAY_SYMBOLS[f"{_module}.dict"] = _dict
    ARRAY_SYMBOLS[f"{_module}.bytearray"] = lambda u, args: _raw(args[0] if args else b"", u)
for _module in ("numpy.core", "numpy._core"):
    ARRAY_SYMBOLS[f"{_module}.multiarray._reconstruct"] = _reconstruct
    ARRAY_SYMBOLS[f"{_module}.multiarray.scalar"] = _scalar
    ARRAY_SYMBOLS[f"{_module}.numeric._frombuffer"] = _from_buffer


@dataclass(frozen=True)
class Storage:
    """Numbers in the file: `count` of them, from number `start` of storage `key`."""

    key: str
    kind: str
    start: int
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage, all in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@no_type_check
def _storage(pid: Any) -> Storage:
    """Returns the storage that a persistent id names.

    ("storage", class, key, device, numbers), in the old format also a view of it:
    (view key, first number, numbers) or None.
    """
    if not isinstance(pid, tuple) or len(pid) > 6:
        raise WeightsError("a reference to data other than a storage: refused")
    tag, kind, key, _, numbers, *view = pid
    if as_text(tag) != "storage" or not isinstance(kind, AllowedGlobal):
        raise WeightsError("a reference to data other than a storage: refused")
    if kind.name not in _STORAGES:
        raise WeightsError(f"a storage of {kind.name}: refused")
    start, count = 0, numbers
    if view and view[0] is not None:
        _, start, count = view[0]
    return Storage(as_text(key), _STORAGES[kind.name], as_count(start), as_count(count))


@no_type_check
def _tensor(unpickler: RestrictedUnpickler, args: tuple) -> StoredTensor:
    """Source: torch/_utils.py, _rebuild_tensor and _rebuild_tensor_v2."""
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise WeightsError("a tensor without a storage: refused")
    if len(shape) > _MAX_RANK:
        raise WeightsError(f"a tensor of {len(shape)} axes: refused")
    unpickler.charge(16 * len(shape))
    shape, strides = tuple(map(as_count, shape)), tuple(map(as_count, strides))
    last = as_count(offset)
    if all(shape):
        last += 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last > storage.count or math.prod(shape) > storage.count:
        raise WeightsError(
            f"a tensor {shape} declares more numbers than its storage "
            f"{storage.key[:40]!r} has ({storage.count})"
        )
    return StoredTensor(storage, offset, shape, strides)


def _parameter(unpickler: RestrictedUnpickler, args: tuple) -> StoredTensor:
    if not isinstance(args[0], StoredTensor):
        raise WeightsError("a parameter that is not a tensor: refused")
    return args[0]


SYMBOLS = {
    **ARRAY_SYMBOLS,
    **dict.fromkeys(_STORAGES),
    **dict.fromkeys(f"torch.{name}" for name in _DTYPES),
    **{name: opaque(name) for name in _OPAQUE},
    **dict.fromkeys(_DICTS, _empty_dict),
    "torch.Size": lambda unpickler, args: tuple(_list(unpickler, args)),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


@dataclass
class TorchFile:
    """An opened checkpoint: its object, and the numbers of its tensors on demand.

    `budget`: bytes that all tensors together may have.
    """

    content: Any
    order: str  # of bytes, "<" or ">"
    read_storage: Callable[[str, int], bytes]
    budget: int
    cache: dict[str, bytes] = field(default_factory=dict)

    def array(self, tensor: StoredTensor) -> np.ndarray:
        """Returns the tensor's numbers; bfloat16 comes back as float32."""
        storage = tensor.storage
        bfloat16 = storage.kind == "bf16"
        dtype = np.dtype(self.order + ("u2" if bfloat16 else storage.kind))
        size = dtype.itemsize
        if storage.key not in self.cache:
            last = storage.start + storage.count
            self.cache[storage.key] = self.read_storage(storage.key, last * size)
        self.budget -= math.prod(tensor.shape) * size
        if self.budget < 0:
            raise WeightsError("its tensors share storages more than weights files do")
        if all(tensor.shape):
            view = np.ndarray(
                tensor.shape,
                dtype,
                buffer=self.cache[storage.key],
                offset=(storage.start + tensor.offset) * size,
                strides=tuple(stride * size for stride in tensor.strides),
            )
        else:
            view = np.zeros(tensor.shape, dtype)
        native = view.astype(dtype.newbyteorder("="), copy=False)
        # bfloat16 is the upper half of a float32's bits.
        return (native.astype(np.uint32) << 16).view(np.float32) if bfloat16 else native


def _folder(archive: zipfile.ZipFile) -> str:
    """Returns the archive's only folder; raises on more than torch writes."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(
                f"archive member {info.filename[:80]!r} is compressed; PyTorch stores its "
                "members as they are: refused"
            )
    pickles = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError("not a PyTorch checkpoint: the archive lacks a NAME/data.pkl")
    return pickles[0].removesuffix("data.pkl")


@contextmanager
def open_zip(path: str) -> Iterator[TorchFile]:
    """Opens a checkpoint of PyTorch 1.6 or later."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        check_members(archive, size)
        folder = _folder(archive)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        order = b"little"
        if f"{folder}byteorder" in sizes:
            order = read_member(archive, f"{folder}byteorder").strip()
        if order not in _ORDERS:
            raise WeightsError(f"unknown byte order {order[:20]!r}")

        def read_storage(key: str, length: int) -> bytes:
            name = f"{folder}data/{key}"
            if sizes.get(name, -1) < length:
                raise WeightsError(
                    f"storage {key[:40]!r} should have {length} bytes, the file has "
                    f"{sizes.get(name, 0)}"
                )
            return read_member(archive, name)

        data = read_member(archive, f"{folder}data.pkl")
        content = RestrictedUnpickler(SYMBOLS, _storage).load(io.BytesIO(data), len(data))
        yield TorchFile(content, _ORDERS[order], read_storage, _MAX_SHARING * size)


def _storage_positions(
    file: BufferedIOBase, size: int, keys: Any, kinds: Mapping[str, str], order: str
) -> dict[str, tuple[int, int]]:
    """Returns key -> (position, bytes) of the old format's storages."""
    positions: dict[str, tuple[int, int]] = {}
    for key in map(as_text, keys):
        if key not in kinds:
            raise WeightsError(f"storage {key[:40]!r} belongs to no tensor")
        head = file.read(8)
        if len(head) < 8:
            raise WeightsError(f"the file ends before storage {key[:40]!r}: truncated?")
        itemsize = 2 if kinds[key] == "bf16" else np.dtype(kinds[key]).itemsize
        length = struct.unpack(f"{order}q", head)[0] * itemsize
        if not 0 <= length <= size - file.tell():
            raise WeightsError(f"the file ends inside storage {key[:40]!r}: truncated?")
        positions[key] = (file.tell(), length)
        file.seek(length, os.SEEK_CUR)
    return positions


@contextmanager
def open_legacy(path: str) -> Iterator[TorchFile]:
    """Opens a checkpoint of PyTorch 0.4 to 1.5."""
    size = os.path.getsize(path)
    kinds: dict[str, str] = {}

    def persistent(pid: Any) -> Storage:
        storage = _storage(pid)
        if kinds.setdefault(storage.key, storage.kind) != storage.kind:
            raise WeightsError(f"storage {storage.key[:40]!r} has two types: refused")
        return storage

    with open(path, "rb") as file:
        magic, protocol, system = (RestrictedUnpickler({}).load(file, size) for _ in range(3))
        if magic != MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
            raise WeightsError("not a PyTorch checkpoint (magic number or protocol)")
        content = RestrictedUnpickler(SYMBOLS, persistent).load(file, size)
        keys = RestrictedUnpickler({}).load(file, size)
        order = "<" if system.get("little_endian", True) else ">"
        positions = _storage_positions(file, size, keys, kinds, order)

        def read_storage(key: str, length: int) -> bytes:
            position, available = positions.get(key, (0, -1))
            if available < length:
                raise WeightsError(f"storage {key[:40]!r} has fewer than {length} bytes")
            file.seek(position)
            return file.read(available)

        yield TorchFile(content, order, read_storage, _MAX_SHARING * size)
