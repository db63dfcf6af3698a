"""A run's folder: what is written into it besides checkpoints, and who may resume it.

config.json  the resolved config          environment.json  versions, devices, command
classes.json names and category ids       train.log         everything that was logged
"""

import contextlib
import importlib.metadata
import logging
import logging.handlers
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

import solov2_jax
from solov2_jax import distributed, storage
from solov2_jax.checkpoint import had_checkpoint, list_steps, read_best, read_classes
from solov2_jax.classes import classes_difference, classes_record
from solov2_jax.config import (
    base_config,
    changed_keys,
    flatten,
    read_config,
    save_config,
    values_before_keys,
)
from solov2_jax.io import InputError, lock_file, reason, write_json
from solov2_jax.logging import PlainFormatter
from solov2_jax.pretrained import is_pretrained
from solov2_jax.training.optim import build_schedule

log = logging.getLogger("solov2_jax")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Keys, or groups of keys, that a run may change when it resumes: none of them changes
# a step that was or will be computed. The training data's place is among them because
# its content is compared by its fingerprint. `train.accumulate` changes roundings only,
# as the number of devices does.
_MAY_CHANGE = (
    *(
        "train.steps",
        "train.epochs",
        "train.eval_epochs",
        "train.log_every",
        "train.checkpoint_every",
        "train.eval_every",
    ),
    *("train.keep_checkpoints", "train.best_metric", "train.max_skipped"),
    *("train.patience", "train.watch_steps", "train.writers", "train.hooks", "train.checks"),
    "train.after_",
    *("train.histogram_every", "train.profile_steps"),
    "train.accumulate",
    *("init_from", "eval.", "test."),
    *("data.num_workers", "data.num_threads", "data.prefetch", "data.val.", "data.vals"),
    *("data.train.images", "data.train.annotations", "data.generated.root"),
    *("data.name", "data.providers.", "data.display_channels"),
    *("user.derived", "user.batch_size"),
    *("data.generated.num_val", "input.min_size_test", "input.max_size_test"),
    "input.buckets_test",
)
# Keys that shape the learning rate: they may change if the rates of the steps that are
# done stay the same, as with another milestone in the future.
_OF_RATES = {f"optim.{n}" for n in ("schedule", "milestones", "gamma", "num_decays")}
_OF_RATES |= {"optim.final_rate", "optim.decay_steps", "train.steps"}


def make_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """Creates the folder if need be; returns it as an absolute path."""
    path = storage.local_folder(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir {workdir}: cannot be created ({error.strerror}); give a folder "
            "that you may write to"
        ) from error
    return path


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the folder; a kill frees it too.

    What stands for object storage is put there meanwhile, and at the end.
    """
    if not distributed.is_primary():
        yield  # the first process holds it for all
        return
    message = (
        f"--workdir {workdir}: another process is training in it; wait for it, "
        "stop it, or give another folder"
    )
    mirror = storage.mirror_of(workdir)
    with lock_file(workdir / ".lock", message), mirror.held() if mirror else nullcontext():
        yield


@contextlib.contextmanager
def logging_to(path: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Appends what is logged inside `with` to a file, warnings of libraries included.

    Yields a function that makes a file that is not there yet: until it is called lines are
    kept in memory, and a new run that is refused before leaves no log. Later processes
    have files of their own, `train_process_1.log` and so on.
    """
    if number := jax.process_index():
        path = path.with_stem(f"{path.stem}_process_{number}")
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    kept = _KeptLines(file)
    libraries = _KeptLines(file)
    libraries.setLevel(logging.WARNING)
    both = {log: kept, logging.getLogger("absl"): libraries}
    for logger, handler in both.items():
        logger.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)

    def make_file() -> None:
        kept.write_through()
        libraries.write_through()

    if path.exists():
        make_file()
    try:
        yield make_file
    except BaseException as error:
        log.debug("stopped by %r", error)
        # With the traceback, for the file only.
        info = (type(error), error, error.__traceback__)
        text = "the run ended here"
        kept.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), info))
        raise
    finally:
        log.setLevel(level)
        for logger, handler in both.items():
            logger.removeHandler(handler)
            handler.close()
        try:
            file.close()
        except OSError as error:  # a full disk, which whatever it stops reports
            log.warning("%s: its last lines could not be written (%s)", path, reason(error))


class _KeptLines(logging.handlers.MemoryHandler):
    """Keeps what is logged until `write_through`, and forgets it if that never comes."""

    def __init__(self, file: logging.Handler) -> None:
        never = logging.CRITICAL + 1
        super().__init__(sys.maxsize, flushLevel=never, target=file, flushOnClose=False)

    def write_through(self) -> None:
        """Writes what was kept, and each further line at once."""
        self.capacity = 0
        self.flush()


def check_workdir(
    workdir: pathlib.Path, config: Any, names: Sequence[str], ids: Sequence[int]
) -> None:
    """Raises unless this run may start or go on in the folder; only reads.

    Args:
      names, ids: of the training data's classes.

    Raises:
      InputError: for another config, other classes, lost checkpoints, files that cannot
        be read, or folders that cannot be written to.
    """
    check_writable(workdir)
    read_best(workdir)
    if is_pretrained(workdir):
        raise InputError(
            f"--workdir {workdir}: holds the weights of a finished run; give another folder, and "
            f"--config.init_from={workdir} to start from them"
        )
    if not list_steps(workdir):
        check_nothing_lost(workdir)
        return
    check_same_config(workdir, config)
    before, now = read_classes(workdir), (list(names), [int(i) for i in ids])
    if before != now:
        raise InputError(
            f"{workdir} was trained with other classes than data.train has, such as "
            f"{classes_difference(now, before)}. Restore the annotations, or give another "
            f"--workdir (with --config.init_from={workdir} to start from its weights)"
        )


def check_writable(workdir: pathlib.Path) -> None:
    """Raises an InputError if something in the folder is in the way of what a run writes."""
    folders = ("checkpoints", "eval", "tensorboard", "profile")
    files = ("config.json", "classes.json", "environment.json", "metrics.jsonl", "metrics.csv")
    for name in (*folders, *files):
        path, is_folder = workdir / name, name in folders
        if path.exists() and path.is_dir() != is_folder:
            kind = "a folder" if is_folder else "a file"
            raise InputError(f"{path} should be {kind}; move it away")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{path}: not writable; change its permissions")


def check_nothing_lost(workdir: pathlib.Path) -> None:
    """Raises an InputError if a run in this folder has lost its checkpoints."""
    metrics = workdir / "metrics.jsonl"
    if had_checkpoint(workdir) and metrics.is_file() and metrics.stat().st_size:
        raise InputError(
            f"{workdir}: checkpoints/ has no checkpoint, but this run had saved some, and "
            "metrics.jsonl holds its metrics. Put the checkpoints back to resume it, or "
            "give another --workdir. To start it anew here, move metrics.jsonl away"
        )


def as_begun(workdir: pathlib.Path, config: Any) -> Any:
    """Returns the config, with what the run in this folder did before there was a key for it."""

    def before() -> dict[str, Any]:
        path = workdir / "config.json"
        return values_before_keys(path) if path.is_file() and list_steps(workdir) else {}

    default = flatten(base_config())
    values = distributed.broadcast_from_host0(before)
    values = {k: v for k, v in values.items() if flatten(config).get(k) == default[k]}
    if values:
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(values)
        for key, value in values.items():
            log.info("%s = %r, as this run began", key, value)
    return config


def check_same_config(workdir: pathlib.Path, config: Any) -> None:
    """Raises an InputError if another config made the checkpoints of the workdir.

    Keys that do not change what is computed may differ; that is logged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(
            f"{workdir} has checkpoints but no config.json, so it is unknown what made "
            "them. Give another --workdir"
        )
    old = read_config(path)
    changed = changed_keys(old, config)
    rates = changed.keys() & _OF_RATES
    last_step = list_steps(workdir)[-1]
    free = rates if rates and _same_rates(last_step, old, config) else set()
    refused = {
        key: values
        for key, values in changed.items()
        if key not in free and (key in rates or not key.startswith(_MAY_CHANGE))
    }
    if refused:
        keys = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in refused.items())
        raise InputError(
            f"{workdir} belongs to a run with another config: {keys}. Set these keys "
            "back to resume it, or give another --workdir (with "
            f"--config.init_from={workdir} to start from its weights)"
        )
    for key, (old, new) in changed.items():
        log.info("changed since the last start: %s was %r, is %r", key, old, new)


def _same_rates(steps: int, old: Any, new: Any) -> bool:
    """Returns whether two configs' learning rates are the same for the first steps."""
    step = np.arange(steps)
    before, after = (np.asarray(build_schedule(c)(step)) for c in (old, new))
    return np.array_equal(before, after)


def describe_run(
    workdir: pathlib.Path, config: Any, names: Sequence[str], ids: Sequence[int]
) -> None:
    """Writes config.json, classes.json and environment.json, once for all processes."""
    distributed.barrier("the config was compared")
    if not distributed.is_primary():
        return
    save_config(config, workdir / "config.json")
    write_json(classes_record(names, ids), workdir / "classes.json")
    write_json(environment(), workdir / "environment.json")


def environment() -> dict[str, Any]:
    """Returns versions, devices, revision and command line."""
    devices = jax.devices()
    return {
        "solov2_jax": solov2_jax.__version__,
        "revision": revision(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in devices],
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def revision() -> str | None:
    """Returns the source's git commit, "+changes" if files differ from it, or None."""
    git = ["git", "-C", os.path.dirname(__file__)]
    options = {"stderr": subprocess.DEVNULL, "text": True}
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], **options)
        status = subprocess.check_output(
            [*git, "status", "--porcelain", "--untracked-files=no"], **options
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if status.strip() else "")
