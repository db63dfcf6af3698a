"""Reading, network and writing at once: what one does while another waits.

    read, resize      threads, so many pictures ahead
    network, paste    started by the main thread, which does not wait for the result
    masks to host     a thread, while the devices have the next batch
    draw, write       threads

Every stage holds a bounded number of pictures, so memory does not grow with their
number; what is raised in a stage is raised where the results are taken.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import make_batches
from solov2_jax.tools.predict.sources import Frame, Read

T = TypeVar("T")
R = TypeVar("R")

# Batches that the devices have before them: one computes, one waits.
BATCHES_AHEAD = 2
# Pictures of various shapes that wait for others of their shape, in batches.
SHAPES_AHEAD = 4


@runtime_checkable
class StagedPredictor(Protocol):
    """A `Predictor`, whose stages may run beside each other."""

    class_names: tuple[str, ...]
    num_devices: int  # a batch is a multiple of them

    def preprocess(self, image: np.ndarray, image_id: int) -> dict[str, np.ndarray]: ...

    def start_batch(self, batch: Mapping[str, np.ndarray]) -> Any: ...

    def finish_batch(self, started: Any) -> list[Prediction]: ...


@dataclass
class Picture:
    """A frame on its way through the stages; each fills in what it made."""

    number: int  # in the run
    frame: Frame
    example: Mapping[str, np.ndarray] | None = None  # the network's input, until it has it
    num_objects: int = 0
    # What is added to the files about all pictures, by format: records, or texts.
    results: dict[str, list[Any]] = field(default_factory=dict)
    overlay: np.ndarray | None = None  # of a video's frame
    problem: str = ""  # why it, or one of its files, could not be read or written


def ahead(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """Yields function(item) of each item, in order, up to `window` of them in work."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def read_ahead(
    pool: Executor, calls: Iterable[Read], window: int, predictor: Any, numbers: Iterable[int]
) -> Iterator[Picture]:
    """Yields a source's pictures, each with its number, prepared where stages are known."""
    staged = predictor if isinstance(predictor, StagedPredictor) else None

    def read(item: tuple[int, Read]) -> Picture | None:
        number, call = item
        frame = call()
        if frame is None:
            return None
        picture = Picture(number, frame, problem=frame.problem)
        if staged is not None and frame.image is not None:
            try:
                picture.example = staged.preprocess(values_of(frame), number)
            except ValueError as error:  # fits into none of the padded shapes
                picture.problem = f"{frame.path}: {error}"
        return picture

    for picture in ahead(pool, read, zip(numbers, calls, strict=False), window):
        if picture is None:
            return
        yield picture


def values_of(frame: Any) -> np.ndarray:
    """Returns what a predictor takes of a frame that was read."""
    return frame.image if frame.values is None else frame.values


def predict_ahead(
    pool: Executor,
    predictor: Any,
    pictures: Iterable[Picture],
    batch_size: int,
    utilization: "DeviceUtilization",
) -> Iterator[tuple[Picture, Prediction]]:
    """Yields the predictions, in order among pictures of one padded shape."""
    if not isinstance(predictor, StagedPredictor):
        for picture in pictures:
            images = [values_of(picture.frame)]  # its tiles, if any, make the batches
            (prediction,) = predictor.predict_images(images, batch_size)
            yield picture, prediction
        return

    def finish(started: tuple[list[Picture], Any]) -> list[tuple[Picture, Prediction]]:
        group, batch = started
        with utilization.busy():
            return list(zip(group, predictor.finish_batch(batch), strict=True))

    started = start(predictor, pictures, batch_size, utilization)
    for predicted in ahead(pool, finish, started, BATCHES_AHEAD):
        yield from predicted


def start(
    predictor: StagedPredictor,
    pictures: Iterable[Picture],
    batch_size: int,
    utilization: "DeviceUtilization",
) -> Iterator[tuple[list[Picture], Any]]:
    """Yields (pictures, their batch) as soon as the devices have them."""
    for group in groups_of_one_shape(pictures, batch_size):
        examples = [picture.example for picture in group if picture.example is not None]
        (batch,) = make_batches(examples, batch_size)
        began = time.perf_counter()
        started = predictor.start_batch(batch)
        utilization.watch(began, started.detections.scores)
        for picture in group:
            picture.example = None  # lets go of its pixels
        yield group, started


def groups_of_one_shape(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Yields pictures of one padded shape: a full batch, or less when too many wait."""
    waiting: dict[tuple[int, ...], list[Picture]] = {}
    for picture in pictures:
        assert picture.example is not None
        shape = picture.example["image"].shape
        waiting.setdefault(shape, []).append(picture)
        if len(waiting[shape]) < batch_size:
            if sum(map(len, waiting.values())) < SHAPES_AHEAD * batch_size:
                continue
            shape = max(waiting, key=lambda key: len(waiting[key]))
        yield waiting.pop(shape)
    yield from waiting.values()


Intervals = list[tuple[float, float]]


class DeviceUtilization:
    """The share of time from `with` on in which the device had something to do.

    It counts as busy from when a program is handed to it until its result is there,
    masks on their way to the host included. Compilations count for neither side.
    """

    def __init__(self):
        self._busy: Intervals = []
        self._compiling: Intervals = []
        self._lock = threading.Lock()
        self._watcher = ThreadPoolExecutor(1)
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

        def wait() -> None:
            jax.block_until_ready(result)
            self._add(self._busy, began)

        self._watcher.submit(wait)

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

    def _add(self, intervals: Intervals, began: float) -> None:
        with self._lock:
            intervals.append((began, time.perf_counter()))

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._add(self._compiling, time.perf_counter() - duration_secs)


def covered(intervals: Intervals, begin: float, end: float) -> float:
    """Returns how much of begin..end the intervals cover, overlaps once."""
    if not intervals:
        return 0.0
    spans = np.clip(np.array(sorted(intervals)), begin, end)
    reach = np.maximum.accumulate(spans[:, 1])
    before = np.concatenate([[begin], reach[:-1]])
    return float(np.maximum(reach - np.maximum(spans[:, 0], before), 0).sum())
