"""PyTorch's checkpoint files, read in both formats and written, without PyTorch.

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

from solov2_jax.io import atomic_path
from solov2_jax.weights import pickled_arrays
from solov2_jax.weights.array_files import WeightsError, check_members, read_member
from solov2_jax.weights.pickles import (
    AllowedGlobal,
    RestrictedUnpickler,
    as_count,
    as_text,
    opaque,
)

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
    if len(shape) > pickled_arrays.MAX_RANK:
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
        raise WeightsError("a parameter that is no tensor: refused")
    return args[0]


SYMBOLS = {
    **pickled_arrays.SYMBOLS,
    **dict.fromkeys(_STORAGES),
    **dict.fromkeys(f"torch.{name}" for name in _DTYPES),
    **{name: opaque(name) for name in _OPAQUE},
    **dict.fromkeys(_DICTS, pickled_arrays.empty_dict),
    "torch.Size": pickled_arrays.as_tuple,
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

    def array(self, tensor: StoredTensor) -> np.ndarray:
        """Returns the tensor's numbers; bfloat16 comes back as float32."""
        storage = tensor.storage
        bfloat16 = storage.kind == "bf16"
        dtype = np.dtype(self._order + ("u2" if bfloat16 else storage.kind))
        size = dtype.itemsize
        if storage.key not in self._cache:
            length = (storage.start + storage.count) * size
            self._cache[storage.key] = self._read_storage(storage.key, length)
        self._budget -= math.prod(tensor.shape) * size
        if self._budget < 0:
            raise WeightsError("its tensors share storages more often than weights do")
        if all(tensor.shape):
            view = np.ndarray(
                tensor.shape,
                dtype,
                buffer=self._cache[storage.key],
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
        raise WeightsError("no PyTorch checkpoint: the archive lacks a NAME/data.pkl")
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
        if order not in (b"little", b"big"):
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
        yield TorchFile(content, order == b"big", read_storage, size)


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
            raise WeightsError("no PyTorch checkpoint (magic number or protocol)")
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

        yield TorchFile(content, order == ">", read_storage, size)


# ------------------------------------------------------------------------- writing

_TIME = (1980, 1, 1, 0, 0, 0)  # the same file for the same weights


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data  # BINUNICODE


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)  # BININT


def _tuple(items: bytes) -> bytes:
    return b"(" + items + b"t"  # MARK ... TUPLE


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


_EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"


def _tensor_call(key: int, array: np.ndarray) -> bytes:
    """Returns the pickled call of _rebuild_tensor_v2 on storage `key`."""
    storage = _tuple(
        _text("storage")
        + _global("torch", "FloatStorage")
        + _text(str(key))
        + _text("cpu")
        + _number(array.size)
    )
    strides = [stride // array.itemsize for stride in array.strides]
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + _tuple(
            storage
            + b"Q"  # BINPERSID
            + _number(0)
            + _tuple(b"".join(map(_number, array.shape)))
            + _tuple(b"".join(map(_number, strides)))
            + b"\x89"  # NEWFALSE: requires no gradient
            + _EMPTY_ORDERED_DICT  # no backward hooks
        )
        + b"R"  # REDUCE
    )


def write_torch(path: str, state: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Writes {"model": state, **texts} as `torch.save` does; the file appears whole.

    Float32 tensors, contiguous, one storage each. `torch.load` reads it, with
    `weights_only=True` too.

    Args:
      state: float32 arrays by name.
      texts: further entries of the checkpoint, strings.
    """
    arrays = {n: np.ascontiguousarray(a, np.dtype("<f4")) for n, a in state.items()}
    entries = b"".join(
        _text(name) + _tensor_call(key, array) for key, (name, array) in enumerate(arrays.items())
    )
    model = _text("model") + _EMPTY_ORDERED_DICT + b"(" + entries + b"u"  # SETITEMS
    others = b"".join(_text(name) + _text(text) for name, text in texts.items())
    data = b"\x80\x02}(" + model + others + b"u."
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _TIME), content)

        add("data.pkl", data)
        add("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            add(f"data/{key}", array.tobytes())
        add("version", b"3\n")
