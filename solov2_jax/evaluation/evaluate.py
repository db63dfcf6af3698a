"""Predictor and data set -> figures on disk, with progress and timing."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from solov2_jax import distributed
from solov2_jax.data.coco import CocoDataset
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.inference.prediction import Prediction, write_results
from solov2_jax.io import write_json
from solov2_jax.tools.report.expected_results import ExpectedResult, check_names
from solov2_jax.tools.report.pictures import write_pictures

log = logging.getLogger(__name__)

# Seconds between two lines of progress.
PROGRESS_EVERY = 10.0
# Batches whose masks may wait for the encoder; more would only cost memory.
WAITING_BATCHES = 1


@runtime_checkable
class BatchPredictor(Protocol):
    """What an evaluation needs of a `Predictor`."""

    def predict_batch(self, batch: Mapping[str, np.ndarray]) -> list[Prediction]: ...


@runtime_checkable
class BatchSource(Protocol):
    """Batches of evaluation and how many there are; `data.pipeline.Batches` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...


def evaluate(
    predictor: BatchPredictor,
    dataset: CocoDataset,
    batches: BatchSource,
    out_dir: str | os.PathLike[str],
    num_pictures: int = 0,
    backend: str = "fast",
    *,
    expectations: Sequence[ExpectedResult] = (),
    report: str = "",
) -> dict[str, float]:
    """Returns COCO's figures of the batches' images, see `CocoEvaluator.evaluate`.

    Of several processes, each has batches of its own, and all return the figures of all
    images; the first one writes.

    Writes them to `metrics.json` in `out_dir`, with the numbers of images and
    predictions, the predictions to `predictions.json` in COCO's results format, and
    the first `num_pictures` images with truth and prediction to `pictures`.

    Args:
      expectations: their names are checked before anything is predicted.
      report: the title of a report that is written to `report`; "": none.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    evaluator = CocoEvaluator(
        dataset.annotation_file, dataset.category_ids, dataset.class_names, backend
    )
    check_names(expectations, evaluator.metric_names())
    shown, clock = predict(predictor, batches, evaluator, num_pictures)
    if jax.process_count() > 1:
        evaluator.merge(distributed.gather(evaluator.state()))

    def finish() -> dict[str, float]:
        names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
        results = [{**r, "class_name": names[r["category_id"]]} for r in evaluator.results]
        write_results(results, out / "predictions.json")
        metrics = evaluator.evaluate()
        numbers = {
            "num_images": len(evaluator.image_ids),
            "num_predictions": len(evaluator.results),
        }
        write_json({**metrics, **numbers}, out / "metrics.json")
        log.info("written: %s and predictions.json", out / "metrics.json")
        if shown:
            write_pictures(dataset, shown, out / "pictures")
            log.info("look at %s", out / "pictures")
        if report:
            _report(out, dataset, evaluator, metrics, report, clock)
        return metrics

    return distributed.broadcast_from_host0(finish)


def _report(
    out: Path,
    dataset: CocoDataset,
    evaluator: CocoEvaluator,
    metrics: dict[str, float],
    title: str,
    clock: "Clock",
) -> None:
    from solov2_jax.tools.report.report import write_report
    from solov2_jax.tools.report.study import make_study

    facts = {
        "data": os.path.basename(dataset.annotation_file),
        "images": str(len(evaluator.image_ids)),
        "predictions": str(len(evaluator.results)),
    }
    study = make_study(evaluator, metrics, title, facts, clock.milliseconds())
    write_report(out / "report", study, evaluator, dataset.image_root)


def predict(
    predictor: BatchPredictor,
    batches: BatchSource,
    evaluator: CocoEvaluator,
    keep: int = 0,
) -> tuple[dict[int, Prediction], "Clock"]:
    """Returns the first `keep` predictions and the times; `evaluator` gets them all.

    Masks are encoded in a thread of their own while the device computes the next batch.
    """
    kept: dict[int, Prediction] = {}
    clock = Clock(len(batches))
    iterator = iter(batches)
    encoding: deque[Future[None]] = deque()

    def encode(predictions: Sequence[Prediction]) -> None:
        for prediction in predictions:
            evaluator.process(prediction)

    with ThreadPoolExecutor(1) as thread:
        while True:
            clock.start()
            batch = next(iterator, None)
            clock.lap("data")
            if batch is None:
                break
            predictions = predictor.predict_batch(batch)
            clock.lap("compute", first_of=batch["image"].shape)
            kept |= {p.image_id: p for p in predictions[: keep - len(kept)]}
            encoding.append(thread.submit(encode, predictions))
            while len(encoding) > WAITING_BATCHES:
                encoding.popleft().result()
            clock.lap("encode")
            clock.count(len(predictions))
        while encoding:
            encoding.popleft().result()
        clock.lap("encode")
    log.info("%s", clock.summary())
    return kept, clock


class Clock:
    """Where the time of an evaluation goes, and how far it is.

    "encode" is what the encoder, which works beside the device, makes it wait.
    """

    def __init__(self, num_batches: int):
        self.images = self._batches = 0
        self._total = num_batches
        self._seconds = {"data": 0.0, "compute": 0.0, "encode": 0.0, "first": 0.0}
        self._shapes: set[Any] = set()
        self._begin = self._shown = self._last = time.perf_counter()

    def start(self) -> None:
        """Begins a batch."""
        self._last = time.perf_counter()

    def lap(self, what: str, first_of: Any = None) -> None:
        """Books the time since the last lap, the first of a shape as compilation."""
        now = time.perf_counter()
        if first_of is not None and first_of not in self._shapes:
            self._shapes.add(first_of)
            what = "first"
        self._seconds[what] += now - self._last
        self._last = now

    def count(self, images: int) -> None:
        """Counts a batch's images; logs the progress now and then."""
        self.images += images
        self._batches += 1
        if self._last - self._shown > PROGRESS_EVERY:
            self._shown = self._last
            elapsed = self._last - self._begin
            left = elapsed / self._batches * (self._total - self._batches)
            log.info("%d images evaluated, about %.0f s left", self.images, left)

    def milliseconds(self) -> dict[str, float]:
        """Returns what an image cost on average, the first batches of shapes aside."""
        n = max(self.images, 1)
        parts = ("data", "compute", "encode")
        return {name: 1000 * self._seconds[name] / n for name in parts}

    def summary(self) -> str:
        """Returns what an image cost on average, as text."""
        spent = self.milliseconds().items()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in spent)
        elapsed = self._last - self._begin
        return (
            f"predicted {self.images} images in {elapsed:.1f} s; ms an image: {parts}; "
            f"first batch of {len(self._shapes)} shapes, with compilation: "
            f"{self._seconds['first']:.1f} s"
        )
