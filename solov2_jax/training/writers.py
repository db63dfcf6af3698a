"""Where numbers go: the console, `metrics.jsonl`, `metrics.csv` and TensorBoard.

Experiment trackers, for who asks for them in `train.writers`: wandb and mlflow.

Their packages are optional and imported when a run starts, so that nobody else needs
them. Both get the scalars, the pictures and the histograms that a `Writer` gets.
"""

import csv
import importlib
import io
import json
import logging
import math
import os
import pathlib
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

log = logging.getLogger("solov2_jax")


@runtime_checkable
class Writer(Protocol):
    """Writes what a step gave; a second call for a step adds to the first."""

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None: ...

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class WriterBase:
    """Writes nothing; the writers below fill in what they can show."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars by name; "a/b" is b in the group a."""

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """RGB pictures by name, uint8 [H, W, 3]."""

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Arrays by name, of which the distribution is of interest."""

    def close(self) -> None:
        """Called once, at the end, also after an error."""


class ConsoleWriter(WriterBase):
    """One line for people: losses, rate, images/s, waiting for data, ETA, memory."""

    def __init__(self, total_steps: int):
        self._total = total_steps

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if "learning_rate" not in scalars:
            return  # an evaluation prints its own table
        losses = [k for k in scalars if k.startswith("loss")]
        text = [f"step {step}/{self._total}"]
        text += [f"{k} {scalars[k]:.4f}" for k in sorted(losses)]
        if "mean_iou" in scalars:
            text.append(f"iou {scalars['mean_iou']:.3f}")
        text.append(f"lr {scalars['learning_rate']:.3g}")
        text.append(f"{scalars['images_per_second']:.2f} images/s")
        step_time, wait = scalars["step_seconds"], scalars["data_seconds"]
        text.append(f"step {step_time:.3f} s, of it data {wait:.3f} s")
        text.append(f"eta {duration(scalars['eta_seconds'])}")
        text.append(f"mem {scalars['memory_gb']:.1f} GB")
        if scalars["skipped_steps"]:
            text.append(f"SKIPPED {scalars['skipped_steps']:.0f}")
        if scalars["recompiles"]:
            text.append(f"RECOMPILES {scalars['recompiles']:.0f}")
        log.info("  ".join(text))


class JsonlWriter(WriterBase):
    """`metrics.jsonl`: one JSON object per step, appended.

    Opening it for a run that resumes cuts the lines beyond the resumed step, so each
    step appears once. Numbers that JSON does not know (nan, inf) are written as null.
    """

    def __init__(self, path: str | os.PathLike, resumed_step: int):
        self._path = pathlib.Path(path)
        kept = _lines_up_to(self._path, resumed_step)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, self._path)
        self._file = open(self._path, "r+")
        self._file.seek(0, os.SEEK_END)
        self.last = kept[-1] if kept else {}
        self._start = len(text) - len(json.dumps(self.last) + "\n") if kept else 0

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self.last and self.last["step"] == step:
            self._file.seek(self._start)
            self._file.truncate()
            line = {**self.last, **scalars}
        else:
            self._start = self._file.tell()
            line = {"step": step, **scalars}
        self.last = {k: _finite_or_none(v) for k, v in line.items()}
        try:
            self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path}: could not be written: {error}") from error

    def close(self) -> None:
        self._file.close()


class CsvWriter(WriterBase):
    """`metrics.csv`: a row per step, for spreadsheets; what a step lacks is empty.

    A new name is a new column, for which the file is written anew; that happens when
    the first evaluation comes. Rows beyond the resumed step are dropped.
    """

    def __init__(self, path: str | os.PathLike, resumed_step: int):
        self._path = pathlib.Path(path)
        self._rows: list[dict[str, Any]] = []
        if self._path.is_file():
            with open(self._path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit()]
            self._rows = [row for row in rows if int(row["step"]) <= resumed_step]
        names = [name for row in self._rows for name, value in row.items() if value]
        self._names = list(dict.fromkeys(["step", *names]))
        self._file = None
        self._rewrite()

    def write(self, step: int, scalars: dict[str, float]) -> None:
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
            self._append(self._rows[-1:])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _rewrite(self) -> None:
        self.close()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(",".join(self._names) + "\n")
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", newline="")
        self._append(self._rows)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        assert self._file is not None
        text = io.StringIO()
        csv.DictWriter(text, self._names, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue())
        self._file.flush()


class TensorBoardWriter(WriterBase):
    """Event files in `tensorboard/`; events beyond the resumed step are hidden."""

    def __init__(self, folder: str | os.PathLike, resumed_step: int):
        from tensorboardX import SummaryWriter

        purge = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(_tag(name), value, step)
        self._writer.flush()

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            self._writer.add_histogram(name, array, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(name: str) -> str:
    """Returns the name under its group of charts."""
    if "/" in name:
        return name
    kind = "losses" if name.startswith("loss") else "train"
    return f"{kind}/{name}"


def _finite_or_none(value: float | int | None) -> float | int | None:
    return value if value is not None and math.isfinite(value) else None


def _lines_up_to(path: pathlib.Path, step: int) -> list[dict]:
    """Returns the whole lines of a metrics file up to a step."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                kept.append(values)
        except (ValueError, KeyError, TypeError):
            log.warning("%s: dropped an incomplete line", path)
    return kept


def duration(seconds: float) -> str:
    """Returns 3:07:05 or 7:05, or 2 d 3:07:05."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(int(seconds), 86400)
    minutes, second = divmod(rest, 60)
    hours, minute = divmod(minutes, 60)
    clock = f"{hours}:{minute:02}:{second:02}" if hours or days else ""
    return (f"{days} d " if days else "") + (clock or f"{minute}:{second:02}")


PROJECT = "solov2_jax"


class WandbWriter(WriterBase):
    """Weights & Biases; where and as whom is said by its own WANDB_* variables."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._wandb = _import("wandb", "wandb")
        run = _read_id(folder, "wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=config,
            id=run,
            resume="allow" if run else None,
        )
        _write_id(folder, "wandb", self._run.id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        shown = {name: self._wandb.Image(image) for name, image in images.items()}
        self._run.log(shown, step=step)

    def write_histograms(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        shown = {name: self._wandb.Histogram(x) for name, x in arrays.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(WriterBase):
    """MLflow; where is said by its own MLFLOW_* variables. It has no histograms."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._mlflow = _import("mlflow", "mlflow-skinny")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = _read_id(folder, "mlflow")
        started = self._mlflow.start_run(run_id=run, run_name=folder.name)
        if run is None:
            self._mlflow.log_dict(config, "config.json")
        _write_id(folder, "mlflow", started.info.run_id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._mlflow.log_metrics(scalars, step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._mlflow.log_image(image, key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"train.writers has {name!r}, but its package cannot be imported "
            f"({error}): pip install {package}, or take it out of train.writers"
        ) from error


def _id_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f".{name}_run"


def _read_id(folder: pathlib.Path, name: str) -> str | None:
    """Returns the tracker's name of the run that is resumed, None for a new one."""
    path = _id_file(folder, name)
    return path.read_text() if path.is_file() else None


def _write_id(folder: pathlib.Path, name: str, run: str) -> None:
    _id_file(folder, name).write_text(run)
