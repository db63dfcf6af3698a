"""Where metrics go: console, `metrics.jsonl`, `metrics.csv`, TensorBoard, trackers, your own.

The packages of TensorBoard and of the experiment trackers (wandb, mlflow) are imported
when a run asks for them, so that nobody else needs them.
"""

import contextlib
import csv
import importlib
import io
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from solov2_jax.config import suggest
from solov2_jax.io import InputError, reason, write_text
from solov2_jax.training.metric_files import read_csv, read_metrics
from solov2_jax.user_code import failure, make_objects

log = logging.getLogger("solov2_jax")

Scalars = Mapping[str, float | None]
PROJECT = "solov2_jax"
T = TypeVar("T")


class WriterBase:
    """Writes nothing: derive from it and override what you need.

    `train(config, workdir, writers=[MyWriter()])`, or `train.writers = ("pkg.mod:MyWriter",)`
    in a config, which calls the class without arguments. Only the first process of a run
    has writers. What a method raises ends the run, after a checkpoint.
    """

    def check(self, workdir: pathlib.Path, step: int) -> None:
        """Called before the run changes anything: raises if it cannot write there.

        Args:
          step: that the run resumes at; 0: it starts.
        """

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        """Called once, before anything is written; drops what is beyond `step`."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Scalars by name; "a/b" is b in the group a. None: undefined.

        A second call for a step adds to the first: an evaluation's metrics.
        """

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """RGB pictures by name, uint8 [H, W, 3]."""

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Arrays by name, of which the distribution is of interest."""

    def close(self) -> None:
        """Called once, at the end, also after an error."""


def make_writers(names: Sequence[str]) -> list[WriterBase]:
    """Returns metrics.jsonl's and the console's writer, and those that `train.writers` names.

    Args:
      names: "tensorboard", "csv", "wandb", "mlflow", or import paths "module:Class".

    Raises:
      InputError: for another name, or where a package is missing.
    """
    known: dict[str, Callable[[], WriterBase]] = {
        "tensorboard": TensorBoardWriter,
        "csv": CsvWriter,
        "wandb": WandbWriter,
        "mlflow": MlflowWriter,
    }
    writers: list[WriterBase] = [JsonlWriter(), ConsoleWriter()]
    for name in names:
        if name in known:
            writers.append(known[name]())
        elif ":" in name:
            writers += make_objects([name], "train.writers", WriterBase)
        else:
            raise InputError(
                f"train.writers has {name!r}{suggest(name, known)} Known: "
                f"{', '.join(known)}; your own by its import path, 'module:Class'"
            )
    return writers


def call_writers(writers: Sequence[WriterBase], method: str, step: int, values: Any) -> None:
    """Hands values of a step to each writer.

    Raises:
      InputError: naming the writer, for an error that does not explain itself.
    """
    for writer in writers:
        try:
            getattr(writer, method)(step, values)
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise InputError(
                f"the writer {type(writer).__name__} failed in {method} at step {step}: "
                f"{failure(error)}. Its traceback is in train.log"
            ) from error


class ConsoleWriter(WriterBase):
    """One line for people: losses, rate, images/s, waiting for data, ETA, memory."""

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        self._total, self._epochs = config["train"]["steps"], config["train"].get("epochs", 0)

    def write(self, step: int, scalars: Scalars) -> None:
        values = _defined(scalars)
        if "learning_rate" not in values:
            return  # an evaluation prints its own table
        losses = [k for k in values if k.startswith("loss")]
        text = [f"step {step}/{self._total}"]
        if self._epochs:
            text[0] += f" (epoch {step / self._total * self._epochs:.1f}/{self._epochs:g})"
        text += [f"{k} {values[k]:.4f}" for k in sorted(losses)]
        if "mean_iou" in values:
            text.append(f"iou {values['mean_iou']:.3f}")
        text.append(f"lr {values['learning_rate']:.3g}")
        text.append(f"{values['images_per_second']:.2f} images/s")
        text.append(f"step {values['step_seconds']:.3f} s (data {values['data_seconds']:.3f} s)")
        text.append(f"eta {duration(values['eta_seconds'])}")
        text.append(f"mem {values['memory_gb']:.1f} GB")
        if values["skipped_steps"]:
            text.append(f"SKIPPED {values['skipped_steps']:.0f}")
        if values["recompiles"]:
            text.append(f"RECOMPILES {values['recompiles']:.0f}")
        log.info("  ".join(text))


class JsonlWriter(WriterBase):
    """`metrics.jsonl`: one JSON object per step, appended.

    A run that resumes cuts the lines beyond the resumed step, so each step appears
    once. What is undefined or not finite is written as null.

    Attributes:
      last: the line last written, of the run so far.
    """

    def check(self, workdir: pathlib.Path, step: int) -> None:
        lines = read_metrics(workdir / "metrics.jsonl")
        self._kept = [line for line in lines if line["step"] <= step]

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        self._path = workdir / "metrics.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in self._kept)
        write_text(text, self._path)
        self._file = open(self._path, "r+", encoding="utf-8")
        self._file.seek(0, os.SEEK_END)
        self.last = self._kept[-1] if self._kept else {}
        self._start = len(text) - len(json.dumps(self.last) + "\n") if self._kept else 0

    def write(self, step: int, scalars: Scalars) -> None:
        with writing(self._path):
            if self.last and self.last["step"] == step:
                self._file.seek(self._start)
                self._file.truncate()
                line = {**self.last, **scalars}
            else:
                self._start = self._file.tell()
                line = {"step": step, **scalars}
            self.last = {k: _finite_or_none(v) for k, v in line.items()}
            self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()

    def close(self) -> None:
        _close(self._file, self._path)


class CsvWriter(WriterBase):
    """`metrics.csv`: a row per step, for spreadsheets; what a step lacks is empty.

    A new name is a new column, for which the file is written anew; that happens when
    the first evaluation comes. Rows beyond the resumed step are dropped.
    """

    def check(self, workdir: pathlib.Path, step: int) -> None:
        rows = read_csv(workdir / "metrics.csv")
        self._rows: list[dict[str, Any]] = [row for row in rows if int(row["step"]) <= step]

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        self._path, self._file = workdir / "metrics.csv", None
        names = [name for row in self._rows for name, value in row.items() if value]
        self._names = list(dict.fromkeys(["step", *names]))
        self._rewrite()

    def write(self, step: int, scalars: Scalars) -> None:
        finite = {k: _finite_or_none(v) for k, v in scalars.items()}
        if self._rows and int(self._rows[-1]["step"]) == step:
            self._rows[-1] |= finite
        else:
            self._rows.append({"step": step, **finite})
        new = [name for name in scalars if name not in self._names]
        self._names += new
        if new or len(self._rows[-1]) > len(scalars) + 1:
            self._rewrite()
        else:
            with writing(self._path):
                assert self._file is not None
                self._file.write(self._text(self._rows[-1:]))
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            _close(self._file, self._path)

    def _rewrite(self) -> None:
        self.close()
        write_text(",".join(self._names) + "\n" + self._text(self._rows), self._path)
        self._file = open(self._path, "a", newline="", encoding="utf-8")

    def _text(self, rows: list[dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._names, lineterminator="\n").writerows(rows)
        return text.getvalue()


class TensorBoardWriter(WriterBase):
    """Event files in `tensorboard/`; events beyond the resumed step are hidden.

    Without tensorboardX's `SummaryWriter`, whose thread dies on a full disk, after which
    the run waits for it without end.
    """

    def __init__(self):
        self._summary = _import("tensorboardX.summary", "tensorboard", "tensorboardX")

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        self._folder, self._event = workdir / "tensorboard", Event
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            suffix = f".{os.getpid()}.{step}"  # two starts in one second
            self._events = EventsWriter(str(self._folder / "events"), suffix)
            if step:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=step + 1, session_log=start))
            self._events.flush()

    def write(self, step: int, scalars: Scalars) -> None:
        values = _defined(scalars).items()
        self._write(step, [self._summary.scalar(_tag(name), value) for name, value in values])

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        pictures = [self._summary.image(n, x, dataformats="HWC") for n, x in images.items()]
        self._write(step, pictures)

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        edges = 1e-12 * 1.1 ** np.arange(774)  # TensorBoard's own: up to 1e20
        bins = [*-edges[::-1], 0.0, *edges]
        self._write(step, [self._summary.histogram(n, x, bins) for n, x in arrays.items()])

    def close(self) -> None:
        _close(self._events, self._folder)

    def _write(self, step: int, summaries: Sequence[Any]) -> None:
        with writing(self._folder):
            for value in summaries:
                event = self._event(step=step, wall_time=time.time(), summary=value)
                self._events.write_event(event)
            self._events.flush()


class WandbWriter(WriterBase):
    """Weights & Biases; where and as whom is said by its own WANDB_* variables."""

    def __init__(self):
        self._wandb = _import("wandb", "wandb", "wandb")

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        run = _run_id(workdir, "wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            dir=str(workdir),
            config=config,
            id=run,
            resume="allow" if run else None,
        )
        write_text(self._run.id, workdir / ".wandb_run")

    def write(self, step: int, scalars: Scalars) -> None:
        self._run.log(_defined(scalars), step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        pictures = {name: self._wandb.Image(image) for name, image in images.items()}
        self._run.log(pictures, step=step)

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        histograms = {name: self._wandb.Histogram(x) for name, x in arrays.items()}
        self._run.log(histograms, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(WriterBase):
    """MLflow; where is said by its own MLFLOW_* variables. It has no histograms."""

    def __init__(self):
        self._mlflow = _import("mlflow", "mlflow", "mlflow-skinny")

    def open(self, workdir: pathlib.Path, step: int, config: dict[str, Any]) -> None:
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = _run_id(workdir, "mlflow")
        started = self._mlflow.start_run(run_id=run, run_name=workdir.name)
        if run is None:
            self._mlflow.log_dict(config, "config.json")
        write_text(started.info.run_id, workdir / ".mlflow_run")

    def write(self, step: int, scalars: Scalars) -> None:
        self._mlflow.log_metrics(_defined(scalars), step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._mlflow.log_image(image, key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in whatever goes wrong while it is written to."""
    try:
        yield
    except OSError as error:
        text = f"{path}: cannot be written ({reason(error)}). Free space or fix the folder"
        raise OSError(text) from error


def _close(file: Any, path: pathlib.Path) -> None:
    """Closes a file; after a full disk only says so, as the write before has raised."""
    try:
        file.close()
    except OSError as error:
        log.warning("%s: its last lines could not be written (%s)", path, reason(error))


def _tag(name: str) -> str:
    """Returns the name under its group of charts."""
    if "/" in name:
        return name
    kind = "losses" if name.startswith("loss") else "train"
    return f"{kind}/{name}"


def _finite_or_none(value: float | int | None) -> float | int | None:
    return value if value is not None and math.isfinite(value) else None


def _defined(scalars: Scalars) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if value is not None}


def duration(seconds: float) -> str:
    """Returns 3:07:05 or 7:05, or 2 d 3:07:05."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(int(seconds), 86400)
    minutes, second = divmod(rest, 60)
    hours, minute = divmod(minutes, 60)
    clock = f"{hours}:{minute:02}:{second:02}" if hours or days else ""
    return (f"{days} d " if days else "") + (clock or f"{minute}:{second:02}")


def _import(module: str, name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"train.writers has {name!r}, but its package cannot be imported "
            f"({error}): pip install {package}, or take it out of train.writers"
        ) from error


def _run_id(workdir: pathlib.Path, tracker: str) -> str | None:
    """Returns the tracker's name of the run that is resumed, None for a new one."""
    path = workdir / f".{tracker}_run"
    return path.read_text("utf-8") if path.is_file() else None
