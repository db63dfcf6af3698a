"""What a program sets up before it trains or predicts: console log, compilation cache.

The commands do this by themselves; a notebook or a script calls `set_up`.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator

from solov2_jax.io import without_controls

CACHE = "~/.cache/solov2_jax"

log = logging.getLogger("solov2_jax")
_NAME = "solov2_jax console"


def set_up(cache: str = CACHE) -> None:
    """Shows the log on the console and sets the compilation cache, as the commands do.

    A second call changes nothing.

    Args:
      cache: folder of compiled programs; "": no cache.
    """
    show_log()
    # Libraries report errors by raising them; what they log goes to train.log.
    libraries = logging.getLogger("absl")
    libraries.propagate = False
    if not libraries.handlers:
        libraries.addHandler(logging.NullHandler())
    compilation_cache(cache)


def show_log() -> None:
    """Shows what the package logs on standard output, in a notebook below the cell."""
    handler = next((h for h in log.handlers if h.get_name() == _NAME), None)
    if isinstance(handler, logging.StreamHandler):
        handler.setStream(sys.stdout)  # a notebook or a test may have replaced it
    else:
        log.addHandler(_console())
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def console_logging() -> Iterator[None]:
    """Shows the log inside `with`, if nobody listens to it."""
    if log.hasHandlers():
        yield
        return
    handler = _console()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class PlainFormatter(logging.Formatter):
    """Leaves out what a terminal would obey: names of files and classes are others'."""

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))


def _console() -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout)
    handler.set_name(_NAME)
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    return handler


def compilation_cache(cache: str) -> None:
    """Caches compiled programs in a folder; JAX_COMPILATION_CACHE_DIR wins over it.

    All hosts with the same devices share one folder below it. Of several processes the
    first one writes there, and the others read: what is on a disk of its own helps it
    alone. To be called once the processes have joined.

    Args:
      cache: a folder, or an address of object storage, s3://... or gs://...; "": only what
        that variable asks for.
    """
    import jax  # slow

    if cache and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache if "://" in cache else str(pathlib.Path(cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", f"{folder.rstrip('/')}/{_device_name()}")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX caches what took a second to compile; a start has a dozen quicker ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _device_name() -> str:
    """Returns what programs are compiled for, as a name of a folder: NVIDIA-H100-80GB-HBM3."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return re.sub(r"[^A-Za-z0-9.]+", "-", device.device_kind).strip("-")
    return f"cpu-{hashlib.sha256(processor().encode()).hexdigest()[:12]}"


def processor() -> str:
    """Returns what CPU code is compiled for: the model and its instructions."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.is_file():
        return json.dumps([platform.machine(), platform.processor()])
    first = info.read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in first if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    names = ("model name", "model", "stepping", "flags", "Features", "CPU part")
    return json.dumps([fields.get(name, "") for name in names])
