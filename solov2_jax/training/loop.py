"""The training loop: `train(config, workdir)`, from the config to the final metrics."""

import contextlib
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from solov2_jax import distributed
from solov2_jax import logging as session
from solov2_jax.checkpoint import CheckpointManager
from solov2_jax.training import sharding, workdir
from solov2_jax.training.build import build_task
from solov2_jax.training.checkpoint_hooks import (
    BestCheckpoint,
    EarlyStop,
    Evaluation,
    PeriodicCheckpoint,
)
from solov2_jax.training.hooks import Hook, IterationTimer, LearningRate, PeriodicWriter, Run
from solov2_jax.training.metrics import MetricsWindow
from solov2_jax.training.precise_bn import PreciseBN
from solov2_jax.training.restore import restore
from solov2_jax.training.step import TrainStep
from solov2_jax.training.task import Task
from solov2_jax.training.visualization_hooks import Histograms, Pictures, Profiler
from solov2_jax.training.watchdog import Facts, LossWatchdog
from solov2_jax.training.writers import (
    ConsoleWriter,
    CsvWriter,
    JsonlWriter,
    MlflowWriter,
    TensorBoardWriter,
    WandbWriter,
    Writer,
)

log = logging.getLogger("solov2_jax")


def train(
    config: Any,
    folder: str | os.PathLike,
    build: Callable[[Any, pathlib.Path], Task] = build_task,
) -> dict[str, float]:
    """Trains until `train.steps`, or resumes, and returns the final evaluation.

    The same call continues a run that was killed, with the same numbers. A run that is
    stopped by SIGTERM or SIGINT (Ctrl-C, a notebook's stop button) saves first and
    returns {}. Where no logging is set up, the log is shown on standard output.

    Args:
      config: as `load_config` returns it.
      folder: the workdir.
      build: what is trained, on which data; tests pass something small.
    """
    path = workdir.make_workdir(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.locked(path))
        if distributed.is_primary():
            stack.enter_context(session.console_logging())
        stack.enter_context(workdir.logging_to(path / "train.log"))
        return _train(config, path, build, stack)


def _train(config, path, build, stack) -> dict[str, float]:
    mesh = sharding.make_mesh()
    parts = config.train.accumulate
    sharding.check_batch_size(config.train.batch_size, mesh, parts)
    task = build(config, path)
    config = task.config
    workdir.check_same_run(path, config)
    workdir.describe_run(path, config, task.class_names, task.category_ids)
    state, position = restore(config, path, task, mesh)
    step = int(state.step)
    if step >= config.train.steps:
        log.info("%d of %d steps are done: nothing to train", step, config.train.steps)

    # 1: of the steps; `restore` draws the initial weights with 0.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    given = task.loss_fn, task.tx, mesh, key, task.trainable
    decay = config.optim.ema_decay
    step_fn = TrainStep(*given, accumulate=parts, ema_decay=decay)
    window = MetricsWindow(config.train.max_skipped, position)
    size = config.train.batch_size
    run = Run(state, step, config.train.steps, size, step_fn, window)
    checkpoints = CheckpointManager(path, keep=config.train.keep_checkpoints)
    stack.callback(checkpoints.close)
    writers = make_writers(path, step, config, stack)
    hooks = make_hooks(config, path, task, checkpoints, writers)
    batches = stack.enter_context(contextlib.closing(task.batches(step)))
    with stop_on_signal(run):
        train_steps(run, batches, mesh, hooks)
    if run.interrupted:
        log.info(
            "stopped by %s after step %d of %d; the checkpoint is saved: the same "
            "command continues",
            *(run.stop, run.step, run.total_steps),
        )
        return {}
    return run.results


def train_steps(
    run: Run, batches: Iterator[dict[str, Any]], mesh: Any, hooks: Sequence[Hook]
) -> None:
    """Runs the steps that are left, with the hooks around them."""
    for hook in hooks:
        hook.before_train(run)
    previous: Any = ()
    vote = distributed.Vote(mesh)
    while not run.finished:
        if vote(bool(run.stop)):
            if not run.stop:
                run.stop, run.interrupted = "another process", True
            break
        for hook in hooks:
            hook.before_step(run)
        start = time.perf_counter()
        try:
            batch = next(batches)
        except Exception:
            # Ctrl-C reaches the reading processes too: save all the same. Of several
            # processes, the others are not at this step: no checkpoint then.
            if run.interrupted and jax.process_count() == 1:
                break
            raise
        run.data_seconds = time.perf_counter() - start
        arrays = sharding.put_batch(batch, mesh)
        run.state, metrics = run.step_fn(run.state, arrays)
        # The host stays one step ahead of the devices and not further: each step that
        # waits holds a batch in their memory.
        jax.block_until_ready(previous)
        previous = metrics
        run.step += 1
        run.window.add(run.step, metrics, batch["image_id"])
        for hook in hooks:
            hook.after_step(run)
    for hook in hooks:
        hook.after_train(run)


def make_writers(
    path: pathlib.Path, step: int, config: Any, stack: contextlib.ExitStack
) -> list[Writer]:
    """Returns the writers of this process: only the first process has any.

    Args:
      step: that the run resumes at.
      stack: closes them.
    """
    if not distributed.is_primary():
        return []
    makers: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoardWriter(path / "tensorboard", step),
        "csv": lambda: CsvWriter(path / "metrics.csv", step),
        "wandb": lambda: WandbWriter(path, config.to_dict()),
        "mlflow": lambda: MlflowWriter(path, config.to_dict()),
    }
    writers: list[Writer] = []
    for make in (
        lambda: JsonlWriter(path / "metrics.jsonl", step),
        lambda: ConsoleWriter(config.train.steps),
        *(makers[name] for name in config.train.writers),
    ):
        writers.append(make())
        stack.callback(writers[-1].close)
    return writers


def make_hooks(
    config: Any,
    path: pathlib.Path,
    task: Task,
    checkpoints: CheckpointManager,
    writers: Sequence[Writer],
) -> list[Hook]:
    """Returns the default hooks, in the order they are called.

    The metrics are written before the checkpoint of the same step, so that a resumed
    run never lacks a line.
    """
    train = config.train

    def position(run: Run) -> dict[str, Any]:
        return {
            "next_step": run.step,
            "seed": config.seed,
            "batch_size": train.batch_size,
            "data": task.fingerprint,
            **run.window.saved(),
            "classes": {
                "names": list(task.class_names),
                "ids": [int(i) for i in task.category_ids],
            },
        }

    precise = []
    if train.precise_bn and task.moments:
        given = task.moments, task.batches, train.eval_every, train.precise_bn
        precise = [PreciseBN(*given)]
    # Only the first process has written any; all must evaluate, or none.
    written = distributed.broadcast_from_host0(
        lambda: next((w.last for w in writers if isinstance(w, JsonlWriter)), {})
    )
    saver = PeriodicCheckpoint(checkpoints, train.checkpoint_every, position)
    return [
        Profiler(train.profile_steps, path / "profile"),
        IterationTimer(train.log_every),
        LearningRate(task.schedule, train.log_every),
        LossWatchdog(Facts.of(config, task.schedule), train.log_every, train.watch_steps),
        PeriodicWriter(writers, train.log_every),
        *precise,
        saver,
        Evaluation(task.evaluate, train.eval_every, writers, written),
        Pictures(path / "eval" / "pictures", writers),
        Histograms(writers, train.histogram_every),
        BestCheckpoint(saver, train.best_metric),
        EarlyStop(checkpoints, train.eval_every, train.patience),
    ]


@contextlib.contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the run after the present step.

    A second one has its usual effect, for who cannot wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers
        return
    usual = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        del frame
        run.stop, run.interrupted = signal.Signals(number).name, True
        log.warning("%s: saving after this step; once more to stop now", run.stop)
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
