"""What the commands share: overrides, one-line errors, logging, platform set-up.

A command defines its absl flags, has a function `run()` that calls `cli.run(main)`, and
lets `main(overrides)` raise ValueError for whatever its user can mend. Its module's
docstring is what `--help` prints, with the flags.
"""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from solov2_jax import logging as session
from solov2_jax.config import split_overrides
from solov2_jax.io import printable

if TYPE_CHECKING:
    from solov2_jax.distributed import Joining

_DEBUG = flags.DEFINE_bool("debug", False, "Print the traceback of an error.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Run on the CPU, as that many devices. 0: the usual platform."
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    session.CACHE,
    "Folder of compiled programs, so that a second start is quick; '' for none. "
    "JAX_COMPILATION_CACHE_DIR, where it is set, wins.",
)
_KEEP_MEMORY = flags.DEFINE_bool(
    "keep_memory",
    True,
    "Keep freed memory in the process, by starting it anew with settings of glibc's "
    "allocator: on a CPU programs run up to a third faster. Linux.",
)
# glibc gives XLA's large temporaries back to the system after every call, and the next
# call pays for them page by page. It reads these when a process starts, never later.
_KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_RESTARTED = "SOLOV2_JAX_RESTARTED"
_HELP = ("help", "h", "helpshort", "helpfull")
# What users can mend. Anything else is a defect of ours and shows its traceback.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)


def run(
    main: Callable[[list[str]], None],
    joining: "Callable[[], Joining] | None" = None,
) -> None:
    """Runs a command; `main` gets the "--config.key=value" arguments.

    A user's error ends in one line, `error: ...`, and exit code 2.

    Args:
      joining: how to join other processes, for a command that can be one of several.
    """
    if any(argument.lstrip("-") in _HELP for argument in sys.argv[1:]):
        print(help_text(main.__module__))
        return
    overrides: list[str] = []

    def parse(argv: list[str]) -> list[str]:
        try:
            rest, found = split_overrides(argv)
            overrides.extend(found)
            rest = flags.FLAGS(rest)
            if len(rest) > 1:
                raise ValueError(f"unknown argument {rest[1]!r}; see --help")
            return rest
        except (flags.Error, ValueError) as error:
            _fail(error)

    def guarded(argv: list[str]) -> None:
        del argv
        _restart(_KEEP_MEMORY.value)
        _set_up()
        try:
            if joining:
                _run_joined(main, overrides, joining())
            else:
                main(overrides)
        except _USER_ERRORS as error:
            if _DEBUG.value:
                raise
            _fail(error)

    app.run(guarded, flags_parser=parse)


def help_text(module: str) -> str:
    """Returns the docstring of a command's module and its flags."""
    own = sys.argv[0] if module == "__main__" else module
    parts = [(sys.modules[module].__doc__ or "").strip(), "Flags:"]
    shared = (f"solov2_jax.{name}" for name in ("view_flags", "process_flags", "cli"))
    for name in (own, *shared):
        if name in flags.FLAGS.flags_by_module_dict():
            parts.append(flags.FLAGS.module_help(name).strip().partition("\n")[2])
    text = "\n\n".join(parts)
    return text.replace(f"{pathlib.Path.home()}/", "~/")


def _run_joined(
    main: Callable[[list[str]], None], overrides: list[str], joining: "Joining"
) -> None:
    """Runs a command in one of several processes; only the first one's log is shown."""
    from solov2_jax import distributed

    if not distributed.initialize(joining):
        main(overrides)
        return
    with contextlib.ExitStack() as stack:
        if not distributed.is_primary():
            for handler in logging.getLogger("solov2_jax").handlers:
                handler.setLevel(logging.WARNING)
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        with distributed.abort_together(() if _DEBUG.value else _USER_ERRORS):
            main(overrides)


def _fail(error: BaseException) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


def _restart(keep_memory: bool) -> None:
    """Starts the process anew with the allocator's settings, if it should have them.

    Settings that are in the environment already are the user's, and stay.
    """
    if os.environ.pop(_RESTARTED, ""):
        for name in _KEEPING:  # for this process, not for its children
            os.environ.pop(name, None)
        return
    given = [n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES"]
    if keep_memory and sys.platform == "linux" and not given:
        sys.stdout.flush()
        environment = {**os.environ, **_KEEPING, _RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _log_unraisable(error) -> None:
    """TensorStore's threads print tracebacks after an error that was raised already."""
    info = (error.exc_type, error.exc_value, error.exc_traceback)
    logging.getLogger("absl").warning("in the background", exc_info=info)


def _set_up() -> None:
    """Console logging, devices and the compilation cache, by the flags."""
    import jax  # slow: after the restart

    session.show_log()
    logging.raiseExceptions = False  # a full disk is reported once, by what it stops
    # Libraries report errors by raising them; what they log goes to train.log.
    absl_logging.get_absl_handler().setLevel(logging.CRITICAL)
    if not _DEBUG.value:
        sys.unraisablehook = _log_unraisable
    if _CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    session.compilation_cache(_CACHE.value)
