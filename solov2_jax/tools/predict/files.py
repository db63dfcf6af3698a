"""Sources -> predictions -> files: what `predict.py` does.

Source: AdelaiDet demo/demo.py, whose threshold never reaches SOLOv2; here it does.
"""

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from solov2_jax.inference.prediction import Prediction, to_coco_results, write_results
from solov2_jax.tools.predict.clock import DeviceClock
from solov2_jax.tools.predict.filter import DetectionFilter
from solov2_jax.tools.predict.outputs import OutputFiles, Style, check_output, overlay_path
from solov2_jax.tools.predict.pipeline import (
    LoadedImage,
    StagedPredictor,
    ahead,
    predict_ahead,
    read_ahead,
)
from solov2_jax.tools.predict.progress import ProgressReport
from solov2_jax.tools.predict.sources import ImageFiles, Source, VideoFile
from solov2_jax.tools.predict.track import Tracker
from solov2_jax.tools.predict.video import CODECS, VideoWriter

log = logging.getLogger(__name__)

WRITERS = 2  # threads that draw and write
SHOWN_PROBLEMS = 5  # in the closing error; each was logged
WINDOW = 3  # pictures that a stage of threads holds, besides a batch


@runtime_checkable
class ImagePredictor(Protocol):
    """What predicting files needs of a `Predictor`."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def predict_images(
        self, images: Iterable[np.ndarray | str], batch_size: int = 1
    ) -> Iterable[Prediction]: ...


@dataclass(frozen=True)
class FileOptions:
    """What is predicted how, and written."""

    formats: Sequence[str]
    selection: DetectionFilter
    style: Style = Style()
    batch_size: int = 1
    track: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: must be at least 1")
        if self.style.color_by == "track" and not self.track:
            raise ValueError("--color_by=track needs --track")

    def with_classes(self, labels: frozenset[int] | None) -> "FileOptions":
        """Returns the options that keep these labels only; None: all."""
        return replace(self, selection=replace(self.selection, labels=labels))


@dataclass
class Summary:
    """What became of a run."""

    pictures: int = 0
    objects: int = 0
    written: list[str] = field(default_factory=list)  # videos
    problems: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    # (share, seconds, seconds of compilation besides); None: the views were not timed.
    busy: tuple[float, float, float] | None = None

    def report(self, output: str) -> None:
        """Logs what was done; raises if a picture could not be read, or none was."""
        problems = " | ".join(self.problems[:SHOWN_PROBLEMS])
        if len(self.problems) > SHOWN_PROBLEMS:
            problems += f" | and {len(self.problems) - SHOWN_PROBLEMS} more, see above"
        if not self.pictures:
            raise ValueError(
                f"nothing was written to {output}: {problems or 'the input has no picture'}"
            )
        ended = ", ended by Ctrl-C" if self.stopped else ""
        counts = f"{self.pictures} pictures, {self.objects} objects"
        log.info("%s%s: %s", counts, ended, output)
        for path in self.written:
            log.info("video: %s", path)
        if self.busy is not None:
            share, seconds, compiled = self.busy
            besides = f" (compiling: {compiled:.1f} s besides)" if compiled > 0 else ""
            log.info("device busy %.0f %% of %.1f s%s", 100 * share, seconds, besides)
        if problems:
            total = self.pictures + len(self.problems)
            raise ValueError(
                f"{len(self.problems)} of {total} pictures could not be read, the "
                f"others are done: {problems}"
            )


def overlays(sources: Sequence[Source], output: str) -> list[str]:
    """Returns every path that an overlay may be written to."""
    paths = []
    for source in sources:
        if isinstance(source, ImageFiles):
            pairs = zip(source.names, source.paths, strict=True)
            paths += [overlay_path(output, name, path) for name, path in pairs]
        elif isinstance(source, VideoFile):
            base = os.path.join(output, source.name)
            paths += [base + suffix for _, suffix, _ in CODECS]
    return paths


def check_files(sources: Sequence[Source], output: str) -> None:
    """Raises if the folder cannot be one, or an input would be overwritten."""
    inputs = [path for source in sources for path in source.paths]
    check_output(output, inputs, overlays(sources, output))


def predict_files(
    predictor: ImagePredictor,
    sources: Sequence[Source],
    output: str,
    options: FileOptions,
) -> Summary:
    """Predicts and writes every picture; returns what became of them.

    `image_id` in `predictions.json` is the number of the picture, from 0, and
    `file_name` is relative to the folder that holds all images. Ctrl-C ends the
    reading; what was read is finished.
    """
    check_files(sources, output)
    summary = Summary()
    writer = OutputFiles(output, options.formats, predictor.class_names, options.style)
    totals = [source.total() for source in sources]
    total = None if None in totals else sum(t or 0 for t in totals)
    with DeviceClock() as clock, Interrupt() as interrupt:
        with ProgressReport(total) as progress:
            first = 0
            for source in sources:
                run = PredictionRun(predictor, source, writer, options, clock, interrupt)
                run.go(summary, progress, first)
                first += run.pictures
        summary.stopped = interrupt.stopped
    if isinstance(predictor, StagedPredictor):
        summary.busy = clock.summary()
    summary.results.sort(key=lambda result: result["image_id"])
    if "coco" in options.formats and summary.pictures:
        write_results(summary.results, Path(output) / "predictions.json")
    return summary


@dataclass
class PredictionRun:
    """One source on its way through the stages."""

    predictor: ImagePredictor
    source: Source
    writer: OutputFiles
    options: FileOptions
    clock: DeviceClock
    interrupt: "Interrupt"
    pictures: int = 0

    def go(self, summary: Summary, progress: ProgressReport, first: int) -> None:
        """Predicts the source; the first picture gets the number `first`."""
        size = self.options.batch_size
        with ExitStack() as stack:
            video = self._video(stack)  # first: it is given up after the threads ended
            readers, pasters, writers, encoders = (
                stack.enter_context(ThreadPoolExecutor(n))
                for n in (self.source.threads, 1, WRITERS, 1)
            )
            calls = itertools.takewhile(lambda _: not self.interrupt.stopped, self.source.calls())
            read = read_ahead(readers, calls, WINDOW + size, self.predictor, first)
            good = self._good(read, summary)
            found = predict_ahead(pasters, self.predictor, good, size, self.clock)
            done = ahead(writers, self._write, self._chosen(found), WINDOW)
            if video is not None:
                done = ahead(encoders, video.add, done, WINDOW)
            for results, objects, _ in done:
                summary.results += results
                summary.objects += objects
                summary.pictures += 1
                progress.count(objects)
            if video is not None and (path := video.writer.close()):
                summary.written.append(path)

    def _video(self, stack: ExitStack) -> "OverlayVideo | None":
        source = self.source
        if not isinstance(source, VideoFile) or "overlay" not in self.options.formats:
            return None
        base = os.path.join(self.writer.output, source.name)
        writer = VideoWriter(base, source.fps)
        stack.callback(writer.discard)
        return OverlayVideo(writer)

    def _good(self, pictures: Iterable[LoadedImage], summary: Summary) -> Iterator[LoadedImage]:
        for picture in pictures:
            self.pictures += 1
            if picture.frame.problem:
                log.error("%s", picture.frame.problem)
                summary.problems.append(picture.frame.problem)
            else:
                yield picture

    def _chosen(
        self, found: Iterable[tuple[LoadedImage, Prediction]]
    ) -> Iterator[tuple[LoadedImage, Prediction]]:
        tracker = Tracker() if self.options.track else None
        for picture, prediction in found:
            prediction = self.options.selection(prediction)
            if tracker is not None:
                prediction = tracker.update(prediction)
            yield picture, prediction

    def _write(self, item: tuple[LoadedImage, Prediction]) -> "Written":
        picture, prediction = item
        shown = self.writer.write(picture.frame, prediction)
        results = []
        if "coco" in self.options.formats:
            results = describe(prediction, picture, self.predictor)
        return results, len(prediction), shown


# Results, number of objects, and the overlay of a video's frame.
Written = tuple[list[dict[str, Any]], int, np.ndarray | None]


@dataclass
class OverlayVideo:
    """Adds overlays to a video."""

    writer: VideoWriter

    def add(self, written: Written) -> Written:
        """Returns what was written, its overlay now in the video."""
        results, objects, shown = written
        assert shown is not None
        self.writer.write(shown)
        return results, objects, None


def describe(
    prediction: Prediction, picture: LoadedImage, predictor: ImagePredictor
) -> list[dict[str, Any]]:
    """Returns a prediction's COCO results with file, class and place in a video."""
    results = to_coco_results(prediction, predictor.category_ids)
    for result, label in zip(results, prediction.labels.tolist(), strict=True):
        result["image_id"] = picture.number
        result["file_name"] = picture.frame.file_name
        result["class_name"] = predictor.class_names[label]
        if picture.frame.index is not None:
            result["frame"] = picture.frame.index
    return results


class Interrupt:
    """Turns the first Ctrl-C inside `with` into `stopped`; a second one ends all."""

    def __init__(self):
        self.stopped = False
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        log.info("Ctrl-C: finishing what was read; once more to end at once")
