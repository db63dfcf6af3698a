"""NumPy's .npz archives, read without pickle and without trusting their sizes."""

import io
import math
import os
import zipfile

import numpy as np

# Trained weights hardly compress; more than this is a bomb (or all zeros).
_MAX_RATIO = 100
_SMALL = 64 * 2**20  # bytes, harmless whatever the ratio
_MAX_HEADER = 4096  # bytes of an array's own header


def check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError on names or sizes that no honest archive of `size` bytes has.

    Nothing is ever extracted to disk; a path that would leave the folder is refused
    all the same, because no program writes one by accident.
    """
    seen: set[str] = set()
    total = 0
    for info in archive.infolist():
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise ValueError(f"archive member {name!r} points outside the archive")
        if name in seen:
            raise ValueError(f"duplicate archive member {name!r}")
        if info.flag_bits & 1:
            raise ValueError(f"archive member {name!r} is encrypted")
        seen.add(name)
        total += info.file_size
    if total > max(_SMALL, _MAX_RATIO * size):
        raise ValueError(
            f"the archive of {size} bytes claims to hold {total} bytes: refused as "
            "a decompression bomb"
        )


def _read_array(name: str, data: bytes) -> np.ndarray:
    """Returns the array of one .npy file's bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(stream, _MAX_HEADER)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(stream, _MAX_HEADER)
    else:
        raise ValueError(f"array {name!r}: .npy version {version} is not supported")
    shape, fortran, dtype = header
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects: refused")
    if dtype.kind not in "fiub":
        raise ValueError(f"array {name!r}: data type {dtype} is not a number")
    rest = len(data) - stream.tell()
    if math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"array {name!r}: {dtype}{list(shape)} does not fit its {rest} bytes")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    array = array.astype(dtype.newbyteorder("="), copy=False)
    return array.reshape(shape, order="F" if fortran else "C")


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Returns the archive's arrays by name; ValueError on anything but numbers."""
    with zipfile.ZipFile(path) as archive:
        check_members(archive, os.path.getsize(path))
        arrays = {}
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise ValueError(f"archive member {info.filename!r} is not an array")
            name = info.filename.removesuffix(".npy")
            arrays[name] = _read_array(name, archive.read(info))
    return arrays
