"""Kills a training run hard, at random points, again and again, until it is done.

    python tests/fault_injection.py --workdir DIR [--kills 20] [--seed 0] [--real]

Everything is imported once, before any device is started; each life of the run is a
fork of that process. The parent counts the batches that the run asks for, waits a
random moment more, and kills it: in starting, restoring, a step, a save, an
evaluation. A last life runs to the end. `--kills 0` is the uninterrupted run.
"""

import argparse
import logging
import os
import pathlib
import random
import select
import signal
import sys
import time
import traceback
import warnings

import jax
import toy

from solov2_jax.data.build import build_train_batches, load_datasets
from solov2_jax.training.build import build_task
from solov2_jax.training.loop import train

# Steps of a life before its kill: up to two saves, with what lies between.
MAX_STEPS = 7
SAVE_EVERY = 3
# Seconds after the last counted batch, or after the start.
MAX_WAIT, MAX_START = 0.05, 2.5


def make_config(kills: int, real: bool):
    """Returns a config whose run outlives that many kills."""
    changes = {
        "train__steps": kills * MAX_STEPS + 10,
        "train__checkpoint_every": SAVE_EVERY,
        "train__eval_every": 6,
        "train__log_every": 4,
        "train__writers": ("tensorboard", "csv"),
        "optim__ema_decay": 0.9,
        "optim__milestones": (100,),
    }
    config = toy.toy_config(**changes)
    return _real(config) if real else config


def _real(config):
    """Returns the config for the smallest SOLOv2 on generated images."""
    with config.unlocked():
        config.data.name = "shapes"
        config.data.num_workers = 0
        config.data.generated.num_train, config.data.generated.num_val = 24, 4
        config.data.generated.image_size = (64, 64)
        config.model.backbone.depth, config.model.backbone.norm = 18, "gn"
        config.model.fpn.channels = config.model.mask_head.channels = 32
        head = config.model.ins_head
        head.num_convs, head.channels, head.num_kernels = 1, 32, 32
        head.num_grids = (6, 5, 4, 3, 2)
        config.input.min_sizes_train = (48, 64)
        config.input.max_size_train = config.input.max_size_test = 64
        config.input.min_size_test = 64
        config.train.batch_size, config.eval.num_pictures = 2, 1
        config.train.eval_every = 48
    return config


def live(config, workdir: pathlib.Path, real: bool, pipe: int) -> None:
    """Trains in this process; writes a byte for each batch that is asked for."""

    def counted(batches):
        for batch in batches:
            os.write(pipe, b".")
            yield batch

    def build(config, folder):
        if not real:
            return toy.toy_task(config, folder, batches=batches_of)
        task = build_task(config, folder)
        data = load_datasets(task.config)[0]
        make = lambda step: counted(build_train_batches(task.config, data, step))  # noqa: E731
        return type(task)(**{**vars(task), "batches": make})

    def batches_of(step, size, seed):
        for batch in counted(toy.toy_batches(step, size, seed)):
            if step % 17 == 4:  # a step that is skipped
                batch["image"][0] = float("nan")
            yield batch
            step += 1

    train(config, workdir, build)


def log_to(path: pathlib.Path) -> None:
    """Sends everything that this process prints or logs to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.basicConfig(level=logging.INFO)


def one_life(config, args, kill_after: tuple[int, float] | None) -> bool:
    """Returns whether a life ended by itself; raises if it did so with an error.

    Args:
      kill_after: (batches, seconds after them); None: never.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            log_to(args.workdir.with_suffix(".log"))
            toy.cache_everything()
            live(config, args.workdir, args.real, writer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # never back into the parent's code
    os.close(writer)
    if kill_after is not None:
        steps, seconds = kill_after
        while steps > 0:
            got = os.read(reader, steps)
            steps -= len(got)
            if not got:
                break  # it ended before
        ended = select.select([reader], [], [], 0)[0] and not os.read(reader, 1)
        if not ended:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"a life ended with an error: see {args.workdir}.log")
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--length_of", type=int, default=20, help="kills it outlives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true")
    args = parser.parse_args()
    # JAX warns at every fork; none of its threads runs yet.
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    jax.config.update("jax_platforms", "cpu")
    config = make_config(args.length_of, args.real)
    if args.real:
        with config.unlocked():
            config.data.generated.root = str(args.workdir.parent / "shapes")
    rng, killed = random.Random(args.seed), 0
    while killed < args.kills:
        steps = rng.randint(0, MAX_STEPS)
        seconds = rng.uniform(0, MAX_WAIT if steps else MAX_START)
        if one_life(config, args, (steps, seconds)):
            raise RuntimeError(f"the run was done after {killed} kills; make it longer")
        killed += 1
        saved = args.workdir / "checkpoints"
        names = sorted(p.name for p in saved.iterdir()) if saved.is_dir() else []
        print(f"killed after {steps} batches and {seconds:.3f} s; {names}", flush=True)
    assert one_life(config, args, None)
    print(f"done after {killed} kills")


if __name__ == "__main__":
    main()
