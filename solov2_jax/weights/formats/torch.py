"""PyTorch's checkpoint files, both formats, read without PyTorch.

Since 1.6 a checkpoint is an uncompressed zip archive: NAME/data.pkl describes the
tensors, NAME/data/KEY are the storages that they view. Before, it was a sequence of
pickles (magic number, protocol, system, objects, keys) followed by the storages.

Source: torch/serialization.py and torch/_utils.py (names and layouts only).
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, no_type_check

import numpy as np

from solov2_jax.weights.formats import arrays
from solov2_jax.weights.formats.npz import check_members
from solov2_jax.weights.formats.pickles import Machine, Marker, UnsafePickle, record
from solov2_jax.weights.formats.safetensors import widen_bfloat16

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
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
# Objects of training programs around the weights; recorded, not looked into.
_RECORDS = (
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "torch.device",
)
# A tensor may view a storage that others view too; more than this many times over
# is no checkpoint.
_MAX_SHARING = 4


@dataclass(frozen=True)
class Storage:
    """Numbers in the file: `count` of them, from number `start` of storage `key`."""

    key: str
    kind: str
    start: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage, all in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@no_type_check
def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UnsafePickle(f"a size that is no count ({type(value).__name__}): refused")
    return value


@no_type_check
def _storage(pid: Any) -> Storage:
    """Returns the storage that a persistent id names.

    ("storage", class, key, device, numbers), in the old format also a view of it:
    (view key, first number, numbers) or None.
    """
    tag, kind, key, _, numbers, *view = pid
    tag = tag.decode() if isinstance(tag, bytes) else tag
    if tag != "storage" or not isinstance(kind, Marker) or not isinstance(key, str):
        raise UnsafePickle("a reference to data other than a storage: refused")
    if kind.name not in _STORAGES:
        raise UnsafePickle(f"a storage of {kind.name}: refused")
    start, count = 0, _count(numbers)
    if view and view[0] is not None:
        _, start, count = view[0]
    return Storage(key, _STORAGES[kind.name], _count(start), _count(count))


@no_type_check
def _tensor(machine: Machine, args: tuple) -> Tensor:
    """Source: torch/_utils.py, _rebuild_tensor and _rebuild_tensor_v2."""
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise UnsafePickle("a tensor without a storage: refused")
    shape, strides = tuple(map(_count, shape)), tuple(map(_count, strides))
    last = _count(offset)
    if all(shape):
        last += 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last > storage.count or math.prod(shape) > storage.count:
        raise UnsafePickle(
            f"a tensor {shape} declares more numbers than its storage "
            f"{storage.key!r} has ({storage.count})"
        )
    return Tensor(storage, offset, shape, strides)


def _parameter(machine: Machine, args: tuple) -> Tensor:
    if not isinstance(args[0], Tensor):
        raise UnsafePickle("a parameter that is no tensor: refused")
    return args[0]


SYMBOLS = {
    **arrays.SYMBOLS,
    **{name: Marker(name) for name in _STORAGES},
    **{f"torch.{name}": Marker(f"torch.{name}") for name in _DTYPES},
    **{name: record(name) for name in _RECORDS},
    "torch.Size": lambda machine, args: tuple(args[0]),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


class TorchFile:
    """An opened checkpoint: its object, and the numbers of its tensors on demand."""

    def __init__(
        self,
        content: Any,
        big_endian: bool,
        read_storage: Callable[[str, int], bytes],
        size: int,
    ):
        self.content = content
        self._order = ">" if big_endian else "<"
        self._read_storage = read_storage
        self._budget = _MAX_SHARING * size
        self._cache: dict[str, bytes] = {}

    def array(self, tensor: Tensor) -> np.ndarray:
        """Returns the tensor's numbers; bfloat16 comes back as float32."""
        storage = tensor.storage
        bfloat16 = storage.kind == "bf16"
        dtype = np.dtype(self._order + ("u2" if bfloat16 else storage.kind))
        size = dtype.itemsize
        if storage.key not in self._cache:
            length = (storage.start + storage.count) * size
            self._cache[storage.key] = self._read_storage(storage.key, length)
        buffer = self._cache[storage.key]
        self._budget -= math.prod(tensor.shape) * size
        if self._budget < 0:
            raise UnsafePickle("its tensors share storages more often than weights do")
        if all(tensor.shape):
            view = np.ndarray(
                tensor.shape,
                dtype,
                buffer,
                (storage.start + tensor.offset) * size,
                tuple(stride * size for stride in tensor.strides),
            )
        else:
            view = np.zeros(tensor.shape, dtype)
        native = view.astype(dtype.newbyteorder("="), copy=False)
        return widen_bfloat16(native) if bfloat16 else native


def _zip_prefix(archive: zipfile.ZipFile) -> str:
    """Returns the archive's only folder; ValueError on more than torch writes."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnsafePickle(
                f"archive member {info.filename!r} is compressed; PyTorch stores its "
                "members as they are: refused"
            )
    pickles = [n for n in archive.namelist() if n.count("/") == 1]
    pickles = [n for n in pickles if n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsafePickle("no PyTorch checkpoint: the archive lacks a NAME/data.pkl")
    return pickles[0].removesuffix("data.pkl")


@contextmanager
def open_zip(path: str) -> Iterator[TorchFile]:
    """Opens a checkpoint of PyTorch 1.6 or later."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        check_members(archive, size)
        prefix = _zip_prefix(archive)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(sizes.values()) > size:
            raise UnsafePickle("archive members overlap: refused")
        order = b"little"
        if f"{prefix}byteorder" in sizes:
            order = archive.read(f"{prefix}byteorder").strip()
        if order not in (b"little", b"big"):
            raise UnsafePickle(f"unknown byte order {order[:20]!r}")
        data = archive.read(f"{prefix}data.pkl")

        def read_storage(key: str, length: int) -> bytes:
            name = f"{prefix}data/{key}"
            if sizes.get(name, -1) < length:
                raise UnsafePickle(
                    f"storage {key[:40]!r} should have {length} bytes, the file has "
                    f"{sizes.get(name, 0)}"
                )
            return archive.read(name)

        machine = Machine(SYMBOLS, _storage, len(data) + 2**20)
        content = machine.load(io.BytesIO(data), len(data))
        yield TorchFile(content, order == b"big", read_storage, size)


def _storage_positions(
    file: BufferedIOBase, size: int, keys: Any, kinds: Mapping[str, str], order: str
) -> dict[str, tuple[int, int]]:
    """Returns key -> (position, bytes) of the old format's storages."""
    positions = {}
    for key in keys:
        if key not in kinds:
            raise UnsafePickle(f"storage {str(key)[:40]!r} belongs to no tensor")
        head = file.read(8)
        if len(head) < 8:
            raise UnsafePickle(f"the file ends before storage {key!r}: truncated?")
        kind = kinds[key]
        itemsize = 2 if kind == "bf16" else np.dtype(kind).itemsize
        length = struct.unpack(f"{order}q", head)[0] * itemsize
        if not 0 <= length <= size - file.tell():
            raise UnsafePickle(f"the file ends inside storage {key!r}: truncated?")
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
            raise UnsafePickle(f"storage {storage.key!r} has two types: refused")
        return storage

    with open(path, "rb") as file:
        magic, protocol, system = (Machine({}).load(file, size) for _ in range(3))
        if magic != MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
            raise UnsafePickle("no PyTorch checkpoint (magic number or protocol)")
        content = Machine(SYMBOLS, persistent, size).load(file, size)
        keys = Machine({}).load(file, size)
        order = "<" if system.get("little_endian", True) else ">"
        positions = _storage_positions(file, size, keys, kinds, order)

        def read_storage(key: str, length: int) -> bytes:
            position, available = positions.get(key, (0, -1))
            if available < length:
                raise UnsafePickle(f"storage {key[:40]!r} has fewer than {length} bytes")
            file.seek(position)
            return file.read(available)

        yield TorchFile(content, order == ">", read_storage, size)
