"""Predictor and data set -> metrics on disk, with progress and timing."""

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from solov2_jax import distributed
from solov2_jax.data.coco import CocoDataset
from solov2_jax.evaluation.coco import CocoEvaluator, json_metrics
from solov2_jax.evaluation.evaluators import make_evaluator
from solov2_jax.inference.prediction import Prediction, write_results
from solov2_jax.io import make_folder, write_json
from solov2_jax.progress import Progress
from solov2_jax.user_code import import_function

T = TypeVar("T")
log = logging.getLogger(__name__)

STARTED_BATCHES = 1  # that the devices have while an earlier one is fetched
ASK_EVERY = 4  # batches, after which several processes ask each other whether to stop


class StopEvaluation(BaseException):
    """Raised in the middle of an evaluation by a signal; its result is dropped."""


@runtime_checkable
class BatchPredictor(Protocol):
    """What an evaluation needs of a `Predictor`."""

    def predict_batch(self, batch: Mapping[str, np.ndarray]) -> list[Prediction]: ...


@runtime_checkable
class StagedBatchPredictor(Protocol):
    """A predictor that begins a batch without waiting for it, such as a `Predictor`."""

    def start_batch(self, batch: Mapping[str, np.ndarray]) -> Any: ...

    def finish_batch(self, started: Any) -> list[Prediction]: ...


@runtime_checkable
class BatchSource(Protocol):
    """Batches of evaluation and how many there are; `data.pipeline.Batches` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...


@dataclass(frozen=True)
class FinishedEvaluation:
    """A finished evaluation, as the functions of `eval.reports` get it."""

    folder: Path  # what they write goes below it
    dataset: CocoDataset
    evaluator: CocoEvaluator  # with all results
    metrics: dict[str, float]
    predictions: Mapping[int, Prediction]  # by image id, of the first `num_pictures` images
    milliseconds: Mapping[str, float]  # per image, by part
    # (workdir, step) of a run's checkpoint, evaluated on the run's validation data; else None.
    checkpoint: tuple[Path, int] | None = None


Report = Callable[[FinishedEvaluation], None]


def build_evaluator(config: Any, dataset: CocoDataset, metric: str = "") -> CocoEvaluator:
    """Returns the evaluator of a data set, whose json is read once for a run.

    Args:
      metric: see `evaluators`; "": the config's for `data.val`.
    """
    chosen = metric or config.data.val.metric
    if chosen == "auto" and config.data.mapper == "fcpose":
        chosen = "keypoints"
    return make_evaluator(
        dataset.table or dataset.annotation_file,
        dataset.category_ids,
        dataset.class_names,
        metric=chosen,
        key="the metric in data.vals" if metric else "data.val.metric",
        backend=config.eval.backend,
        max_detections=config.eval.max_detections,
        size_ranges=config.eval.size_ranges,
        keypoint_sigmas=config.eval.keypoint_sigmas,
    )


def build_reports(config: Any) -> list[Report]:
    """Returns the functions that `eval.reports` names."""
    return [import_function(path, "eval.reports", ("evaluation",)) for path in config.eval.reports]


def evaluate(
    predictor: BatchPredictor,
    evaluator: CocoEvaluator,
    dataset: CocoDataset,
    batches: BatchSource,
    out_dir: str | os.PathLike[str],
    *,
    num_pictures: int = 0,
    max_per_image: int = 0,
    reports: Sequence[Report] = (),
) -> dict[str, float]:
    """Returns the metrics of the batches' images, see `CocoEvaluator.evaluate`.

    Of several processes, each has batches of its own, and all return the metrics of all
    images; the first one gets all results and writes `metrics.json`, with null for what is
    undefined, and `predictions.json` in COCO's results format into `out_dir`; "": nothing is
    written.

    Args:
      evaluator: of `dataset`; forgets what it has collected before.
      num_pictures: images whose predictions are kept for the reports.
      max_per_image: detections that the predictor keeps at most; images that reach it are
        logged. 0: not known.
      reports: called with the finished evaluation, in this order.

    Raises:
      StopEvaluation: in all of several processes, once one was told to stop.
    """
    out = make_folder(out_dir) if out_dir else None
    evaluator.reset()
    predictions, clock = predict(predictor, batches, evaluator, num_pictures)
    if parts := distributed.gather_to_host0(evaluator.state()):
        evaluator.merge(parts)

    def finish() -> dict[str, float]:
        if out is None:
            metrics = evaluator.evaluate()
            warn_of_full_images(evaluator, max_per_image)
            return metrics
        names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
        results = [{**r, "class_name": names[r["category_id"]]} for r in evaluator.results]
        write_results(results, out / "predictions.json")
        metrics = evaluator.evaluate()
        write_metrics(evaluator, metrics, out)
        warn_of_full_images(evaluator, max_per_image)
        evaluation = FinishedEvaluation(
            folder=out,
            dataset=dataset,
            evaluator=evaluator,
            metrics=metrics,
            predictions=predictions,
            milliseconds=clock.milliseconds(),
        )
        for report in reports:
            report(evaluation)
        return metrics

    return distributed.broadcast_from_host0(finish)


def warn_of_full_images(evaluator: CocoEvaluator, max_per_image: int) -> None:
    """Logs how many images have as many detections as are kept; 0: not known."""
    if full := evaluator.images_with(max_per_image) if max_per_image else 0:
        log.warning(
            "%d of %d images have %d detections, as many as are kept: objects may be missing; "
            "raise --config.test.max_per_image",
            full,
            len(evaluator.image_ids),
            max_per_image,
        )


def write_metrics(evaluator: CocoEvaluator, metrics: Mapping[str, float], folder: Path) -> None:
    """Writes `metrics.json`: the metrics and the numbers of images and predictions."""
    counts = {"num_images": len(evaluator.image_ids), "num_predictions": len(evaluator.results)}
    write_json({**json_metrics(metrics), **counts}, folder / "metrics.json")
    log.info("written: %s", folder / "metrics.json")


def predict(
    predictor: BatchPredictor,
    batches: BatchSource,
    evaluator: CocoEvaluator,
    keep: int = 0,
) -> tuple[dict[int, Prediction], "EvaluationClock"]:
    """Returns the first `keep` predictions and the times; `evaluator` gets them all.

    The devices have the next batch before this one's masks are fetched, if the predictor can,
    and masks are encoded by threads meanwhile, one for each device: two share the
    interpreter, and 100 masks of 480 x 640 take them as long as one (14 ms of a core).
    """
    kept: dict[int, Prediction] = {}
    clock = EvaluationClock()
    staged = predictor if isinstance(predictor, StagedBatchPredictor) else None
    started: deque[Any] = deque()  # batches, or of a predictor without stages their predictions
    encoding: deque[Future[Any]] = deque()  # by image
    threads = min(getattr(predictor, "num_devices", 1), os.cpu_count() or 1)

    def add_encoded(most_left: int) -> None:
        while len(encoding) > most_left:
            evaluator.add(*encoding.popleft().result())

    def finish(pool: ThreadPoolExecutor, progress: Progress) -> None:
        batch = started.popleft()
        predictions = staged.finish_batch(batch) if staged else batch
        clock.lap("compute")
        kept.update((p.image_id, p) for p in predictions[: keep - len(kept)])
        encoding.extend(pool.submit(evaluator.encode, p) for p in predictions)
        add_encoded(max(len(predictions), threads))  # more would only cost memory
        clock.lap("encode")
        clock.images += len(predictions)
        progress.advance(text=f"{clock.images} images")

    with (
        ThreadPoolExecutor(threads) as pool,
        Progress("evaluating", len(batches), unit="batches") as progress,
    ):
        for batch in clock.timed(stoppable(batches)):
            started.append(staged.start_batch(batch) if staged else predictor.predict_batch(batch))
            clock.lap("compute", first_of=batch["image"].shape)
            if len(started) > (STARTED_BATCHES if staged else 0):
                finish(pool, progress)
        while started:
            finish(pool, progress)
        add_encoded(0)
        clock.lap("encode")
    log.info("%s", clock.summary())
    return kept, clock


def stoppable(batches: BatchSource) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields this process's batches.

    Raises:
      StopEvaluation: once this process was told to stop; of several, in all, once one was.
        They may have different numbers of batches, but ask each other equally often.
    """
    if jax.process_count() == 1:
        for batch in batches:
            # The signal's own exception is lost where it meets a library's callback.
            if distributed.stop_requested():
                raise StopEvaluation
            yield batch
        return
    iterator = iter(batches)
    for _ in range(max(distributed.gather(-(-len(batches) // ASK_EVERY)))):
        yield from itertools.islice(iterator, ASK_EVERY)
        if distributed.stop_requested():
            raise StopEvaluation


class EvaluationClock:
    """Where the time of an evaluation goes.

    "encode" is the time spent waiting for the encoder, which works beside the device.
    """

    def __init__(self):
        self.images = 0
        self._seconds = {"data": 0.0, "compute": 0.0, "encode": 0.0, "first": 0.0}
        self._shapes: set[Any] = set()
        self._begin = self._last = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields batches; the time until one is there is booked as "data"."""
        for batch in batches:
            self.lap("data")
            yield batch
        self.lap("data")

    def lap(self, part: str, first_of: Any = None) -> None:
        """Books the time since the last lap, the first of a shape as compilation."""
        now = time.perf_counter()
        if first_of is not None and first_of not in self._shapes:
            self._shapes.add(first_of)
            part = "first"
        self._seconds[part] += now - self._last
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        """Returns the mean time per image by part, without the first batch of each shape."""
        n = max(self.images, 1)
        return {part: 1000 * self._seconds[part] / n for part in ("data", "compute", "encode")}

    def summary(self) -> str:
        """Returns the mean time per image, as text."""
        parts = ", ".join(f"{part} {ms:.1f}" for part, ms in self.milliseconds().items())
        return (
            f"predicted {self.images} images in {self._last - self._begin:.1f} s; ms per image: "
            f"{parts}; first batch of {len(self._shapes)} shapes, with compilation: "
            f"{self._seconds['first']:.1f} s"
        )
