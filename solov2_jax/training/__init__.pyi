"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.training.build import Task as Task
from solov2_jax.training.build import build_task as build_task
from solov2_jax.training.hooks import HookBase as HookBase
from solov2_jax.training.hooks import Run as Run
from solov2_jax.training.loop import train as train
from solov2_jax.training.loss import Loss as Loss
from solov2_jax.training.loss import build_loss as build_loss
from solov2_jax.training.step import TrainState as TrainState
from solov2_jax.training.step import TrainStep as TrainStep
from solov2_jax.training.writers import WriterBase as WriterBase
