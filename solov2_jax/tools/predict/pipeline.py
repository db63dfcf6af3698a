"""Reading, network and writing at once: what one does while another waits.

    read, resize      threads, so many pictures ahead
    network           called by the main thread, which does not wait for the result
    masks to size     a thread, while the network has the next batch
    draw, write       threads

Every stage holds a bounded number of pictures, so memory does not grow with their
number; what is raised in a stage is raised where the results are taken.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import make_batches
from solov2_jax.tools.predict.sources import Frame, Read
from solov2_jax.tools.predict.utilization import DeviceUtilization

T = TypeVar("T")
R = TypeVar("R")

# Batches that the device has before it: one computes, one waits.
BATCHES_AHEAD = 2
# Pictures of various shapes that wait for others of their shape, in batches.
SHAPES_AHEAD = 4


@runtime_checkable
class StagedPredictor(Protocol):
    """A `Predictor`, whose stages may run beside each other."""

    class_names: tuple[str, ...]
    mask_threshold: float

    def preprocess(self, image: np.ndarray, image_id: int) -> dict[str, np.ndarray]: ...

    def detect(self, batch: Mapping[str, np.ndarray]) -> Any: ...

    def paste(self, detections: Any, index: int, *others: Any) -> Prediction: ...

    def report_limits(self, detections: Any, index: int) -> None: ...


@dataclass
class LoadedImage:
    """A frame on its way, with its number in the run."""

    number: int
    frame: Frame
    example: Mapping[str, np.ndarray] | None = None


@dataclass
class DetectedImage:
    """A picture whose batch the device has got."""

    picture: LoadedImage
    detections: Any
    row: int


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
    pool: Executor, calls: Iterable[Read], window: int, predictor: Any, first: int
) -> Iterator[LoadedImage]:
    """Yields the pictures of a source, prepared for the network where it is staged.

    Args:
      first: number of the first one.
    """
    staged = predictor if isinstance(predictor, StagedPredictor) else None

    def read(item: tuple[int, Read]) -> LoadedImage | None:
        number, call = item
        frame = call()
        if frame is None:
            return None
        if staged is None or frame.image is None:
            return LoadedImage(number, frame)
        try:
            return LoadedImage(number, frame, staged.preprocess(frame.image, number))
        except ValueError as error:  # fits into none of the padded shapes
            return LoadedImage(number, replace(frame, problem=f"{frame.path}: {error}"))

    for picture in ahead(pool, read, enumerate(calls, first), window):
        if picture is None:
            return
        yield picture


def predict_ahead(
    pool: Executor,
    predictor: Any,
    pictures: Iterable[LoadedImage],
    batch_size: int,
    utilization: DeviceUtilization,
) -> Iterator[tuple[LoadedImage, Prediction]]:
    """Yields the predictions, in order among pictures of one padded shape."""
    if not isinstance(predictor, StagedPredictor):
        for picture in pictures:
            images = [picture.frame.image]  # its tiles, if any, make the batches
            (prediction,) = predictor.predict_images(images, batch_size)
            yield picture, prediction
        return

    def paste(detected: DetectedImage) -> tuple[LoadedImage, Prediction]:
        example = detected.picture.example
        assert example is not None
        with utilization.busy():
            prediction = predictor.paste(
                detected.detections,
                detected.row,
                example["image_size"],
                example["original_size"],
                predictor.mask_threshold,
                detected.picture.number,
                predictor.class_names,
            )
        predictor.report_limits(detected.detections, detected.row)
        detected.picture.example = None
        return detected.picture, prediction

    detected = detect(predictor, pictures, batch_size, utilization)
    yield from ahead(pool, paste, detected, BATCHES_AHEAD * batch_size)


def detect(
    predictor: StagedPredictor,
    pictures: Iterable[LoadedImage],
    batch_size: int,
    utilization: DeviceUtilization,
) -> Iterator[DetectedImage]:
    """Yields what the device was given, as soon as a padded shape has a batch."""
    waiting: dict[tuple[int, ...], list[LoadedImage]] = {}
    for picture in pictures:
        assert picture.example is not None
        shape = picture.example["image"].shape
        waiting.setdefault(shape, []).append(picture)
        if len(waiting[shape]) < batch_size:
            if sum(map(len, waiting.values())) < SHAPES_AHEAD * batch_size:
                continue
            shape = max(waiting, key=lambda key: len(waiting[key]))
        yield from _detect(predictor, waiting.pop(shape), batch_size, utilization)
    for group in waiting.values():
        yield from _detect(predictor, group, batch_size, utilization)


def _detect(
    predictor: StagedPredictor,
    group: list[LoadedImage],
    batch_size: int,
    utilization: DeviceUtilization,
) -> Iterator[DetectedImage]:
    examples = [p.example for p in group if p.example is not None]
    (batch,) = make_batches(examples, batch_size)
    began = time.perf_counter()
    detections = predictor.detect(batch)
    utilization.watch(began, detections.scores)
    # Only the sizes are needed from here on.
    for row, picture in enumerate(group):
        small = {k: v for k, v in examples[row].items() if k != "image"}
        picture.example = small
        yield DetectedImage(picture, detections, row)
