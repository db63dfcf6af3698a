"""Memory that worker processes write batches into and the reader uses without a copy.

Making a segment of shared memory for every batch costs more than making the batch: the
kernel clears each page anew. Here one file in memory holds a few slots, which are used
again as soon as the reader has dropped their arrays. The file has no name: it is gone
with the last process that has it open, however that one ends. Where the system has no
such files (it is Linux's), or all slots are in use, a batch travels as grain sends it.

The other way, `MmapPickle` hands a large read-only object to the workers through one
mapped file.
"""

import dataclasses
import math
import mmap
import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

_PAGE = mmap.PAGESIZE
# Below this, a copy per process is cheaper than a file.
_SMALL = 32 << 20

# Makes an uint8 array of a shape, with whatever was in memory.
New = Callable[[tuple[int, ...]], np.ndarray]


def in_memory(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of this process."""
    return np.empty(shape, np.uint8)


class SharedMemoryPool:
    """Slots of equal size in one file in memory.

    The first page holds a byte per slot, 1 while it is in use. Slots are taken by any
    worker, under a lock, and given back by the reader alone.

    Args:
      slots: how many; a slot that was never used takes no memory.
      size: bytes of one.
    """

    def __init__(self, slots: int, size: int):
        if slots > _PAGE:
            raise ValueError(f"{slots} slots; the first page has room for {_PAGE}")
        self._slots, self._size = slots, -(-size // _PAGE) * _PAGE
        self._file = os.memfd_create("solov2_jax", os.MFD_CLOEXEC)
        os.ftruncate(self._file, _PAGE + slots * self._size)
        self._owner = os.getpid()
        self._map_file()

    def _map_file(self) -> None:
        self._memory = mmap.mmap(self._file, 0)
        self._used = np.frombuffer(self._memory, np.uint8, self._slots)
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._file)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_slots": self._slots,
            "_size": self._size,
            "path": f"/proc/{self._owner}/fd/{self._file}",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slots, self._size = state["_slots"], state["_size"]
        self._file = os.open(state["path"], os.O_RDWR | os.O_CLOEXEC)
        self._map_file()

    def take(self) -> int | None:
        """Returns a slot that is now in use, or None: nobody waits for the reader."""
        import fcntl  # not on every system, but wherever a pool can be made

        # A file's lock keeps processes apart, but not the threads of one.
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                free = np.flatnonzero(self._used == 0)
                if not len(free):
                    return None
                self._used[free[0]] = 1
                return int(free[0])
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def give_back(self, slot: int) -> None:
        """Makes a slot free."""
        self._used[slot] = 0

    def array(self, slot: int) -> np.ndarray:
        """Returns a slot's bytes with whatever is in them, uint8 [size]."""
        start = _PAGE + slot * self._size
        return np.ndarray((self._size,), np.uint8, self._memory, start)

    def open(self, slot: int) -> np.ndarray:
        """Returns the same; once that and all its views are dropped, the slot is
        given back."""
        array = self.array(slot)
        weakref.finalize(array, self.give_back, slot).atexit = False
        return array


@dataclasses.dataclass(frozen=True)
class PoolBlock:
    """Where in a pool an array lies: what travels through the queue instead."""

    slot: int
    start: int  # byte in the slot
    shape: tuple[int, ...]
    dtype: str = "|u1"
    small: bool = False  # the reader copies it, and keeps no slot for it


@dataclasses.dataclass(frozen=True)
class PoolSender:
    """A batch maker, called in worker processes, whose arrays stay where they are.

    A message of places alone is short enough to be written at once, so that a worker
    that is killed never leaves half a message, for the rest of which a reader would wait.
    """

    maker: Callable[..., dict[str, np.ndarray]]
    pool: SharedMemoryPool

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns the maker's batch, in which `PoolBlock` stands for what is in a slot."""
        slot = self.pool.take()
        if slot is None:
            return self.maker(step)
        memory, end = self.pool.array(slot), 0

        def new(shape: tuple[int, ...]) -> np.ndarray:
            nonlocal end
            start, end = end, end + math.prod(shape)
            return memory[start:end].reshape(shape)

        sent: dict[str, Any] = {}
        try:
            for key, value in self.maker(step, new).items():
                start = value.ctypes.data - memory.ctypes.data
                if 0 <= start < memory.nbytes:
                    sent[key] = PoolBlock(slot, start, value.shape, value.dtype.str)
                    continue
                start, sent[key] = end + _padding(end), value
                if start + value.nbytes <= memory.nbytes:
                    end = start + value.nbytes
                    memory[start:end] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                    sent[key] = PoolBlock(slot, start, value.shape, value.dtype.str, small=True)
        except BaseException:
            self.pool.give_back(slot)
            raise
        return sent


def receive(batch: dict[str, Any], pool: SharedMemoryPool | None) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch; large ones in a slot stay there until dropped."""
    slots = {value.slot for value in batch.values() if isinstance(value, PoolBlock)}
    memory = pool.open(slots.pop()) if slots and pool is not None else None
    arrays = {}
    for key, value in batch.items():
        if isinstance(value, PoolBlock) and memory is not None:
            size = math.prod(value.shape) * np.dtype(value.dtype).itemsize
            block = memory[value.start : value.start + size].view(value.dtype)
            block = block.reshape(value.shape)
            arrays[key] = block.copy() if value.small else block
        else:
            # What grain sends has a segment of shared memory, and a file, for each array.
            arrays[key] = np.array(value)
    return arrays


class MmapPickle:
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
        if sum(sizes) < _SMALL or not os.path.isdir("/proc/self/fd"):
            return MmapPickle, (self._function,)
        if not hasattr(self, "_file"):
            self._file = tempfile.TemporaryFile()  # without a name: no kill leaves it behind
            weakref.finalize(self, self._file.close)
            for buffer in buffers:
                self._file.write(buffer.raw())
                self._file.write(b"\0" * _padding(buffer.raw().nbytes))
            self._file.flush()
        return _open, (f"/proc/{os.getpid()}/fd/{self._file.fileno()}", head, sizes)


def _padding(size: int) -> int:
    """Returns what is missing to a multiple of 64 bytes, so that arrays align."""
    return -size % 64


def _open(path: str, head: bytes, sizes: list[int]) -> MmapPickle:
    """Returns the object with its arrays in the mapped file."""
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    pieces, start = [], 0
    for size in sizes:
        pieces.append(view[start : start + size])
        start += size + _padding(size)
    return MmapPickle(pickle.loads(head, buffers=pieces))
