"""Handing a large read-only object to worker processes through one mapped file."""

import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

# Below this, a copy per process is cheaper than a file.
_SMALL = 32 << 20


class Mapped:
    """A callable whose arrays every worker process maps from one file.

    Pickling a plain object copies its arrays into each process: gigabytes for COCO
    with eight workers. Here they are written once, beside each other, and a process
    reads the pages it touches, shared with the others.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(self._function, 5, buffer_callback=buffers.append)
        sizes = [b.raw().nbytes for b in buffers]
        if sum(sizes) < _SMALL:
            return Mapped, (self._function,)
        if not hasattr(self, "_path"):
            handle, self._path = tempfile.mkstemp(prefix="solov2_jax-", suffix=".data")
            with os.fdopen(handle, "wb") as file:
                for buffer in buffers:
                    file.write(buffer.raw())
                    file.write(b"\0" * _padding(buffer.raw().nbytes))
            weakref.finalize(self, os.unlink, self._path)
        return _open, (self._path, head, sizes)


def _padding(size: int) -> int:
    """Returns what is missing to a multiple of 64 bytes, so that arrays align."""
    return -size % 64


def _open(path: str, head: bytes, sizes: list[int]) -> Mapped:
    """Returns the object with its arrays in the mapped file."""
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    pieces, start = [], 0
    for size in sizes:
        pieces.append(view[start : start + size])
        start += size + _padding(size)
    return Mapped(pickle.loads(head, buffers=pieces))
