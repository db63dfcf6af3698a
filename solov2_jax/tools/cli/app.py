"""What the commands share: parsing, one-line errors, logging, platform set-up.

A command is a module with a docstring, which `--help` prints, `FLAGS`, a function
`main(overrides)` that raises ValueError for whatever its user can fix, and `run()`, which
calls `app.run(main, FLAGS)`. The same module is the subcommand of `solov2`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from solov2_jax import logging as session
from solov2_jax.config_schema import switch, text, whole
from solov2_jax.io import InputError, is_object, printable, without_controls
from solov2_jax.tools.cli import flags

# Gets the "--config.key=value" arguments.
Main = Callable[[list[str]], None]

DEBUG = flags.Flag("debug", switch(False), "Print the traceback of an error.")
_CPU_DEVICES = flags.Flag("cpu_devices", whole(0, high=4096), "Run as so many CPU devices. 0: no.")
_CACHE = flags.Flag(
    "compilation_cache",
    text(session.CACHE),
    "Folder of compiled programs; '' for none. JAX_COMPILATION_CACHE_DIR, where set, wins.",
)
_KEEP_MEMORY = flags.Flag(
    "keep_memory",
    switch(True),
    "Start anew with settings of glibc's allocator that keep freed memory: on a CPU programs "
    "run up to a third faster. Linux.",
)
PLATFORM = (DEBUG, _CPU_DEVICES, _CACHE, _KEEP_MEMORY)
# glibc gives XLA's large temporaries back to the system after every call, and the next
# call pays for them page by page. It reads these when a process starts, never later.
# Several arenas: in a single one the threads that compile wait for each other (55 instead of
# 37 s for a first prediction of four photographs), and what they leave behind slows all steps
# after it (0.42 instead of 0.28 s of the quickstart's).
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "4",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_RESTARTED = "SOLOV2_JAX_RESTARTED"
_HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")
# What users can fix. Anything else is a defect of ours and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def run(
    main: Main,
    own: Sequence[flags.Flag],
    runner: Callable[[Main, list[str]], None] | None = None,
    *,
    argv: Sequence[str] | None = None,
    platform: bool = True,
) -> None:
    """Runs a command; `main` gets the "--config.key=value" arguments.

    A user's error ends in one line, `error: ...`, and exit code 2.

    Args:
      own: the command's flags.
      runner: what calls `main` where the command can be one of several processes.
      argv: arguments; None: those of the process.
      platform: whether it computes with JAX, and has the flags for that.
    """
    argv = sys.argv[1:] if argv is None else argv
    shared = PLATFORM if platform else (DEBUG,)
    if wants_help(argv):
        doc = sys.modules[main.__module__].__doc__ or ""
        print(flags.help_text(doc, {"Flags": own, "Flags of every command": shared}))
        return
    DEBUG.value = "--debug" in argv  # already for errors of parsing
    with user_errors():
        overrides = flags.parse([*own, *shared], argv)
        check_objects(own, overrides)
        if platform:
            _restart(_KEEP_MEMORY.value)
            _set_up()
        with on_local_copy(own):
            (runner or _alone)(_with_cache(main) if platform else main, overrides)


# What may be in object storage: a run's folder, images, jsons, weights to start from.
_OBJECT_FLAGS = ("workdir", "compilation_cache")
_OBJECT_KEYS = ("data.train.", "data.val.", "init_from", "user.")


def check_objects(own: Sequence[flags.Flag], overrides: Sequence[str]) -> None:
    """Raises an InputError for an address in object storage where only a path is read."""
    places = [
        (f"--{flag.name}", word)
        for flag in own
        for word in (flag.value if isinstance(flag.value, tuple) else (flag.value,))
        if isinstance(word, str) and flag.name not in _OBJECT_FLAGS
    ]
    for override in overrides:
        key, _, word = override.removeprefix("--config.").partition("=")
        if not key.startswith(_OBJECT_KEYS):
            places.append((f"--config.{key}", word))
    for name, word in places:
        if is_object(word):
            raise InputError(
                f"{name}={word}: only --workdir, init_from and the images and annotations of "
                "data.train and data.val can be in object storage; copy it to a disk first, or "
                "write to a folder here"
            )


@contextlib.contextmanager
def on_local_copy(own: Sequence[flags.Flag]) -> Iterator[None]:
    """Gives the command a folder here for a `--workdir` in object storage; puts at the end
    what it wrote."""
    workdir = next((flag for flag in own if flag.name == "workdir"), None)
    if workdir is None or not is_object(workdir.value or ""):
        yield
        return
    from solov2_jax import storage

    workdir.value = str(storage.local_folder(workdir.value))
    try:
        yield
    finally:
        storage.put_all()


def wants_help(argv: Sequence[str]) -> bool:
    return any(word in _HELP for word in argv)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one line where its user can fix an error."""
    try:
        yield
    except USER_ERRORS as error:
        if DEBUG.value:
            raise
        _fail(error)


def echo(text: str) -> None:
    """Prints lines that may hold names from files, without what a terminal would obey."""
    print(without_controls(text))


def _fail(error: BaseException) -> NoReturn:
    sys.stdout.flush()
    text = str(error)
    if storage := sys.modules.get("solov2_jax.storage"):
        text = storage.with_addresses(text)
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
    sys.exit(2)


def _restart(keep_memory: bool) -> None:
    """Starts the process anew with the allocator's settings, if it should have them.

    Settings that are in the environment already are the user's, and stay.
    """
    if os.environ.pop(_RESTARTED, ""):
        for name in ALLOCATOR:  # for this process, not for its children
            os.environ.pop(name, None)
        return
    given = [n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES"]
    if keep_memory and sys.platform == "linux" and not given:
        sys.stdout.flush()
        environment = {**os.environ, **ALLOCATOR, _RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _alone(main: Main, overrides: list[str]) -> None:
    main(overrides)


def _with_cache(main: Main) -> Main:
    """Returns the command after the compilation cache, whose place depends on the devices:
    they are known when the processes have joined."""

    def start(overrides: list[str]) -> None:
        session.compilation_cache(_CACHE.value)
        main(overrides)

    return start


def _log_unraisable(error) -> None:
    """TensorStore's threads print tracebacks after an error that was raised already."""
    info = (error.exc_type, error.exc_value, error.exc_traceback)
    logging.getLogger("absl").warning("in the background", exc_info=info)


def _set_up() -> None:
    """Console logging and devices, by the flags."""
    import jax  # slow: after the restart
    from absl import logging as absl_logging

    session.show_log()
    logging.raiseExceptions = False  # a full disk is reported once, by what it stops
    absl_logging.use_absl_handler()
    # Libraries report errors by raising them; what they log goes to train.log.
    absl_logging.get_absl_handler().setLevel(logging.CRITICAL)
    if not DEBUG.value:
        sys.unraisablehook = _log_unraisable
    if _CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
