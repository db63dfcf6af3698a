"""The safetensors format: an 8-byte length, a JSON header, raw little-endian arrays.

Source: the format's description at https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import struct
from collections.abc import Mapping

import numpy as np

_MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
    "BF16": "<u2",  # widened by `widen_bfloat16`
}


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Returns the float32 values of bfloat16 bit patterns (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r} in the header")
    return result


def _header(data: bytes) -> dict:
    try:
        header = json.loads(data.decode(), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Returns (dtype, shape, begin, end) of one header entry, checked by itself."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])  # type: ignore[index]
        begin, end = entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r}: malformed header entry") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r}: data type {dtype!r} is not supported")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r}: malformed header entry")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if end - begin != size:
        raise ValueError(
            f"tensor {name!r}: {dtype}{list(shape)} needs {size} bytes, "
            f"the header gives it {end - begin}"
        )
    return dtype, shape, begin, end


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (tensors, metadata). The arrays are read-only views of the file.

    Raises ValueError when the header is malformed, names data outside the file, or
    two tensors share bytes.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = _header(file.read(length))
    metadata = header.pop("__metadata__", {})
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != position:
            raise ValueError(f"tensor {name!r}: data overlaps or leaves a gap")
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"the header describes {position} bytes of data, the file has {size - 8 - length}"
        )
    data = np.memmap(path, np.uint8, "r")[8 + length :]
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        array = np.asarray(data[begin:end]).view(_DTYPES[dtype]).reshape(shape)
        tensors[name] = widen_bfloat16(array) if dtype == "BF16" else array
    return tensors, metadata if isinstance(metadata, dict) else {}


def write_safetensors(
    path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes the arrays, sorted by name, and the metadata; the file appears whole."""
    codes = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in sorted(tensors.items()):
        end = position + array.nbytes
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in sorted(tensors.items()):
            file.write(np.ascontiguousarray(array).tobytes())
    os.replace(partial, path)
