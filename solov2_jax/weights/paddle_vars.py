"""PaddlePaddle's weights as a tar of a folder: a file for each variable, called as it is.

Nothing is extracted, and what a header claims is compared with the file before memory is
allocated for it.

Source: PaddlePaddle 2.0, paddle/fluid/framework: lod_tensor.cc (SerializeToStream),
tensor_util.cc (TensorToStream) and framework.proto for a variable; POSIX for the archive, which
Python's `tarfile` reads without these bounds.
"""

import math
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from solov2_jax.weights.array_files import WeightsError

MAGIC = (257, b"ustar")  # of a tar: where it stands, and what
_BLOCK = 512
_MAX_RECORDS = 2**16  # bytes of a member's extended header
_MAX_DIMS = 8
_MAX_DESC = 11 * (_MAX_DIMS + 1)  # bytes: a tag and at most ten of a number for each
# framework.proto's VarType.Type
_TYPES = {1: "<i2", 2: "<i4", 3: "<i8", 4: "<f2", 5: "<f4", 6: "<f8", 20: "|u1", 21: "|i1"}


def read_tar(path: str) -> dict[str, np.ndarray]:
    """Returns the archive's variables by name, without their folder's.

    Raises:
      WeightsError: for members that are no variables, and for sizes that do not fit.
    """
    arrays: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        for member, length in _members(file, os.path.getsize(path)):
            name = member.rsplit("/", 1)[-1]
            if name in arrays:
                raise WeightsError(f"duplicate archive member {name[:80]!r}")
            try:
                arrays[name] = _read_variable(file, length)
            except WeightsError as error:
                raise WeightsError(f"archive member {member[:80]!r} {error}") from error
    return arrays


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, int]]:
    """Yields (name, length) of each file in a tar of `size` bytes, `file` where it begins."""
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            return  # the archive's end
        if len(header) < _BLOCK or _octal(header[148:156]) != _checksum(header):
            raise WeightsError("the archive is truncated, or a member's header is damaged")
        name, prefix = (_text(header[i:j]) for i, j in ((0, 100), (345, 500)))
        name = f"{prefix}/{name}" if prefix else name
        length, kind, shown = _octal(header[124:136]), header[156:157], f"member {name[:80]!r}"
        start = at + _BLOCK
        if not 0 <= length <= size - start:
            raise WeightsError(f"archive {shown} claims more bytes than the file has")
        if name.startswith("/") or ".." in name.split("/"):
            raise WeightsError(f"archive {shown} points outside the archive")
        if kind in (b"0", b"\0"):
            yield name, length
        elif kind in (b"x", b"g"):  # times and owners, or a name that does not fit
            records = file.read(length) if length <= _MAX_RECORDS else b" path="
            if b" path=" in records or b" size=" in records:
                raise WeightsError(f"archive {shown} renames the next; pack with --format=ustar")
        elif kind != b"5":
            raise WeightsError(f"archive {shown} is neither a file nor a folder")
        at = start + -(-length // _BLOCK) * _BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _octal(field: bytes) -> int:
    """Returns a header's number, -1 for what is none."""
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(byte in b"01234567" for byte in digits) else -1


def _checksum(header: bytes) -> int:
    """Returns the sum of a header's bytes, its own eight as spaces."""
    return sum(header[:148]) + 8 * 32 + sum(header[156:])


def _read_variable(file: BinaryIO, length: int) -> np.ndarray:
    """Returns the variable of `length` bytes that begins where the file stands.

    The version; how many levels of sequences it has, 0 of a parameter; the tensor's version;
    the size of a message of its type and sides; the message; the values.
    """
    head = struct.Struct("<IQIi")
    data = file.read(min(length, head.size))
    if len(data) < head.size:
        raise WeightsError(f"has {length} bytes: no variable of PaddlePaddle's")
    *zeros, described = head.unpack(data)
    if any(zeros) or not 0 < described <= min(_MAX_DESC, length - head.size):
        raise WeightsError("is no variable of PaddlePaddle's")
    kind, shape = _describe(file.read(described))
    if kind not in _TYPES:
        raise WeightsError(f"has data type {kind} of PaddlePaddle's: not a number known here")
    dtype, rest = np.dtype(_TYPES[kind]), length - head.size - described
    if math.prod(shape) * dtype.itemsize != rest:
        raise WeightsError(f"of shape {shape[:4]} does not fit its {rest} bytes")
    return np.frombuffer(file.read(rest), dtype).reshape(shape)


def _describe(message: bytes) -> tuple[int, list[int]]:
    """Returns (type, sides) of a TensorDesc: field 1 and the repeated field 2, both varints."""
    kind, shape, at = -1, [], 0
    while at < len(message):
        tag, value, shift, more = message[at], 0, 0, True
        at += 1
        while more:
            if at == len(message) or shift > 63:
                raise WeightsError("has a damaged description")
            value |= (message[at] & 127) << shift
            more, shift, at = message[at] > 127, shift + 7, at + 1
        if tag == 0x08:
            kind = value
        elif tag == 0x10 and len(shape) < _MAX_DIMS:
            shape.append(value)
        else:
            raise WeightsError("has a damaged description")
    return kind, shape
