"""What `/metrics` shows, in Prometheus' text format."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """One service's counters; several services in a process do not share them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self.requests = Counter(
            "solov2_requests", "Answers of /predict.", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "solov2_request_seconds",
            "From a request's header to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "solov2_batch_seconds",
            "Computing a batch.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_images = Histogram(
            "solov2_batch_images",
            "Images computed together.",
            buckets=range(1, 17),
            registry=registry,
        )
        self.admitted = Gauge("solov2_admitted", "Requests being answered.", registry=registry)

    def observe_batch(self, images: int, seconds: float) -> None:
        """Counts a batch."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Returns the answer of `/metrics`."""
        return prometheus_client.generate_latest(self.registry)
