"""The optimiser: SGD as the reference runs it, as an optax chain with path masks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def learning_rate_schedule(
    *,
    learning_rate: float,
    warmup_factor: float,
    warmup_steps: int,
    milestones: Sequence[int],
    gamma: float,
) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up times a staircase.

    The two are multiplied, so that a milestone counts from the first step and not
    from the end of the warm-up.

    Args:
      learning_rate: after the warm-up and before the first milestone.
      warmup_factor: of the rate at step 0; reaches 1 at `warmup_steps`.
      milestones: steps from which on the rate is multiplied by `gamma` once more.

    Source: detectron2/solver/lr_scheduler.py, WarmupMultiStepLR.
    """
    # In Python's float64, so that the only rounding left is the last one.
    rates = [learning_rate * gamma**i for i in range(len(milestones) + 1)]

    def schedule(step):
        passed = jnp.searchsorted(jnp.int32(tuple(milestones)), step, side="right")
        rate = jnp.float32(rates)[passed]
        if warmup_steps == 0:
            return rate
        done = jnp.minimum(step / warmup_steps, 1.0)
        return rate * (warmup_factor * (1.0 - done) + done)

    return schedule


def trainable_mask(params: PyTree, freeze_at: int, norm: str = "frozen_bn") -> PyTree:
    """Returns a tree of bools: True for the parameters that training may change.

    Args:
      freeze_at: 0 freezes no stage, 1 the stem, 2 stem and res2, ... 5 all.
      norm: of the backbone; the affine parameters of "frozen_bn" are never trained.

    Source: detectron2/modeling/backbone/resnet.py, ResNet.freeze.
    """
    frozen_stages = ("stem", "res2", "res3", "res4", "res5")[:freeze_at]

    def trainable(path, _) -> bool:
        names = _names(path)
        if names[0] != "backbone":
            return True
        if "norm" in names and norm == "frozen_bn":
            return False
        return names[1].split("_")[0] not in frozen_stages

    return jax.tree.map_with_path(trainable, params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    momentum: float,
    weight_decay: float,
    weight_decay_norm: float,
    clip_norm: float,
    trainable: PyTree,
) -> optax.GradientTransformation:
    """Returns the optimiser of the trainable parameters; the others have no state.

    "sgd" is clipping -> weight decay -> momentum -> rate: v = momentum v + g + decay w;
    w -= rate v. "adamw" is clipping -> Adam -> weight decay -> rate.

    Args:
      name: "sgd" or "adamw".
      momentum: of SGD, or the first of Adam's two; the second is 0.999.
      weight_decay: of weights and biases alike.
      weight_decay_norm: of the scale and bias of normalisation layers.
      clip_norm: largest L2 norm of all gradients together; 0: no clipping.
      trainable: tree of bools like the parameters.

    Raises:
      ValueError: for another name.

    Source: detectron2/solver/build.py (get_default_optimizer_params), torch.optim.SGD
    without Nesterov, torch.optim.AdamW.
    """
    decay = [
        optax.add_decayed_weights(weight_decay, mask=lambda p: _map_norm(p, False)),
        optax.add_decayed_weights(weight_decay_norm, mask=lambda p: _map_norm(p, True)),
    ]
    if name == "sgd":
        rule = [*decay, optax.trace(decay=momentum)]
    elif name == "adamw":
        rule = [optax.scale_by_adam(b1=momentum), *decay]
    else:
        raise ValueError(f"optim.name is {name!r}; choose 'sgd' or 'adamw'")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    chain = optax.chain(*clip, *rule, optax.scale_by_learning_rate(schedule))
    frozen = jax.tree.map(lambda flag: not flag, trainable)
    return optax.chain(
        optax.masked(chain, trainable), optax.masked(optax.set_to_zero(), frozen)
    )


def _map_norm(params: PyTree, value: bool) -> PyTree:
    """Returns a tree that is `value` on normalisation parameters, else not `value`."""

    def is_norm(path, _) -> bool:
        return any(name == "norm" or name.startswith("gn") for name in _names(path))

    return jax.tree.map_with_path(lambda p, x: is_norm(p, x) == value, params)


def _names(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
