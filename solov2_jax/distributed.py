"""Processes and devices: agreeing, ending; where arrays live. `cluster.initialize` joins them.

There is one mesh axis, "data": batches are split over it, the state is copied. All
processes, one for each host or accelerator, run the same program on one mesh of
everybody's devices. A process that ends before the others leaves them waiting in an
operation that it takes part in. So a failing one does not wait for anybody, and JAX ends
the others once its sign of life is missing.
"""

import functools
import json
import math
import os
import signal
import sys
import threading
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solov2_jax.io import InputError, printable

# Exit codes: an error here, and an operation that another process broke off.
FAILED, OTHERS_FAILED = 1, 3

_WORDS = 16 * 2**20  # of four bytes, in a piece of what crosses to all processes

_told_to_stop = threading.Event()


class AgreedError(InputError):
    """What the user can fix, known to all processes: the first one prints it, all end."""


def devices_per_process() -> int:
    """Returns how many devices each process has; of unequal ones, the most."""
    return max(Counter(d.process_index for d in jax.devices()).values())


def rank() -> tuple[int, int]:
    """Returns (number of this process, from 0; of how many)."""
    return jax.process_index(), jax.process_count()


def is_primary() -> bool:
    """Returns whether this process is the one that writes and prints."""
    return jax.process_index() == 0


@contextmanager
def abort_together(user_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Ends this process at once if what is inside fails, so that the others end too.

    An error inside is printed, as one line if the user can fix it; nothing is waited
    for, since the others may be stuck. One that all know of is printed once.
    """
    name = f"process {jax.process_index()} of {jax.process_count()}"
    try:
        yield
        jax.distributed.shutdown()  # waits for the others
        return
    except SystemExit:
        jax.distributed.shutdown()  # a result of all of them, not an error of one
        raise
    except AgreedError as error:
        if not user_errors:
            traceback.print_exc()
        if is_primary():
            print(f"error: {printable(str(error))}", file=sys.stderr)
        jax.distributed.shutdown()
        sys.exit(2)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except user_errors as error:
        print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except jax.errors.JaxRuntimeError as error:
        traceback.print_exc()
        print(
            f"error: {name}: an operation on all devices failed: "
            f"{' '.join(str(error).split())[:200]}. If another process ended before, "
            "its output says why; the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        code = OTHERS_FAILED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Returns every process's value, in their order; JSON values only."""
    if jax.process_count() == 1:
        return [value]
    data = _to_bytes(value)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(_padded(data, int(sizes.max())))
    return [_from_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def gather_to_host0(value: Any) -> list[Any]:
    """Returns every process's value to the first one, [] to the others; JSON values only.

    Each sends its own to the first process alone, one after the other.
    """
    if jax.process_count() == 1:
        return [value]
    data = _to_bytes(value)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).tolist()
    first = {d.process_index: d for d in reversed(jax.devices())}  # each process's first device
    received = [data]
    for sender in range(1, jax.process_count()):
        if jax.process_index() not in (0, sender):
            continue
        mesh = mesh_of([first[0], first[sender]])
        is_sender = jax.process_index() == sender
        own = data if is_sender else np.zeros(0, np.uint8)
        rows = _put_rows(_padded(own, sizes[sender])[None], mesh)
        (row,) = (np.asarray(shard.data)[0] for shard in _send_back(rows, mesh).addressable_shards)
        received.append(row[: sizes[sender]])
    return [_from_bytes(row) for row in received] if is_primary() else []


@functools.partial(jax.jit, static_argnames="mesh")
def _send_back(rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns rows [2, n] with the second device's row on the first one."""
    send = functools.partial(jax.lax.ppermute, axis_name="data", perm=[(1, 0)])
    return jax.shard_map(send, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(rows)


def _to_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(zlib.compress(json.dumps(value).encode(), 1), np.uint8)


def _from_bytes(data: np.ndarray) -> Any:
    return json.loads(zlib.decompress(data.tobytes()))


def _padded(data: np.ndarray, length: int) -> np.ndarray:
    """Returns bytes of the next power of two: a program each, not one for each length."""
    padded = np.zeros(1 << (length - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    return padded


def broadcast_from_host0(make: Callable[[], Any]) -> Any:
    """Returns make() of the first process, which alone calls it; JSON values only.

    Raises:
      AgreedError: in all of several, what is wrong with the user's input or files.
    """
    if jax.process_count() == 1:
        return make()
    told: list[Any] = [None, ""]
    if is_primary():
        try:
            told[0] = make()
        except (ValueError, OSError) as error:
            told[1] = str(error) or repr(error)
    value, problem = gather(told)[0]
    if problem:
        raise AgreedError(problem)
    return value


def agree(problem: str) -> None:
    """Raises an AgreedError in all of several processes if any has a problem; "" is none."""
    if told := next(filter(None, gather(problem)), ""):
        raise AgreedError(told)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raises in all of several processes what the input or a file is wrong with in any.

    Nothing inside may wait for another process.
    """
    problem = ""
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        problem = str(error) or repr(error)
    agree(problem)


def copy_from_host0(tree: Any, shapes: Any) -> Any:
    """Returns the first process's arrays to all, bit for bit, placed as `shapes` says.

    They cross in pieces of 64 MiB, by one program, whatever their number.

    Args:
      tree: of numpy arrays; only the first process's is read, the others may give None.
      shapes: the same tree of shapes, types and shardings.
    """
    wanted, structure = jax.tree.flatten(shapes)
    sizes = [math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in wanted]
    starts = np.cumsum([0, *sizes])
    everything = np.zeros(-(-int(starts[-1]) // 4) * 4, np.uint8)
    if is_primary():
        for x, start, size in zip(jax.tree.leaves(tree), starts, sizes, strict=False):
            everything[start : start + size] = np.frombuffer(np.asarray(x).tobytes(), np.uint8)
    words = everything.view(np.uint32)  # sums with zeros are exact
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        sent = multihost_utils.broadcast_one_to_all(
            np.pad(part, (0, min(_WORDS, len(words)) - len(part)))
        )
        part[:] = np.asarray(sent)[: len(part)]

    def place(want: Any, start: int, size: int) -> jax.Array:
        x = everything[start : start + size].view(want.dtype).reshape(want.shape)
        return jax.make_array_from_callback(x.shape, want.sharding, lambda index: x[index])

    placed = [place(*each) for each in zip(wanted, starts, sizes, strict=False)]
    return jax.tree.unflatten(structure, placed)


def request_stop(wanted: bool = True) -> None:
    """Notes that this process was told to stop; `stop_requested` tells the others."""
    (_told_to_stop.set if wanted else _told_to_stop.clear)()


def stop_requested() -> bool:
    """Returns, to all processes alike, whether any was told to stop; all must call it."""
    return any(gather(_told_to_stop.is_set()))


class AgreeOnStop:
    """Whether any process wants to stop, known to all at the same step.

    Nobody waits for it: the answer is that to the previous call. A single process gets
    its own answer at once.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._any = jax.jit(lambda x: x.max(), out_shardings=replicated(mesh))
        self._latest: jax.Array | None = None

    def __call__(self, wants_to_stop: bool) -> bool:
        """Returns whether any process wanted to, one call ago."""
        if jax.process_count() == 1:
            return wants_to_stop
        own = np.full(jax.local_device_count(), wants_to_stop, np.int32)
        previous, self._latest = self._latest, self._any(_put_rows(own, self._mesh))
        return previous is not None and bool(jax.device_get(previous))


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh with the one axis "data" over the first devices, or over all."""
    # In the order of processes: each holds rows of the batch that follow one another.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return mesh_of(devices[:num_devices])


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Returns a mesh with the one axis "data" over these devices."""
    # JAX's default is Explicit, where contracting over the batch axis raises.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the state: a copy on each device."""
    return NamedSharding(mesh, P())


def split_by_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over the devices."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises an InputError if the global batch cannot be split evenly.

    Args:
      microbatches: computed one after the other, each on all devices.
    """
    devices = mesh.devices.size
    divisor = devices * microbatches
    if batch_size % divisor:
        below = batch_size - batch_size % divisor
        options = [str(n) for n in (below, below + divisor) if n > 0]
        times = f" times train.accumulate = {microbatches}" if microbatches > 1 else ""
        raise InputError(
            f"train.batch_size = {batch_size} cannot be split over {devices} devices"
            f"{times}: use {' or '.join(options)}"
        )


def copy_to_all(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays and keys, equal in all processes, as copies on each device."""
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Returns a host's rows as global arrays, split over the mesh's devices."""
    return {
        name: _put_rows(np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)), mesh)
        for name, x in batch.items()
    }


def _put_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns this process's rows as a part of a global array."""
    # Of several processes, JAX takes this for a hidden copy, which it is not.
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(split_by_batch(mesh), rows)
