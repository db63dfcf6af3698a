"""The optimiser as an optax chain, and which parameters it may change."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import optax

from solov2_jax.config import suggest

PyTree = Any


def trainable_mask(
    params: PyTree,
    freeze_at: int,
    norm: str = "frozen_bn",
    patterns: Sequence[str] = (),
) -> PyTree:
    """Returns a tree of bools: True for the parameters that training may change.

    Args:
      freeze_at: 0 freezes no stage, 1 the stem, 2 stem and res2, ... 5 all.
      norm: of the backbone; the affine parameters of "frozen_bn" are never trained.
      patterns: of names such as "fpn/lateral2/kernel" that are not trained either.

    Raises:
      ValueError: for a pattern that no name matches.

    Source: detectron2/modeling/backbone/resnet.py, ResNet.freeze.
    """
    frozen_stages = ("stem", "res2", "res3", "res4", "res5")[:freeze_at]
    _check_patterns(params, patterns)

    def trainable(path, _) -> bool:
        names = _names(path)
        if any(fnmatch.fnmatchcase("/".join(names), p) for p in patterns):
            return False
        if names[0] != "backbone":
            return True
        if "norm" in names and norm == "frozen_bn":
            return False
        return names[1].split("_")[0] not in frozen_stages

    return jax.tree.map_with_path(trainable, params)


def _check_patterns(params: PyTree, patterns: Sequence[str]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = ["/".join(_names(path)) for path, _ in leaves]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"optim.freeze: no parameter's name matches {pattern!r}"
                f"{suggest(pattern, names)} A * stands for anything, / included"
            )


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
