"""Training: `train(config, workdir)`, and what one derives from or builds on.

    from solov2_jax.training import HookBase, WriterBase, train

Start reading at `loop.py`, then `step.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "HookBase": "hooks",
        "Loss": "loss",
        "Run": "hooks",
        "Task": "build",
        "TrainState": "step",
        "TrainStep": "step",
        "WriterBase": "writers",
        "build_loss": "loss",
        "build_task": "build",
        "train": "loop",
    },
)
