"""Sources -> predictions -> files: what `predict.py` does.

However a run ends, what it has predicted is on disk: results are added picture by
picture, files are whole or absent, and a video ends where the run did.

Source: AdelaiDet demo/demo.py, whose threshold never reaches SOLOv2; here it does.
"""

import errno
import functools
import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from solov2_jax import distributed
from solov2_jax.inference.prediction import Prediction, to_coco_results
from solov2_jax.io import InputError, printable
from solov2_jax.progress import Progress
from solov2_jax.tools.multiview.tiling import PicturePredictor
from solov2_jax.tools.predict.dealing import ASK_EVERY, JointReading, join, opened_by_all
from solov2_jax.tools.predict.output_folder import OutputFolder, ResultsFile
from solov2_jax.tools.predict.outputs import (
    LABEL_WRITERS,
    DetectionFilter,
    OutputFiles,
    check_outputs,
    open_results,
)
from solov2_jax.tools.predict.pipeline import (
    DeviceUtilization,
    Picture,
    StagedPredictor,
    ahead,
    predict_ahead,
    read_ahead,
)
from solov2_jax.tools.predict.sources import Source
from solov2_jax.tools.predict.track import Tracker
from solov2_jax.tools.predict.video import VideoWriter

log = logging.getLogger(__name__)

WRITERS = 2  # threads that draw and write
SHOWN_PROBLEMS = 5  # in the closing error; each was logged
WINDOW = 3  # pictures that a stage of threads holds, besides a batch
PROGRESS_EVERY = 5.0  # seconds between two lines of the log, without a terminal
# What concerns one picture's files; any other OSError, such as a full disk, ends a run.
PICTURE_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EEXIST", "EILSEQ", "EINVAL", "EISDIR", "ENAMETOOLONG", "ENOTDIR")
}


@dataclass(frozen=True)
class FileOptions:
    """What is predicted how, and written."""

    formats: Sequence[str]
    keep: DetectionFilter
    color_by: str = "object"  # of overlays, as `labels`: see `draw.draw_prediction`
    labels: bool = True
    batch_size: int = 1
    track: bool = False
    overwrite: bool = False  # files that no run of ours wrote

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")
        if self.color_by == "track" and not self.track:
            raise InputError("--color_by=track needs --track")


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
            besides = f" (plus {compiled:.1f} s compiling)" if compiled > 0 else ""
            log.info("device busy %.0f %% of %.1f s%s", 100 * share, seconds, besides)
        if not problems:
            return ""
        return (
            f"{len(self.problems)} of {self.pictures + len(self.problems)} pictures could not be "
            f"read or written, the others are done: {problems}"
        )


def predict_files(
    predictor: PicturePredictor,
    sources: Sequence[Source],
    output: str,
    options: FileOptions,
    numbers: Sequence[int] | None = None,
) -> Summary:
    """Predicts and writes every picture; returns what became of them.

    `image_id` in `predictions.json` is the number of the picture, from 0, and
    `file_name` is relative to the folder that holds all images. SIGINT and SIGTERM end
    the reading; what was read is finished.

    Of several processes each has pictures of its own; the summary is of all.

    Args:
      numbers: of the pictures; None: they are all that there are.

    Raises:
      AgreedError: in all of several processes, what ended one of them.
    """
    folder = OutputFolder(output, options.overwrite, distributed.rank())
    if numbers is None:
        check_outputs(sources, folder, options.formats)
    totals = [source.total() for source in sources]
    with ExitStack() as stack:
        stack.enter_context(opened_by_all(folder))
        results = open_results(folder, options.formats, predictor.class_names)
        for file in results.values():
            stack.callback(file.finish)
        interrupt = stack.enter_context(Interrupt())
        every = ASK_EVERY * options.batch_size
        reading = JointReading(
            lambda: interrupt.stopped, sum(len(source.paths) for source in sources), every
        )
        run = PredictionRun(
            predictor=predictor,
            options=options,
            results=results,
            files=OutputFiles(
                folder, options.formats, predictor.class_names, options.color_by, options.labels
            ),
            utilization=stack.enter_context(DeviceUtilization()),
            reading=reading,
            numbers=numbers,
            progress=stack.enter_context(
                ProgressReport(None if None in totals else sum(t or 0 for t in totals))
            ),
        )
        with reading.until_all_end():
            for source in sources:
                run.predict(source)
        run.summary.stopped = interrupt.stopped or reading.signal
        if isinstance(predictor, StagedPredictor):
            run.summary.busy = run.utilization.summary()
        return finish_run(run.summary, results, reading.failure)


def finish_run(summary: Summary, results: Mapping[str, ResultsFile], failure: str) -> Summary:
    """Returns the summary of all processes; the files about all pictures are done."""
    reports = join(results, {"summary": asdict(summary), "failure": failure})

    def merge() -> tuple[dict[str, Any], str]:
        every = [Summary(**report["summary"]) for report in reports]
        busy = [each.busy for each in every if each.busy is not None]
        seconds = sum(time for _, time, _ in busy)
        merged = Summary(
            pictures=sum(each.pictures for each in every),
            objects=sum(each.objects for each in every),
            videos=[path for each in every for path in each.videos],
            problems=[problem for each in every for problem in each.problems],
            stopped=next((each.stopped for each in every if each.stopped), 0),
        )
        if seconds:  # the share of all devices, and the longest
            share = sum(share * time for share, time, _ in busy) / seconds
            merged.busy = share, *(max(each) for each in list(zip(*busy, strict=True))[1:])
        return asdict(merged), next((r["failure"] for r in reports if r["failure"]), "")

    merged, failure = distributed.broadcast_from_host0(merge)
    if failure:
        raise distributed.AgreedError(failure)
    return Summary(**merged)


@dataclass
class PredictionRun:
    """Sends sources through the stages, one after the other."""

    predictor: PicturePredictor
    options: FileOptions
    results: Mapping[str, ResultsFile]  # by format
    files: OutputFiles
    utilization: DeviceUtilization
    reading: JointReading
    progress: "ProgressReport"
    numbers: Sequence[int] | None = None  # of the pictures; None: from 0 on
    summary: Summary = field(default_factory=Summary)
    num_read: int = 0  # pictures

    def predict(self, source: Source) -> None:
        """Predicts and writes the pictures of a source."""
        size = self.options.batch_size
        with ExitStack() as stack:
            video = self._open_video(source, stack)  # first: closed after the threads have ended
            readers, pasters, writers, encoders = (
                stack.enter_context(ThreadPoolExecutor(n)) for n in (source.threads, 1, WRITERS, 1)
            )
            calls = itertools.takewhile(self.reading, source.calls())
            numbers = itertools.count() if self.numbers is None else self.numbers
            numbers = itertools.islice(numbers, self.num_read, None)
            read = read_ahead(readers, calls, WINDOW + size, self.predictor, numbers)
            predicted = predict_ahead(
                pasters, self.predictor, self._readable(read), size, self.utilization
            )
            written = ahead(writers, self._write, self._kept(predicted), WINDOW)
            if video is not None:
                encode = functools.partial(add_overlay, video)
                written = ahead(encoders, encode, written, WINDOW)
            for picture in written:
                for kind, results in picture.results.items():
                    self.results[kind].add(picture.number, results)
                if picture.problem:
                    self._report(picture.problem)
                else:
                    self.summary.objects += picture.num_objects
                    self.summary.pictures += 1
                self.progress.count(picture.num_objects)

    def _open_video(self, source: Source, stack: ExitStack) -> VideoWriter | None:
        if not source.makes_video or "overlay" not in self.options.formats:
            return None
        folder = self.files.folder
        base = os.path.join(folder.path, source.name)
        writer = VideoWriter(base, source.fps, replacing=folder.replacing)
        stack.callback(writer.discard)  # what cannot be closed

        def close() -> None:
            if path := writer.close():
                self.summary.videos.append(path)

        stack.callback(close)  # also after an error: its frames so far are a video
        return writer

    def _report(self, problem: str) -> None:
        self.summary.problems.append(printable(problem))
        log.error("%s", self.summary.problems[-1])

    def _readable(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        for picture in pictures:
            self.num_read += 1
            if picture.problem:
                self._report(picture.problem)
            else:
                yield picture

    def _kept(
        self, predicted: Iterable[tuple[Picture, Prediction]]
    ) -> Iterator[tuple[Picture, Prediction]]:
        tracker = Tracker() if self.options.track else None
        for picture, prediction in predicted:
            prediction = self.options.keep(prediction)
            if tracker is not None:
                prediction = tracker.update(prediction)
            yield picture, prediction

    def _write(self, item: tuple[Picture, Prediction]) -> Picture:
        picture, prediction = item
        picture.num_objects = len(prediction)
        if "coco" in self.results:
            picture.results["coco"] = describe(prediction, picture, self.predictor)
        try:
            picture.overlay = self.files.write(picture.frame, prediction)
            image = self.files.labelled(picture.frame, picture.number)
            for kind in LABEL_WRITERS.keys() & self.results.keys():
                text = LABEL_WRITERS[kind](prediction, self.predictor.class_names, image)
                picture.results[kind] = [text]
        except InputError as error:
            picture.problem = f"{picture.frame.path}: {error}"
        except OSError as error:
            if error.errno not in PICTURE_ERRORS:
                raise
            picture.problem = f"{picture.frame.path}: cannot be written ({error})"
        picture.frame = replace(picture.frame, image=None)  # lets go of its pixels
        return picture


def add_overlay(video: VideoWriter, picture: Picture) -> Picture:
    """Returns the picture, its overlay now in the video."""
    if picture.overlay is not None:
        video.write(picture.overlay, picture.frame.seconds)
        picture.overlay = None
    return picture


def describe(
    prediction: Prediction, picture: Picture, predictor: PicturePredictor
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


class ProgressReport(Progress):
    """Counts pictures and objects.

    Args:
      total: pictures; None if that is not known.
    """

    def __init__(self, total: int | None):
        super().__init__("predicting", total, unit="pictures", every=PROGRESS_EVERY)
        self.pictures = self.objects = 0

    def count(self, objects: int) -> None:
        self.pictures += 1
        self.objects += objects
        self.update(self.pictures, f"{self.objects} objects")
