"""Sources -> predictions -> files: what `predict.py` does.

However a run ends, what it has predicted is on disk: results are added picture by
picture, files are whole or absent, and a video ends where the run did.

Source: AdelaiDet demo/demo.py, whose threshold never reaches SOLOv2; here it does.
"""

import errno
import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from solov2_jax.inference.prediction import Prediction, to_coco_results
from solov2_jax.io import InputError, printable
from solov2_jax.tools.predict.filter import DetectionFilter
from solov2_jax.tools.predict.output_folder import OutputFolder, ResultsFile
from solov2_jax.tools.predict.outputs import OutputFiles, Style, check_outputs
from solov2_jax.tools.predict.pipeline import (
    LoadedImage,
    StagedPredictor,
    ahead,
    predict_ahead,
    read_ahead,
)
from solov2_jax.tools.predict.progress import ProgressReport
from solov2_jax.tools.predict.sources import Source, VideoFile
from solov2_jax.tools.predict.track import Tracker
from solov2_jax.tools.predict.utilization import DeviceUtilization
from solov2_jax.tools.predict.video import VideoWriter

log = logging.getLogger(__name__)

WRITERS = 2  # threads that draw and write
SHOWN_PROBLEMS = 5  # in the closing error; each was logged
WINDOW = 3  # pictures that a stage of threads holds, besides a batch
# What concerns one picture's files; any other OSError, such as a full disk, ends a run.
PICTURE_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EEXIST", "EILSEQ", "EINVAL", "EISDIR", "ENAMETOOLONG", "ENOTDIR")
}


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
    keep: DetectionFilter
    style: Style = Style()
    batch_size: int = 1
    track: bool = False
    overwrite: bool = False  # files that no run of ours wrote

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")
        if self.style.color_by == "track" and not self.track:
            raise InputError("--color_by=track needs --track")

    def with_classes(self, labels: frozenset[int] | None) -> "FileOptions":
        """Returns the options that keep these labels only; None: all."""
        return replace(self, keep=replace(self.keep, labels=labels))


@dataclass
class Summary:
    """What became of a run."""

    pictures: int = 0
    objects: int = 0
    videos: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stopped: int = 0  # the signal that ended the run
    # (share, seconds, seconds of compilation besides); None: tiles and scales, not timed.
    busy: tuple[float, float, float] | None = None

    def report(self, output: str) -> str:
        """Logs what was done; returns what could not be, for an error, or "".

        Raises:
          InputError: if nothing was written.
        """
        problems = " | ".join(self.problems[:SHOWN_PROBLEMS])
        if len(self.problems) > SHOWN_PROBLEMS:
            problems += f" | and {len(self.problems) - SHOWN_PROBLEMS} more, see above"
        if not self.pictures and not self.stopped:
            raise InputError(
                f"nothing was written to {output}: {problems or 'the input has no picture'}"
            )
        ended = f", ended by {signal.Signals(self.stopped).name}" if self.stopped else ""
        counts = f"{self.pictures} pictures, {self.objects} objects"
        log.info("%s%s: %s", counts, ended, output)
        for path in self.videos:
            log.info("video: %s", path)
        if self.busy is not None:
            share, seconds, compiled = self.busy
            besides = f" (compiling: {compiled:.1f} s besides)" if compiled > 0 else ""
            log.info("device busy %.0f %% of %.1f s%s", 100 * share, seconds, besides)
        if not problems:
            return ""
        return (
            f"{len(self.problems)} of {self.pictures + len(self.problems)} pictures could not be "
            f"read or written, the others are done: {problems}"
        )


def predict_files(
    predictor: ImagePredictor,
    sources: Sequence[Source],
    output: str,
    options: FileOptions,
) -> Summary:
    """Predicts and writes every picture; returns what became of them.

    `image_id` in `predictions.json` is the number of the picture, from 0, and
    `file_name` is relative to the folder that holds all images. SIGINT and SIGTERM end
    the reading; what was read is finished.
    """
    folder = OutputFolder(output, options.overwrite)
    check_outputs(sources, folder, options.formats)
    summary = Summary()
    totals = [source.total() for source in sources]
    total = None if None in totals else sum(t or 0 for t in totals)
    with ExitStack() as stack:
        stack.enter_context(folder.opened())
        results = ResultsFile(folder) if "coco" in options.formats else None
        if results is not None:
            stack.callback(results.finish)
        writer = OutputFiles(folder, options.formats, predictor.class_names, options.style)
        utilization = stack.enter_context(DeviceUtilization())
        interrupt = stack.enter_context(Interrupt())
        progress = stack.enter_context(ProgressReport(total))
        first = 0
        for source in sources:
            run = PredictionRun(
                predictor=predictor,
                source=source,
                writer=writer,
                results=results,
                options=options,
                utilization=utilization,
                interrupt=interrupt,
            )
            run.go(summary, progress, first)
            first += run.pictures
    summary.stopped = interrupt.stopped
    if isinstance(predictor, StagedPredictor):
        summary.busy = utilization.summary()
    return summary


@dataclass
class PredictionRun:
    """One source on its way through the stages."""

    predictor: ImagePredictor
    source: Source
    writer: OutputFiles
    results: ResultsFile | None
    options: FileOptions
    utilization: DeviceUtilization
    interrupt: "Interrupt"
    pictures: int = 0

    def go(self, summary: Summary, progress: ProgressReport, first: int) -> None:
        """Predicts the source; the first picture gets the number `first`."""
        size = self.options.batch_size
        with ExitStack() as stack:
            video = self._video(stack, summary)  # first: closed after the threads have ended
            readers, pasters, writers, encoders = (
                stack.enter_context(ThreadPoolExecutor(n))
                for n in (self.source.threads, 1, WRITERS, 1)
            )
            calls = itertools.takewhile(lambda _: not self.interrupt.stopped, self.source.calls())
            read = read_ahead(readers, calls, WINDOW + size, self.predictor, first)
            readable = self._without_problems(read, summary)
            predicted = predict_ahead(pasters, self.predictor, readable, size, self.utilization)
            written = ahead(writers, self._write, self._kept(predicted), WINDOW)
            if video is not None:
                written = ahead(encoders, video.add, written, WINDOW)
            for picture in written:
                if self.results is not None:
                    self.results.add(picture.number, picture.results)
                if picture.problem:
                    self._report(picture.problem, summary)
                else:
                    summary.objects += picture.objects
                    summary.pictures += 1
                progress.count(picture.objects)

    def _video(self, stack: ExitStack, summary: Summary) -> "OverlayVideo | None":
        source = self.source
        if not isinstance(source, VideoFile) or "overlay" not in self.options.formats:
            return None
        if not source.makes_video:
            return None
        folder = self.writer.folder
        base = os.path.join(folder.path, source.name)
        writer = VideoWriter(base, source.fps, replacing=folder.replacing)
        stack.callback(writer.discard)  # what cannot be closed

        def close() -> None:
            if path := writer.close():
                summary.videos.append(path)

        stack.callback(close)  # also after an error: its frames so far are a video
        return OverlayVideo(writer)

    def _report(self, problem: str, summary: Summary) -> None:
        summary.problems.append(printable(problem))
        log.error("%s", summary.problems[-1])

    def _without_problems(
        self, pictures: Iterable[LoadedImage], summary: Summary
    ) -> Iterator[LoadedImage]:
        for picture in pictures:
            self.pictures += 1
            if picture.frame.problem:
                self._report(picture.frame.problem, summary)
            else:
                yield picture

    def _kept(
        self, predicted: Iterable[tuple[LoadedImage, Prediction]]
    ) -> Iterator[tuple[LoadedImage, Prediction]]:
        tracker = Tracker() if self.options.track else None
        for picture, prediction in predicted:
            prediction = self.options.keep(prediction)
            if tracker is not None:
                prediction = tracker.update(prediction)
            yield picture, prediction

    def _write(self, item: tuple[LoadedImage, Prediction]) -> "WrittenPicture":
        picture, prediction = item
        written = WrittenPicture(picture.number, len(prediction), picture.frame.seconds)
        if self.results is not None:
            written.results = describe(prediction, picture, self.predictor)
        try:
            written.overlay = self.writer.write(picture.frame, prediction)
        except InputError as error:
            written.problem = f"{picture.frame.path}: {error}"
        except OSError as error:
            if error.errno not in PICTURE_ERRORS:
                raise
            written.problem = f"{picture.frame.path}: cannot be written ({error})"
        return written


@dataclass
class WrittenPicture:
    """A picture whose files are written."""

    number: int
    objects: int
    seconds: float | None
    results: list[dict[str, Any]] = field(default_factory=list)
    overlay: np.ndarray | None = None  # of a video's frame
    problem: str = ""  # why some of its files could not be


@dataclass
class OverlayVideo:
    """Adds overlays to a video."""

    writer: VideoWriter

    def add(self, written: WrittenPicture) -> WrittenPicture:
        """Returns what was written, its overlay now in the video."""
        if written.overlay is not None:
            self.writer.write(written.overlay, written.seconds)
            written.overlay = None
        return written


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
        if picture.frame.seconds is not None:
            result["time"] = round(picture.frame.seconds, 6)
    return results


class Interrupt:
    """Turns the first SIGINT or SIGTERM inside `with` into `stopped`; a second ends all."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.stopped = 0  # the signal
        self._before: list[Any] = []

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._on_signal) for number in self.SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self.SIGNALS, self._before, strict=False):
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = number
        name = signal.Signals(number).name
        log.info("%s: finishing what was read; once more to end at once", name)
