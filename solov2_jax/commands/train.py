r"""Trains SOLOv2, or resumes: the same command continues a run that was interrupted.

    solov2-train --config configs/r50_3x.py --workdir runs/r50 \
        --config.train.batch_size=8 --config.optim.learning_rate=0.005

Exit code 0: trained, or stopped by a signal with the checkpoint saved; 2: an error that
the one line `error: ...` explains.
"""

from absl import flags

from solov2_jax import cli
from solov2_jax.config import load_config

_CONFIG = flags.DEFINE_string(
    "config", None, "Config file; keys: configs/base.py.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; resumed if it has checkpoints.", required=True
)


def main(overrides: list[str]) -> None:
    """Trains as the flags say."""
    config = load_config(_CONFIG.value, overrides)
    from solov2_jax.training.loop import train  # slow to import: after the checks

    metrics = train(config, _WORKDIR.value)
    names = (config.train.best_metric, "segm/AP", "segm/AP50", "bbox/AP")
    for name in dict.fromkeys(names):
        if name in metrics:
            print(f"{name} {metrics[name]:.4f}")


def run() -> None:
    """Runs the command."""
    cli.run(main)
