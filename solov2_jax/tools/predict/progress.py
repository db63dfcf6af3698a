"""How far a run is: a bar in a terminal, a line now and then elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

# Seconds between two lines.
EVERY = 5.0


class ProgressReport:
    """Counts pictures and objects between `with` and its end.

    Args:
      total: pictures; None if that is not known.
    """

    def __init__(self, total: int | None):
        self.total = total
        self.pictures = self.objects = 0
        self._shown = time.perf_counter()
        self._console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._streams: list[tuple[logging.StreamHandler, object]] = []

    def __enter__(self) -> "ProgressReport":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, text="")
            # While the bar is there, lines of the log must go above it.
            for handler in logging.getLogger("solov2_jax").handlers:
                if type(handler) is logging.StreamHandler:
                    self._streams.append((handler, handler.setStream(sys.stdout)))
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)  # pyright: ignore[reportArgumentType]

    def count(self, objects: int) -> None:
        """Counts a picture with its objects."""
        self.pictures += 1
        self.objects += objects
        text = f"{self.objects} objects"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.pictures, text=text)
            return
        now = time.perf_counter()
        if now - self._shown > EVERY:
            self._shown = now
            known = f"/{self.total}" if self.total else ""
            log.info("%d%s pictures, %s", self.pictures, known, text)
