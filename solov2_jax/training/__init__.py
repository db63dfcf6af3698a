"""Training: `train(config, workdir)`, and what one derives from or builds on.

    from solov2_jax.training import HookBase, WriterBase, train

Start reading at `loop.py`, then `step.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "HookBase": "hooks:HookBase",
        "Loss": "loss:Loss",
        "Run": "hooks:Run",
        "Task": "build:Task",
        "TrainState": "step:TrainState",
        "TrainStep": "step:TrainStep",
        "WriterBase": "writers:WriterBase",
        "build_loss": "loss:build_loss",
        "build_task": "build:build_task",
        "train": "loop:train",
    },
)
