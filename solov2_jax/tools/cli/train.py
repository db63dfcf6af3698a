r"""Trains SOLOv2, or resumes: the same command continues a run that was interrupted.

    solov2 train --data FOLDER --workdir runs/mine --epochs 24
    solov2 train --config configs/r50_3x.py --workdir runs/r50 \
        --config.train.batch_size=8 --config.optim.learning_rate=0.005
    solov2 train --config configs/quickstart.py --workdir runs/dry --dry_run

`--data` takes a folder of annotated images as it is, prints what it found, and trains by
configs/finetune.py with settings that follow from the data, unless --config is given.

`--dry_run` compiles the train step for every padded shape and prints time, FLOPs and
memory; neither data nor workdir is touched. `--overfit 8` is a self-test: it overfits
the first 8 training images, in a workdir of its own, and says whether it could.

Exit code 0: trained, or stopped by a signal with the checkpoint saved; 1: the self-test
failed; 2: an error that the one line `error: ...` explains.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solov2_jax.config import base_config, given_keys, load_config
from solov2_jax.config_schema import AUTO, switch, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, own_data, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.cli.init_weights import adopt
from solov2_jax.tools.importers.kept import forgotten_if_refused

_CONFIG = Flag("config", text(), "Config file; keys: configs/base.py.")
_WORKDIR = Flag("workdir", text(), "Run's folder; resumed if it has checkpoints.", required=True)
_DRY_RUN = Flag("dry_run", switch(False), "Compile only; print time, FLOPs and memory.")
_OVERFIT = Flag("overfit", whole(0), "Self-test: overfit so many training images. 0: train.")
FLAGS = (_CONFIG, _WORKDIR, *own_data.FLAGS, _DRY_RUN, _OVERFIT, *shared.PROCESSES)

# segm/AP50 on the training images from which on the test is passed. A network that has
# overfit is far above it, even with stride-4 masks; a broken set-up stays near 0.
PASS_AP50 = 0.5
MIN_STEPS, STEPS_PER_IMAGE = 200, 25


def main(overrides: list[str]) -> None:
    workdir = Path(_WORKDIR.value)
    with forgotten_if_refused(workdir / "data", has_begun=(workdir / "config.json").exists):
        train_or_try(read_settings(overrides))


def train_or_try(config: Any) -> None:
    """Does what the flags ask for; prints the figures that count."""
    if _DRY_RUN.value:
        from solov2_jax.tools.dry_run import dry_run, format_rows

        tried = overfit_config(config, _OVERFIT.value) if _OVERFIT.value else config
        print(format_rows(tried, *dry_run(tried)))
        return
    from solov2_jax.evaluation.coco import format_metric
    from solov2_jax.training.loop import build_task, train

    if _OVERFIT.value:
        sys.exit(self_test(config, _OVERFIT.value))
    metrics = train(config, _WORKDIR.value, build_task)
    names = (config.train.best_metric, "segm/AP", "segm/AP50", "bbox/AP")
    for name in dict.fromkeys(names):
        if name in metrics:
            print(f"{name} {format_metric(metrics[name])}")


def read_settings(overrides: list[str]) -> Any:
    """Returns the config that the flags describe."""
    if own_data.EPOCHS.present:
        overrides = [*overrides, f"--config.train.epochs={own_data.EPOCHS.value:g}"]
    if own_data.DATA.value:
        write = not _DRY_RUN.value
        return own_data.own_config(_CONFIG.value, _WORKDIR.value, overrides, write=write)
    for flag in own_data.FLAGS:
        if flag.present and flag is not own_data.EPOCHS:
            raise InputError(f"--{flag.name} goes with --data")
    if not _CONFIG.value:
        raise InputError("--config is missing, or --data; see --help")
    config = load_config(_CONFIG.value, overrides)
    if config.init_from and not _DRY_RUN.value:
        adopt(config, given_keys(overrides), _WORKDIR.value)
    return config


def self_test(config: Any, number: int) -> int:
    """Returns the exit code of overfitting `number` images.

    Whatever is wrong with annotations, category ids, sizes, weights or normalisation shows
    in minutes: a network that cannot reproduce what it was trained on was not trained on
    what one thinks.
    """
    from solov2_jax.training.loop import build_task, train

    build = functools.partial(build_task, val_is_train=True)
    metrics = train(overfit_config(config, number), _WORKDIR.value, build)
    if not metrics:
        return 0  # stopped by a signal
    passed, line = verdict(metrics, number)
    print(line)
    return 0 if passed else 1


def overfit_config(config: Any, num_images: int) -> Any:
    """Returns the config with what overfitting the first `num_images` images takes.

    The same images in every epoch (one size, not augmented), a recipe for short runs,
    validation on the training images. Data, network and weights stay.
    """
    if num_images < 1:
        raise InputError(f"--overfit {num_images}: give a number of images, such as 8")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.train.max_images = config.eval.max_images = num_images
        input_, optim, train = config.input, config.optim, config.train
        input_.flip_prob = 0.0
        input_.min_sizes_train = (input_.min_size_test,)
        input_.max_size_train = input_.max_size_test
        input_.buckets_train = input_.buckets_test
        config.data.repeat_threshold = 0.0
        config.augment.update(base_config().augment)  # there, nothing is changed
        config.data.vals, train.best_metric, train.accumulate = (), "segm/AP50", 1
        with config.ignore_type():
            auto = train.batch_size == AUTO
            train.batch_size = num_images if auto else min(train.batch_size, num_images)
        train.epochs = 0.0
        train.steps = max(MIN_STEPS, STEPS_PER_IMAGE * num_images)
        train.checkpoint_every = train.eval_every = 0
        train.log_every = max(1, train.steps // 20)
        optim.name, optim.learning_rate, optim.reference_batch_size = "adamw", 5e-4, 0
        optim.schedule, optim.decay_steps, optim.final_rate = "cosine", 0, 0.0
        optim.warmup_steps, optim.clip_norm = train.steps // 10, 10.0
        optim.ema_decay = 0.0
        config.eval.num_pictures, config.eval.loss_images = num_images, 0
    return config


def verdict(metrics: Mapping[str, float | None], num_images: int) -> tuple[bool, str]:
    """Returns (whether the self-test is passed, one line that says so).

    Args:
      metrics: of the evaluation on the training images.
    """
    value = metrics["segm/AP50"]
    passed = value is not None and value >= PASS_AP50
    shown = "undefined (no objects)" if value is None else f"{value:.3f}"
    text = f"overfit {num_images}: segm/AP50 {shown} on the training images: "
    if passed:
        return True, text + "passed"
    return False, text + (
        f"FAILED, at least {PASS_AP50} is needed. Look at eval/pictures (is the ground "
        "truth on the left right?), at the line that says why masks are not learned, if "
        "there is one, and at init_from: a pretrained backbone learns much faster"
    )


run = functools.partial(app.run, main, FLAGS, shared.run_joined)
