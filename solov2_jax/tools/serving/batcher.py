"""A bounded queue in front of one computing thread, which takes what waits together."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)


class Batcher:
    """Gives jobs to `answer`, at most `batch_size` at a time, in order.

    Args:
      answer: jobs -> their results; one that raises fails its whole batch.
      wait: seconds that a job may wait for others to share its batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        batch_size: int,
        wait: float,
        observe: Callable[[int, float], None],
    ):
        self._answer, self._batch_size, self._wait = answer, batch_size, wait
        self._observe = observe  # (jobs, seconds) of a batch
        self._queue: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Any) -> Future:
        """Returns the future result. Callers bound how many jobs wait."""
        future: Future = Future()
        self._queue.put((job, future))
        return future

    def is_alive(self) -> bool:
        """Returns whether the computing thread works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answers what waits, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            taken = self._queue.get()
            batch = [] if taken is None else [taken]
            going = taken is not None
            until = time.monotonic() + self._wait
            while going and len(batch) < self._batch_size:
                try:
                    left = max(0.0, until - time.monotonic())
                    taken = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                going = taken is not None
                batch += [] if taken is None else [taken]
            # Whoever gave up before the computation costs none.
            batch = [(j, f) for j, f in batch if f.set_running_or_notify_cancel()]
            if batch:
                self._compute(batch)

    def _compute(self, batch: Sequence[tuple[Any, Future]]) -> None:
        start = time.perf_counter()
        try:
            results = self._answer([job for job, _ in batch])
        except Exception as error:
            log.exception("a batch of %d failed", len(batch))
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
        self._observe(len(batch), time.perf_counter() - start)
