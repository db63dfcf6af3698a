"""The learning rate by step, the optimiser as an optax chain, what it may change.

Learning rates are pure functions of the step: warm-up times a falling curve. The two are
multiplied, so that a milestone counts from the first step and not from the end of the
warm-up.
"""

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from solov2_jax.config import suggest
from solov2_jax.config_schema import as_steps
from solov2_jax.io import InputError
from solov2_jax.models.backbone import STAGES

PyTree = Any
# Names of normalisation layers: ours, and those that Flax gives.
_NORM = re.compile(r"norm|(gn|ln|out_ln)\w*|(Batch|Layer|Group|RMS)Norm_\d+")


def build_schedule(config: Any) -> optax.Schedule:
    """Returns step -> learning rate, as `config.optim` and `config.train` describe."""
    optim = config.optim
    scale = rate_scale(config)
    rate, steps = optim.learning_rate * scale, optim.decay_steps or config.train.steps
    warmup = {"factor": optim.warmup_factor, "steps": warmup_steps(config)}
    if optim.schedule == "cosine":
        return with_warmup(cosine(rate, optim.final_rate * scale, steps), **warmup)
    if optim.schedule == "multistep":
        milestones = tuple(as_steps(m, config.train.steps) for m in optim.milestones)
        if list(milestones) != sorted(milestones):
            raise InputError(
                f"optim.milestones = {tuple(optim.milestones)} are the steps {milestones} of "
                f"{config.train.steps}, which do not increase; give shares or steps, not both"
            )
    elif optim.schedule == "fixed_gamma":
        milestones = equal_milestones(optim.num_decays, steps)
    else:
        raise InputError(
            f"optim.schedule is {optim.schedule!r}; choose 'multistep', 'cosine' or 'fixed_gamma'"
        )
    return with_warmup(staircase(rate, milestones, optim.gamma), **warmup)


def warmup_steps(config: Any) -> int:
    """Returns the steps in which the rate rises."""
    return as_steps(config.optim.warmup_steps, config.train.steps)


def rate_scale(config: Any) -> float:
    """Returns what the configured rates are multiplied by for the batch size."""
    meant = config.optim.reference_batch_size
    return config.train.batch_size / meant if meant else 1.0


def describe_rate(config: Any) -> str:
    """Returns one line: the learning rate and how it fits the batch size."""
    optim, size = config.optim, config.train.batch_size
    rate = optim.learning_rate * rate_scale(config)
    if optim.reference_batch_size:
        how = (
            f"{optim.learning_rate:g} for {optim.reference_batch_size} images per step, "
            f"scaled to {size}"
        )
    else:
        how = f"as given, for {size} images per step"
    return f"learning rate {rate:g} ({how}), {optim.schedule}"


def with_warmup(curve: optax.Schedule, *, factor: float, steps: int) -> optax.Schedule:
    """Returns `curve` times a line from `factor` at step 0 to 1 at `steps`.

    Source: detectron2/solver/lr_scheduler.py, WarmupMultiStepLR. Its cosine goes from
    `factor` to the curve's value at the warm-up's end instead.
    """
    if steps == 0:
        return curve

    def schedule(step):
        done = jnp.minimum(step / steps, 1.0)
        return curve(step) * (factor * (1.0 - done) + done)

    return schedule


def staircase(rate: float, milestones: Sequence[int], gamma: float) -> optax.Schedule:
    """Returns a schedule that is multiplied by `gamma` once more at each milestone."""
    # In Python's float64, so that the only rounding left is the last one.
    rates = [rate * gamma**i for i in range(len(milestones) + 1)]

    def schedule(step):
        # Compared with all: the default's bisection is a loop on the device.
        passed = jnp.searchsorted(
            jnp.int32(tuple(milestones)), step, side="right", method="compare_all"
        )
        return jnp.float32(rates)[passed]

    return schedule


def equal_milestones(num_decays: int, steps: int) -> tuple[int, ...]:
    """Returns the steps that divide `steps` into `num_decays` + 1 equal parts.

    Source: fvcore/common/param_scheduler.py, StepWithFixedGammaParamScheduler.
    """
    return tuple(-(-i * steps // (num_decays + 1)) for i in range(1, num_decays + 1))


def cosine(rate: float, final: float, steps: int) -> optax.Schedule:
    """Returns half a cosine from `rate` to `final` at `steps`, `final` from then on.

    Source: fvcore/common/param_scheduler.py, CosineParamScheduler.
    """

    def schedule(step):
        done = jnp.minimum(step / max(steps, 1), 1.0)
        return final + 0.5 * (rate - final) * (1.0 + jnp.cos(jnp.pi * done))

    return schedule


def trainable_mask(
    params: PyTree,
    freeze_at: int,
    norm: str = "frozen_bn",
    patterns: Sequence[str] = (),
    stages: Sequence[Sequence[str]] = STAGES,
) -> PyTree:
    """Returns a tree of bools: True for the parameters that training may change.

    Args:
      freeze_at: 0 freezes no stage, 1 the first of `stages`, 2 the second too, ...
      norm: of the backbone; the affine parameters of "frozen_bn" are never trained.
      patterns: of names such as "fpn/lateral2/kernel" that are not trained either.
      stages: patterns of names within the backbone, see `Backbone.stages`.

    Raises:
      InputError: for a pattern that no name matches.

    Source: detectron2/modeling/backbone/resnet.py, ResNet.freeze.
    """
    frozen = [pattern for stage in stages[:freeze_at] for pattern in stage]
    _check_patterns(params, patterns)

    def trainable(path, _) -> bool:
        names = _names(path)
        if any(fnmatch.fnmatchcase("/".join(names), p) for p in patterns):
            return False
        if names[0] != "backbone":
            return True
        if "norm" in names and norm == "frozen_bn":
            return False
        return not any(fnmatch.fnmatchcase("/".join(names[1:]), p) for p in frozen)

    return jax.tree.map_with_path(trainable, params)


def check_groups(params: PyTree, groups: Sequence[Sequence[str]], key: str, method: str) -> None:
    """Raises an InputError where stages or layers of a backbone have no parameter at all.

    Args:
      groups: patterns of names within the backbone.
      key, method: what counts the groups, and what returns them, for the message.
    """
    names = ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [name.removeprefix("backbone/") for name in names if name.startswith("backbone/")]
    patterns = [pattern for group in groups for pattern in group]
    if names and patterns and not any(fnmatch.filter(names, pattern) for pattern in patterns):
        raise InputError(
            f"{key} is about parameters named {', '.join(patterns)}, and the backbone's are "
            f"{', '.join(names[:4])}, ...: return the patterns of theirs in its method {method}()"
        )


def _check_patterns(params: PyTree, patterns: Sequence[str]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = ["/".join(_names(path)) for path, _ in leaves]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(
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
    factor_of: Callable[[str], float] | None = None,
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
      factor_of: name of a parameter -> what its rate is multiplied by, as `layer_rates` returns
        it; None: one rate for all.

    Raises:
      InputError: for another name.

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
        raise InputError(f"optim.name is {name!r}; choose 'sgd' or 'adamw'")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    if factor_of is not None:
        rule.append(_scale_by_name(factor_of))
    chain = optax.chain(*clip, *rule, optax.scale_by_learning_rate(schedule))
    frozen = jax.tree.map(lambda flag: not flag, trainable)
    return optax.chain(optax.masked(chain, trainable), optax.masked(optax.set_to_zero(), frozen))


def layer_rates(layers: Sequence[Sequence[str]], decay: float) -> Callable[[str], float]:
    """Returns name of a parameter -> decay ** (number of layers from it to the backbone's end).

    The backbone's last layer has decay ** 1, what is no part of the backbone 1.

    Args:
      layers: patterns of names within the backbone, see `Backbone.layers`.

    Source: BEiT's and ConvNeXt's LayerDecayValueAssigner.
    """

    def factor(name: str) -> float:
        part, _, rest = name.partition("/")
        if part != "backbone":
            return 1.0
        for i, patterns in enumerate(layers):
            if any(fnmatch.fnmatchcase(rest, p) for p in patterns):
                return decay ** (len(layers) - i)
        return decay

    return factor


def _scale_by_name(factor_of: Callable[[str], float]) -> optax.GradientTransformation:
    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        del params
        return jax.tree.map_with_path(
            lambda path, x: x * factor_of("/".join(_names(path))), updates
        )

    return optax.stateless(scale)


def _map_norm(params: PyTree, value: bool) -> PyTree:
    """Returns a tree that is `value` on normalisation parameters, else not `value`."""

    def is_norm(path, _) -> bool:
        return any(map(_NORM.fullmatch, _names(path)))

    return jax.tree.map_with_path(lambda p, x: is_norm(p, x) == value, params)


def _names(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
