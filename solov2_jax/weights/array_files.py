"""Files of arrays: NumPy's .npz and .safetensors in, .safetensors and PyTorch's .pth out.

Also the checks of a zip archive, which PyTorch's checkpoints are too. What a file claims
about sizes is compared with the file before memory is allocated for it.
"""

import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for safetensors
import numpy as np
import safetensors
import safetensors.numpy

from solov2_jax.io import atomic_path

# Trained weights hardly compress; more than this is a bomb (or all zeros).
_MAX_RATIO = 16
_SMALL = 64 * 2**20  # bytes, harmless whatever the ratio
_MAX_ARRAY_HEADER = 4096  # bytes of a .npy file's header
_MAX_TENSORS_HEADER = 8 * 2**20  # bytes of a .safetensors file's header: 80,000 tensors
_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split())


class WeightsError(ValueError):
    """What is wrong with the contents of a weights file; the message lacks its name."""


def check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raises WeightsError on names or sizes that no honest archive of `size` bytes has.

    Nothing is ever extracted to disk; a path that would leave the folder is refused
    all the same, because no program writes one by accident. bzip2 and LZMA are refused
    because their output cannot be bounded while it is read.
    """
    seen: set[str] = set()
    for info in archive.infolist():
        name, shown = info.filename, f"archive member {info.filename[:80]!r}"
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise WeightsError(f"{shown} points outside the archive")
        if name in seen:
            raise WeightsError(f"duplicate {shown}")
        if info.flag_bits & 1:
            raise WeightsError(f"{shown} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsError(f"{shown} is neither stored nor deflated; save it again")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise WeightsError(f"{shown} is stored but declares two different sizes")
        seen.add(name)
    if sum(info.compress_size for info in archive.infolist()) > size:
        raise WeightsError("archive members overlap, or the file is truncated")
    total = sum(info.file_size for info in archive.infolist())
    if total > max(_SMALL, _MAX_RATIO * size):
        raise WeightsError(
            f"the archive of {size} bytes claims to hold {total} bytes: refused as "
            "a decompression bomb"
        )


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a member's bytes, never more than `check_members` has seen declared."""
    declared = archive.getinfo(name).file_size
    with archive.open(name) as stream:
        data = stream.read(declared)
    if len(data) != declared:
        raise WeightsError(f"archive member {name[:80]!r} is shorter than declared")
    return data


def _read_array(name: str, data: bytes) -> np.ndarray:
    """Returns the array of one .npy file's bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(stream, _MAX_ARRAY_HEADER)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(stream, _MAX_ARRAY_HEADER)
    else:
        raise WeightsError(f"array {name!r}: .npy version {version} is not supported")
    shape, fortran, dtype = header
    if dtype.hasobject:
        raise WeightsError(f"array {name!r} holds pickled objects: refused")
    if dtype.kind not in "fiub":
        raise WeightsError(f"array {name!r}: data type {dtype} is not a number")
    rest = len(data) - stream.tell()
    if math.prod(shape) * dtype.itemsize != rest:
        raise WeightsError(f"array {name!r}: {dtype}{list(shape)} does not fit its {rest} bytes")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    array = array.astype(dtype.newbyteorder("="), copy=False)
    return array.reshape(shape, order="F" if fortran else "C")


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Returns the archive's arrays by name; raises on anything but numbers."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        check_members(archive, os.path.getsize(path))
        for member in archive.namelist():
            if not member.endswith(".npy"):
                raise WeightsError(f"archive member {member[:80]!r} is not an array")
            name = member.removesuffix(".npy")
            arrays[name] = _read_array(name[:80], read_member(archive, member))
    return arrays


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object's dict; raises where a key stands twice."""
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise WeightsError(f"duplicate key {name[:80]!r} in the header")
        result[name] = value
    return result


def _check_header(path: str) -> None:
    """Refuses what the library reads without a word: long headers, names that stand
    twice (the last one wins there), types that are no plain numbers."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise WeightsError(f"a header of {length} bytes: more than the file has")
        if length > _MAX_TENSORS_HEADER:
            raise WeightsError(f"a header of {length} bytes: at most {_MAX_TENSORS_HEADER}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"the header is not JSON ({error})") from error
    for name, entry in header.items() if isinstance(header, dict) else ():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if name != "__metadata__" and isinstance(dtype, str) and dtype not in _DTYPES:
            raise WeightsError(f"tensor {name[:80]!r}: data type {dtype[:20]!r} is not supported")


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (tensors, metadata); bfloat16 comes back as float32.

    The library checks that every tensor has the bytes that its shape needs, and that
    together they cover the file without overlaps or gaps.
    """
    _check_header(path)
    tensors = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            array = file.get_tensor(name)
            narrow = array.dtype.name == "bfloat16"
            tensors[name] = array.astype(np.float32) if narrow else array
        return tensors, dict(file.metadata() or {})


def write_safetensors(
    path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes the arrays and the metadata; the file appears whole.

    The same weights give the same bytes as long as there is one metadata entry: the
    library writes several in any order.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, dict(metadata))


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


def write_torch(
    path: str, state: Mapping[str, np.ndarray], texts: Mapping[str, str], key: str = "model"
) -> None:
    """Writes {key: state, **texts} as `torch.save` does; the file appears whole.

    Float32 tensors, contiguous, one storage each. `torch.load` reads it, with
    `weights_only=True` too.

    Args:
      state: float32 arrays by name.
      texts: further entries of the checkpoint, strings.
    """
    arrays = {n: np.ascontiguousarray(a, np.dtype("<f4")) for n, a in state.items()}
    entries = b"".join(
        _text(name) + _tensor_call(number, array)
        for number, (name, array) in enumerate(arrays.items())
    )
    model = _text(key) + _EMPTY_ORDERED_DICT + b"(" + entries + b"u"  # SETITEMS
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
        for number, array in enumerate(arrays.values()):
            add(f"data/{number}", array.tobytes())
        add("version", b"3\n")
