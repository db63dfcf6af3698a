r"""Trains SOLOv2, or resumes: the same command continues a run that was interrupted.

    solov2 train --config configs/r50_3x.py --workdir runs/r50 \
        --config.train.batch_size=8 --config.optim.learning_rate=0.005
    solov2 train --config configs/quickstart.py --workdir runs/dry --dry_run

`--dry_run` compiles the train step for every padded shape and prints time, FLOPs and
memory; neither data nor workdir is touched. `--overfit 8` is a self-test: it overfits
the first 8 training images, in a workdir of its own, and says whether it could.

Exit code 0: trained, or stopped by a signal with the checkpoint saved; 1: the self-test
failed; 2: an error that the one line `error: ...` explains.
"""

import functools
import sys

from solov2_jax.config import load_config
from solov2_jax.config_schema import switch, text, whole
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_CONFIG = Flag("config", text(), "Config file; keys: configs/base.py.", required=True)
_WORKDIR = Flag("workdir", text(), "Of the run; resumed if it has checkpoints.", required=True)
_DRY_RUN = Flag("dry_run", switch(False), "Compile only; print time, FLOPs and memory.")
_OVERFIT = Flag("overfit", whole(0), "Self-test: overfit so many training images. 0: train.")
FLAGS = (_CONFIG, _WORKDIR, _DRY_RUN, _OVERFIT, *shared.PROCESSES)


def main(overrides: list[str]) -> None:
    """Trains as the flags say."""
    config = load_config(_CONFIG.value, overrides)
    if _DRY_RUN.value:
        from solov2_jax.tools.dry_run import dry_run, format_rows

        print(format_rows(config, *dry_run(config)))
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


def self_test(config, number: int) -> int:
    """Returns the exit code of overfitting `number` images."""
    from solov2_jax.tools.overfit import overfit_config, verdict
    from solov2_jax.training.loop import build_task, train

    build = functools.partial(build_task, val_is_train=True)
    metrics = train(overfit_config(config, number), _WORKDIR.value, build)
    if not metrics:
        return 0  # stopped by a signal
    passed, line = verdict(metrics, number)
    print(line)
    return 0 if passed else 1


run = functools.partial(app.run, main, FLAGS, shared.run_joined)
