"""Progress where people wait: a bar in a terminal, a line of the log now and then elsewhere.

All bars of a process stand below each other at the end of the terminal, and lines of the
log go above them; in a pipe, a file or a notebook nothing but lines is written. Of several
processes only the first one's output is a terminal or shown at all.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
P = TypeVar("P", bound="Progress")
log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines, where there is no bar
STILL_EVERY = 30.0  # the same for work of unknown length
SHOWN_AFTER = 0.5  # seconds after which work is worth a bar


class _Display:
    """The bars of this process, and what makes room for the log above them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0
        self._bars: Any = None
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    def add(self, what: str, total: int | float | None) -> tuple[Any, Any] | None:
        """Returns (bars, the new one's number), None where there is no terminal."""
        with self._lock:
            if self._bars is None and is_terminal():
                self._start()
            if self._bars is None:
                return None
            self._users += 1
            return self._bars, self._bars.add_task(what, total=total, text="")

    def remove(self, task: Any) -> None:
        with self._lock:
            self._bars.remove_task(task)
            self._users -= 1
            if not self._users:
                self._stop()

    def _start(self) -> None:
        from rich import console, progress

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(30),
            progress.TaskProgressColumn(show_speed=True),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=console.Console(file=sys.stdout),
            transient=True,
            speed_estimate_period=180.0,
        )
        above = _AboveBars(self._bars.console)
        for handler in logging.getLogger("solov2_jax").handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stdout:
                self._streams.append((handler, handler.setStream(above)))
        self._bars.start()

    def _stop(self) -> None:
        self._bars.stop()
        self._bars = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []


class _AboveBars:
    """A stream whose lines a terminal shows above the bars, as long as they are."""

    def __init__(self, console: Any):
        self._console = console

    def write(self, text: str) -> int:
        self._console.out(text.removesuffix("\n"), highlight=False)
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


_DISPLAY = _Display()


def is_terminal() -> bool:
    """Returns whether standard output is a terminal that can move its cursor."""
    try:
        return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # replaced by something else, or closed
        return False


class Progress:
    """Counts what is done, inside `with`.

    Args:
      what: such as "evaluating"; of what others wrote, nothing that a terminal would obey.
      total: how many; None: not known.
      unit: of what is counted.
      lines: where there is no terminal, write lines; else others do.
      every: seconds between two lines.
    """

    def __init__(
        self,
        what: str,
        total: int | float | None = None,
        *,
        unit: str = "images",
        lines: bool = True,
        every: int | float = EVERY,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._lines, self._every = lines, every
        self._done: int | float = 0
        self._lock = threading.Lock()
        self._bar: tuple[Any, Any] | None = None

    def __enter__(self: P) -> P:
        self._begin = self._shown = time.perf_counter()
        self._bar = _DISPLAY.add(self._what, self._total)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            _DISPLAY.remove(self._bar[1])
            self._bar = None

    def update(self, done: int | float, text: str = "") -> None:
        """Shows that so many are done, and a text besides."""
        with self._lock:
            self._done = done
            if self._bar is not None:
                bars, task = self._bar
                bars.update(task, completed=done, text=text)
                return
            now = time.perf_counter()
            if not self._lines or now - self._shown < self._every:
                return
            self._shown = now
        log.info("%s", self._line(now - self._begin, text))

    def advance(self, number: int | float = 1, text: str = "") -> None:
        """Shows that so many more are done."""
        self.update(self._done + number, text)

    def _line(self, seconds: float, text: str) -> str:
        done = f"{self._what}: {self._done:.0f}"
        line = f"{done} {self._unit}"
        if self._total:
            left = seconds / max(self._done, 1e-9) * max(self._total - self._done, 0)
            line = f"{done} of {self._total:.0f} {self._unit}, about {left:.0f} s left"
        return f"{line}, {text}" if text else line


def track(
    items: Iterable[T], what: str, *, unit: str = "images", total: int | float | None = None
) -> Iterator[T]:
    """Yields the items, showing how many are done once that takes a moment.

    Args:
      total: how many; None: `len(items)`, where they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    begin, last = time.perf_counter(), 0.0
    with contextlib.ExitStack() as stack:
        progress: Progress | None = None
        for number, item in enumerate(items):
            now = time.perf_counter()
            if now - begin > SHOWN_AFTER and now - last > 0.1:
                last = now
                progress = progress or stack.enter_context(Progress(what, total, unit=unit))
                progress.update(number)
            yield item


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows that something of unknown length goes on, such as a compilation."""
    ended = threading.Event()
    begin = time.perf_counter()

    def tell() -> None:
        while not ended.wait(STILL_EVERY):
            log.info("%s: still at it after %.0f s", what, time.perf_counter() - begin)

    with Progress(what, None, lines=False) as progress:
        thread = None
        if progress._bar is None:
            thread = threading.Thread(target=tell, daemon=True)
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread is not None:
                thread.join()
