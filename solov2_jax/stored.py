"""What a start would trace and compile again, kept beside JAX's compiled programs.

JAX's own cache saves the compiling; a program found in it has been traced and lowered first,
which takes longer than reading it. Here a program is found by what it is traced from: the
sources of this package, the description of its function, the shapes of its arguments, the
versions and the processor. A change of any of them is another program.

Files are as trusted as those of JAX's cache beside them: both hold machine code.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import pickle
import sys
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import serialize_executable

from solov2_jax.io import InputError, read_json, reason, write_bytes, write_json
from solov2_jax.logging import processor

log = logging.getLogger(__name__)

KEPT = 64  # programs of a folder: a megabyte each; the oldest go
# Settings of JAX that change what a function is traced or compiled to.
_JAX_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_debug_nans",
    "jax_disable_jit",
    "jax_numpy_dtype_promotion",
)


def folder() -> Path | None:
    """Returns where programs are kept, in the folder of JAX's cache, or None for nowhere."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    if not cache or "://" in cache or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return Path(cache) / "solov2_programs"


def load_or_compile(run: Any, arguments: Sequence[Any], name: str) -> Any:
    """Returns the program of a jitted function for arguments of these shapes.

    Args:
      run: from `jax.jit`.
      arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s, on one device.
      name: says whatever else of the function decides what it computes; "": nothing does, and
        the program is not kept. See `program_name`.
    """
    where, origin = folder(), _origin()
    if not name or where is None or origin is None or jax.device_count() > 1:
        return _compile_now(run, arguments)
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    path = where / f"{_digest(origin, name, structure, shapes)}.program"
    if path.is_file():
        try:
            program = _load(path)
            os.utime(path)
            return program
        except Exception as error:  # damaged, or unreadable: compiling never depends on it
            log.info("%s: not used, compiling anew (%s)", path, reason(error))
            with contextlib.suppress(OSError):  # of a folder that is only read
                path.unlink()
    program, is_new = _compile(run, arguments)
    if not is_new:
        return program
    try:
        _store(program, path)
    except Exception as error:  # a full disk, or a device whose programs cannot be stored
        log.info("the compiled program is not kept: %s", reason(error))
    return program


class StoredFunction:
    """A function of arrays on one device whose programs are kept; safe to use from threads.

    Args:
      run: from `jax.jit`.
      name: of what it computes, see `load_or_compile`.
    """

    def __init__(self, run: Any, name: str):
        self._run, self._name = run, name
        self._lock = threading.Lock()
        self._programs: dict[Any, Future] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Returns the result by the program of the arguments' shapes; waits until it is there."""
        return self.start(*arguments).result()(*arguments)

    def start(self, *arguments: Any) -> Future:
        """Returns the program for arrays of such shapes, read or compiled by another thread."""
        key = tuple((x.shape, np.dtype(x.dtype)) for x in arguments)
        with self._lock:
            if key not in self._programs:
                abstract = tuple(jax.ShapeDtypeStruct(*each) for each in key)
                self._programs[key] = _one_more().submit(
                    load_or_compile, self._run, abstract, self._name
                )
            return self._programs[key]


@functools.cache
def _one_more() -> ThreadPoolExecutor:
    """Returns the thread that reads and compiles beside those of the network's programs."""
    return ThreadPoolExecutor(1, thread_name_prefix="compile_after")


def _compile_now(run: Any, arguments: Sequence[Any]) -> Any:
    program = run.lower(*arguments).compile()
    give_back_memory()
    return program


def give_back_memory() -> None:
    """Gives the system what tracing and compiling have freed; glibc keeps it otherwise.

    What a program takes when it runs would come on top of it. Other C libraries and systems
    have no such call, and nothing happens there.
    """
    trim = getattr(_this_process(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _this_process() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def program_name(model: Any, *parts: Any) -> str:
    """Returns the name of a program for `load_or_compile`: what it computes, and with what.

    It is "" if the network has modules from outside of this package: what they compute, its
    sources and their description do not say.
    """
    return repr((model, *parts)) if _is_ours(model) else ""


def _is_ours(model: Any) -> bool:
    values = [getattr(model, field.name, None) for field in dataclasses.fields(model)]
    modules = [type(model), *(type(v) for v in values if isinstance(v, nn.Module))]
    known = (__package__, "flax")  # the digest has the sources of one, the other's version
    return all(kind.__module__.partition(".")[0] in known for kind in modules)


def variable_shapes(model: Any, channels: int = 3) -> dict[str, Any]:
    """Returns the shapes of a network's variables, without tracing where they are known.

    Args:
      channels: of its images.
    """
    where, origin = folder(), _origin()
    kept = where and origin and _is_ours(model)
    path = where / f"{_digest(origin, model, channels)}.shapes.json" if where and kept else None
    if path is not None and path.is_file():
        try:
            leaves = read_json(path, "shapes of a network")
            return unflatten_dict({k: jax.ShapeDtypeStruct(*v) for k, v in leaves.items()}, sep="/")
        except (InputError, TypeError, ValueError, AttributeError) as error:
            log.info("%s: not used (%s)", path, reason(error))
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flat: dict[str, Any] = {**flatten_dict(shapes, sep="/")}
            write_json({k: (v.shape, str(v.dtype)) for k, v in flat.items()}, path)
        except OSError as error:
            log.info("the network's shapes are not kept: %s", reason(error))
    return shapes


def _compile(run: Any, arguments: Sequence[Any]) -> tuple[Any, bool]:
    """Returns the program, and whether it was compiled rather than read from JAX's cache.

    One that was read there cannot be stored: on a CPU the copy lacks its functions.
    """
    _listen()
    _missed.by_this_thread = False
    program = _compile_now(run, arguments)
    return program, _missed.by_this_thread


_missed = threading.local()


@functools.cache
def _listen() -> None:
    def note(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            _missed.by_this_thread = True

    jax.monitoring.register_event_listener(note)


def _load(path: Path) -> Any:
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise InputError("its checksum is wrong")
    payload, inputs, outputs = pickle.loads(zlib.decompress(content[32:]))
    return serialize_executable.deserialize_and_load(payload, inputs, outputs)


def _store(program: Any, path: Path) -> None:
    content = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(hashlib.sha256(content).digest() + content, path)
    by_age = sorted(path.parent.glob("*.program"), key=lambda p: p.stat().st_mtime)
    for old in by_age[:-KEPT]:
        old.unlink(missing_ok=True)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _origin() -> str | None:
    """Returns a digest of everything around a function; None if the sources are not there."""
    package = Path(__file__).parent
    sources = sorted(p for p in package.rglob("*.py") if "tools" not in p.parts)
    if not sources:
        return None
    code = hashlib.sha256()
    for source in sources:
        code.update(f"{source.relative_to(package)}\0".encode() + source.read_bytes())
    device = jax.devices()[0]
    return _digest(
        code.hexdigest(),
        (jax.__version__, version("jaxlib"), flax.__version__),
        (device.platform, device.device_kind, device.client.platform_version),
        _processor() if device.platform == "cpu" else "",
        {k: v for k, v in sorted(os.environ.items()) if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        [jax.config.values.get(name) for name in _JAX_SETTINGS],
    )


def _processor() -> str:
    """Returns what CPU code is compiled for: the processor, and the cores that may be used."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    return f"{cores} {processor()}"
