"""Writing a PyTorch checkpoint without PyTorch.

The file is what `torch.save` writes (see `formats/torch.py`): float32 tensors,
contiguous, one storage each, in an uncompressed zip archive. `torch.load` reads it,
with `weights_only=True` too.
"""

import os
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

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


def _tensor(key: int, array: np.ndarray) -> bytes:
    """Returns the call of _rebuild_tensor_v2 on storage `key`."""
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
    """Writes {"model": state, **texts} as a checkpoint; the file appears whole.

    Args:
      state: float32 arrays by name.
      texts: further entries of the checkpoint, strings.
    """
    arrays = {n: np.ascontiguousarray(a, np.dtype("<f4")) for n, a in state.items()}
    entries = b"".join(
        _text(name) + _tensor(key, array) for key, (name, array) in enumerate(arrays.items())
    )
    model = _text("model") + _EMPTY_ORDERED_DICT + b"(" + entries + b"u"  # SETITEMS
    others = b"".join(_text(name) + _text(text) for name, text in texts.items())
    data = b"\x80\x02}(" + model + others + b"u."
    partial = f"{path}.partial"
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _TIME), content)

        add("data.pkl", data)
        add("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            add(f"data/{key}", array.tobytes())
        add("version", b"3\n")
    os.replace(partial, path)
