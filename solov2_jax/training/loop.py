"""The training loop: `train(config, workdir)`, from the config to the final metrics."""

import contextlib
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from solov2_jax import distributed, storage
from solov2_jax import logging as console
from solov2_jax.checkpoint import CheckpointManager
from solov2_jax.classes import classes_record
from solov2_jax.data.batch import shapes_at
from solov2_jax.data.buckets import Bucket
from solov2_jax.evaluation.evaluate import Report, StopEvaluation
from solov2_jax.io import InputError, reason, unmade_if_empty
from solov2_jax.progress import Progress
from solov2_jax.training.build import Task, build_task
from solov2_jax.training.checkpoint_hooks import (
    BestCheckpoint,
    EarlyStop,
    Evaluation,
    PeriodicCheckpoint,
    check_metric,
)
from solov2_jax.training.hooks import (
    Histograms,
    HookBase,
    IterationTimer,
    LearningRate,
    PeriodicWriter,
    Pictures,
    PreciseBN,
    Profiler,
    Run,
    TrainingProgress,
    call_hooks,
)
from solov2_jax.training.memory import resolve_batch_size
from solov2_jax.training.metrics import MetricsWindow
from solov2_jax.training.report_hooks import Reports, have_reported, load_reports
from solov2_jax.training.restore import Start, restore
from solov2_jax.training.step import TrainStep
from solov2_jax.training.watchdog import LossWatchdog
from solov2_jax.training.workdir import (
    as_begun,
    check_workdir,
    describe_run,
    locked,
    logging_to,
    make_workdir,
)
from solov2_jax.training.writers import JsonlWriter, WriterBase, make_writers
from solov2_jax.user_code import check_objects, make_objects

log = logging.getLogger("solov2_jax")

# Keys of functions that are called with each evaluation, and with the last one.
_REPORTS = ("after_evaluation", "after_training")


def train(
    config: Any,
    workdir: str | os.PathLike,
    build: Callable[[Any, pathlib.Path], Task] = build_task,
    *,
    hooks: Sequence[HookBase] = (),
    writers: Sequence[WriterBase] = (),
) -> Mapping[str, float | None]:
    """Trains until `train.steps`, or resumes, and returns the final evaluation.

    The same call continues a run that was killed, with the same numbers. A run that is
    stopped by SIGTERM or SIGINT (Ctrl-C, a notebook's stop button) saves first and
    returns {}; one that an error ends saves too. Where no logging is set up, the log is
    shown on standard output.

    Args:
      config: as `load_config` returns it.
      workdir: the run's folder; nothing in it changes before every check has passed.
      build: what is trained, on which data; tests pass something small.
      hooks: called besides those that are always there, after them.
      writers: get the metrics besides those of `train.writers`.

    Raises:
      InputError: if config, data, weights or workdir do not allow it.
      FloatingPointError: if the run has diverged.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unmade_if_empty(storage.local_folder(workdir).absolute()))
        path = make_workdir(workdir)
        stack.enter_context(locked(path))
        if distributed.is_primary():
            stack.enter_context(console.console_logging())
        make_log = stack.enter_context(logging_to(path / "train.log"))

        allowed = check_run(config, path, build, hooks=hooks, writers=writers)
        make_log()
        return run_steps(allowed, path, stack)


@dataclass(frozen=True)
class Allowed:
    """A run that every check has let pass, and what the checks have read."""

    task: Task
    start: Start
    mesh: Mesh
    hooks: Sequence[HookBase]  # those besides the default ones
    writers: Sequence[WriterBase]  # the first process writes for all
    reports: Sequence[Mapping[str, Report]]  # for each of `_REPORTS`


def check_run(
    config: Any,
    path: pathlib.Path,
    build: Callable[[Any, pathlib.Path], Task],
    *,
    hooks: Sequence[HookBase],
    writers: Sequence[WriterBase],
) -> Allowed:
    """Does everything that can refuse a run; only reads."""
    check_objects(hooks, "hooks of train()", HookBase)
    check_objects(writers, "writers of train()", WriterBase)
    mesh = distributed.make_mesh()
    config = resolve_batch_size(as_begun(path, config), path)
    distributed.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    task = build(config, path)
    config = task.config
    if task.metric_names:
        check_metric(config.train.best_metric, task.metric_names)
    own_hooks = [*make_objects(config.train.hooks, "train.hooks", HookBase), *hooks]
    reports = [load_reports(config.train, key) for key in _REPORTS]
    all_writers = [*make_writers(config.train.writers), *writers]
    check_workdir(path, config, task.class_names, task.category_ids)
    start = restore(config, path, task, mesh)
    if not distributed.is_primary():
        all_writers = []
    for writer in all_writers:
        writer.check(path, int(start.state.step))
    return Allowed(task, start, mesh, own_hooks, all_writers, reports)


def run_steps(
    allowed: Allowed, path: pathlib.Path, stack: contextlib.ExitStack
) -> Mapping[str, float | None]:
    """Trains, and returns the final evaluation; from here on the folder changes.

    Args:
      stack: closes what is opened.
    """
    task, start, config = allowed.task, allowed.start, allowed.task.config
    step = int(start.state.step)
    describe_run(path, config, task.class_names, task.category_ids)
    start.record(path)
    if step >= config.train.steps:
        log.info("%d of %d steps are done: nothing to train", step, config.train.steps)
    run = make_run(config, task, start, allowed.mesh)
    checkpoints = CheckpointManager(path, keep=config.train.keep_checkpoints)
    stack.callback(checkpoints.close)
    for writer in allowed.writers:
        writer.open(path, step, config.to_dict())
        stack.callback(writer.close)
    about = {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "data": task.fingerprint,
        "classes": classes_record(task.class_names, task.category_ids),
    }
    saver = PeriodicCheckpoint(checkpoints, config.train.checkpoint_every, about=about)
    shown = stack.enter_context(Progress("training", config.train.steps, unit="steps", lines=False))
    hooks = [
        *make_hooks(config, path, task, saver, allowed.writers),
        Reports(task.finished, path, allowed.reports[0], allowed.reports[1]),
        *allowed.hooks,
        TrainingProgress(shown, config.train.epochs),
    ]
    batches = stack.enter_context(contextlib.closing(task.batches(step)))
    with stop_on_signal(run), saver.saving_after_error(run):
        train_steps(run, batches, allowed.mesh, hooks, task.buckets(step))
    if not run.interrupted:
        return run.results
    log.info(
        "stopped by %s after step %d of %d; the checkpoint is saved: the same command continues",
        run.stop,
        run.step,
        run.total_steps,
    )
    return {}


@jax.transfer_guard("disallow")
def train_steps(
    run: Run,
    batches: Iterator[dict[str, Any]],
    mesh: Mesh,
    hooks: Sequence[HookBase],
    buckets: Sequence[Bucket] = (),
) -> None:
    """Runs the steps that are left, with the hooks around them.

    Args:
      buckets: the padded shapes of the batches; several are compiled side by side.
    """
    call_hooks(hooks, "before_train", run)
    previous: Any = ()
    agree_on_stop = distributed.AgreeOnStop(mesh)
    while not run.finished:
        if run.all_stop or agree_on_stop(bool(run.stop)):
            if not run.stop:
                run.stop, run.interrupted = "another process", True
            break
        call_hooks(hooks, "before_step", run)
        start = time.perf_counter()
        try:
            batch = next(batches)
        except Exception as error:
            # Ctrl-C reaches the reading processes too: that is no error.
            if run.interrupted and jax.process_count() == 1:
                break
            if isinstance(error, (ValueError, OSError)):
                raise  # names the image or annotation
            raise InputError(
                f"no batch could be read after step {run.step} ({reason(error)}). If a "
                "reader process ran out of memory and was killed, lower data.num_workers or "
                "data.prefetch. The traceback is in train.log"
            ) from error
        run.data_seconds = time.perf_counter() - start
        with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
            arrays = distributed.put_batch(batch, mesh)
            if len(buckets) > 1 and jax.process_count() == 1:
                run.step_fn.compile_ahead(run.state, batches_at(arrays, buckets))
                buckets = ()
            run.state, metrics = run.step_fn(run.state, arrays)
        # The host stays one step ahead of the devices and not further: each step that
        # waits holds a batch in their memory.
        jax.block_until_ready(previous)
        previous = metrics
        run.step += 1
        run.window.add(run.step, metrics, batch["image_id"])
        call_hooks(hooks, "after_step", run)
    call_hooks(hooks, "after_train", run)


def batches_at(
    arrays: Mapping[str, jax.Array], buckets: Sequence[Bucket]
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Yields a batch on devices as it is for each padded shape, without its content."""
    for bucket in buckets:
        yield {
            name: jax.ShapeDtypeStruct(shape, arrays[name].dtype, sharding=arrays[name].sharding)
            for name, shape in shapes_at(arrays, bucket).items()
        }


def make_run(config: Any, task: Task, start: Start, mesh: Mesh) -> Run:
    """Returns the run as hooks see it, with its compiled step."""
    step_fn = TrainStep(
        loss=task.loss,
        tx=task.tx,
        mesh=mesh,
        # 1: of the steps; `restore` draws the initial weights with 0.
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        trainable=task.trainable,
        accumulate=config.train.accumulate,
        ema_decay=config.optim.ema_decay,
    )
    return Run(
        state=start.state,
        step=int(start.state.step),
        total_steps=config.train.steps,
        batch_size=config.train.batch_size,
        step_fn=step_fn,
        window=MetricsWindow(config.train.max_skipped, start.position),
        config=config,
    )


def _last_written(path: pathlib.Path, train: Any, writers: Sequence[WriterBase]) -> dict[str, Any]:
    """Returns the last line of metrics; {} if a kill left its evaluation without reports."""
    last = next((w.last for w in writers if isinstance(w, JsonlWriter)), {})
    step: Any = last.get("step", 0)
    wanted = any(train[key] for key in _REPORTS)
    if wanted and not have_reported(path, step, finished=step >= train.steps):
        return {}
    return last


def make_hooks(
    config: Any,
    path: pathlib.Path,
    task: Task,
    saver: PeriodicCheckpoint,
    writers: Sequence[WriterBase],
) -> list[HookBase]:
    """Returns the default hooks, in the order they are called.

    The metrics are written before the checkpoint of the same step, so that a resumed
    run never lacks a line.
    """
    train = config.train
    precise = []
    if train.precise_bn and task.loss.moments:
        precise = [PreciseBN(task.loss.moments, task.batches, train.eval_every, train.precise_bn)]
    # Only the first process has written any; all must evaluate, or none.
    written = distributed.broadcast_from_host0(lambda: _last_written(path, train, writers))
    return [
        Profiler(train.profile_steps, path / "profile"),
        IterationTimer(train.log_every),
        LearningRate(task.schedule, train.log_every),
        LossWatchdog(config, task.schedule),
        PeriodicWriter(writers, train.log_every),
        *precise,
        saver,
        Evaluation(
            task.evaluate,
            train.eval_every,
            writers,
            written,
            train.best_metric,
            raw_weights=config.eval.raw_weights,
        ),
        Pictures(path / "eval" / "pictures", writers),
        Histograms(writers, train.histogram_every),
        BestCheckpoint(saver, train.best_metric),
        EarlyStop(saver.checkpoints, train.eval_every, train.patience),
    ]


@contextlib.contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the run after the present step, or break off an evaluation.

    Of several processes, all leave the evaluation at the same place: they compute it in
    common. A second signal has its usual effect: the process ends at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers
        return
    usual = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        del frame
        run.stop, run.interrupted = signal.Signals(number).name, True
        log.warning("%s: saving a checkpoint; a second one ends at once", run.stop)
        for number, handler in usual.items():
            signal.signal(number, handler)
        distributed.request_stop()
        if run.evaluating and jax.process_count() == 1:
            raise StopEvaluation

    for number in usual:
        signal.signal(number, stop)
    try:
        yield
    finally:
        distributed.request_stop(False)
        for number, handler in usual.items():
            signal.signal(number, handler)
