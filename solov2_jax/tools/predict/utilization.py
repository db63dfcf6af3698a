"""How busy the device was: the share of the time in which it had something to do."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

_COMPILING = "/jax/core/compile/"

Intervals = list[tuple[float, float]]


class DeviceUtilization:
    """Measures from `with` on; compilations count for neither side.

    The device counts as busy from when a program is handed to it until its result is
    there, masks on their way to the host included.
    """

    def __init__(self):
        self._busy: Intervals = []
        self._compiling: Intervals = []
        self._lock = threading.Lock()
        self._watcher = ThreadPoolExecutor(1)
        self._watched: list[Future[None]] = []
        self._begin = self._end = 0.0

    def __enter__(self) -> "DeviceUtilization":
        self._begin = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *error: object) -> None:
        self._end = time.perf_counter()
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._watcher.shutdown(cancel_futures=True)

    def watch(self, began: float, result: Any) -> None:
        """Books the time until a result is there, without waiting for it.

        Args:
          began: when its program was called, by `time.perf_counter`.
        """
        self._watched = [f for f in self._watched if not f.done()]
        self._watched.append(self._watcher.submit(self._wait, began, result))

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Books what runs inside, which must wait for its result."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(self._busy, began)

    def summary(self) -> tuple[float, float, float]:
        """Returns (busy share, seconds, seconds of compilation besides)."""
        end = self._end or time.perf_counter()
        with self._lock:
            busy, compiling = list(self._busy), list(self._compiling)
        compiled = covered(compiling, self._begin, end)
        working = covered(busy + compiling, self._begin, end) - compiled
        seconds = max(end - self._begin - compiled, 1e-9)
        return working / seconds, seconds, compiled

    def _wait(self, began: float, result: Any) -> None:
        jax.block_until_ready(result)
        self._add(self._busy, began)

    def _add(self, intervals: Intervals, began: float) -> None:
        with self._lock:
            intervals.append((began, time.perf_counter()))

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith(_COMPILING):
            self._add(self._compiling, time.perf_counter() - duration_secs)


def covered(intervals: Intervals, begin: float, end: float) -> float:
    """Returns how much of begin..end the intervals cover, overlaps once."""
    if not intervals:
        return 0.0
    spans = np.clip(np.array(sorted(intervals)), begin, end)
    reach = np.maximum.accumulate(spans[:, 1])
    before = np.concatenate([[begin], reach[:-1]])
    return float(np.maximum(reach - np.maximum(spans[:, 0], before), 0).sum())
