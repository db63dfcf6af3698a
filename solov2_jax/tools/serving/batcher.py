"""A bounded queue in front of one computing thread, and what `/metrics` says of it."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

log = logging.getLogger(__name__)

_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds


class Metrics:
    """One service's counters; several services in a process do not share them."""

    CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self.requests = Counter(
            "solov2_requests", "Answers of /predict.", ["status"], registry=registry
        )
        self.seconds = self._histogram("request_seconds", "From a request's header to its answer.")
        self.batch_seconds = self._histogram("batch_seconds", "Computing a batch.")
        self.batch_images = self._histogram(
            "batch_images", "Images computed together.", range(1, 17)
        )
        self.admitted = Gauge("solov2_admitted", "Requests being answered.", registry=registry)

    def _histogram(
        self, name: str, help: str, buckets: Sequence[float | int] = _BUCKETS
    ) -> Histogram:
        return Histogram(f"solov2_{name}", help, buckets=buckets, registry=self.registry)

    def observe_batch(self, images: int, seconds: float) -> None:
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self.registry)


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
        return self._thread.is_alive()

    def close(self) -> None:
        """Answers what waits, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            batch, going = self._next_batch()
            # Whoever gave up before the computation costs none.
            batch = [(j, f) for j, f in batch if f.set_running_or_notify_cancel()]
            if batch:
                self._compute(batch)

    def _next_batch(self) -> tuple[list[tuple[Any, Future]], bool]:
        """Returns what waits, after waiting for it, and whether more may come."""
        batch: list[tuple[Any, Future]] = []
        until = None  # the first one is waited for
        while len(batch) < self._batch_size:
            try:
                left = None if until is None else max(0.0, until - time.monotonic())
                job = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if job is None:
                return batch, False
            batch.append(job)
            until = until or time.monotonic() + self._wait
        return batch, True

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
