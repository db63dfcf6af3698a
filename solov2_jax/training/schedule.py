"""Learning rates: pure functions of the step, warm-up times a falling curve.

The two are multiplied, so that a milestone counts from the first step and not from the
end of the warm-up.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax


def build_schedule(config: Any) -> optax.Schedule:
    """Returns step -> learning rate, as `config.optim` and `config.train` describe."""
    optim = config.optim
    scale = rate_scale(config)
    rate, steps = optim.learning_rate * scale, optim.decay_steps or config.train.steps
    warmup = {"factor": optim.warmup_factor, "steps": optim.warmup_steps}
    if optim.schedule == "cosine":
        return with_warmup(cosine(rate, optim.final_rate * scale, steps), **warmup)
    if optim.schedule == "multistep":
        milestones = tuple(optim.milestones)
    elif optim.schedule == "fixed_gamma":
        milestones = equal_milestones(optim.num_decays, steps)
    else:
        raise ValueError(
            f"optim.schedule is {optim.schedule!r}; choose 'multistep', 'cosine' or "
            "'fixed_gamma'"
        )
    return with_warmup(staircase(rate, milestones, optim.gamma), **warmup)


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
            f"{optim.learning_rate:g} for {optim.reference_batch_size} images a step, "
            f"scaled to {size}"
        )
    else:
        how = f"as given, for {size} images a step"
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
        passed = jnp.searchsorted(jnp.int32(tuple(milestones)), step, side="right")
        return jnp.float32(rates)[passed]

    return schedule


def equal_milestones(number: int, steps: int) -> tuple[int, ...]:
    """Returns the steps that divide `steps` into `number` + 1 equal parts.

    Source: fvcore/common/param_scheduler.py, StepWithFixedGammaParamScheduler.
    """
    return tuple(-(-i * steps // (number + 1)) for i in range(1, number + 1))


def cosine(rate: float, final: float, steps: int) -> optax.Schedule:
    """Returns half a cosine from `rate` to `final` at `steps`, `final` from then on.

    Source: fvcore/common/param_scheduler.py, CosineParamScheduler.
    """

    def schedule(step):
        done = jnp.minimum(step / max(steps, 1), 1.0)
        return final + 0.5 * (rate - final) * (1.0 + jnp.cos(jnp.pi * done))

    return schedule
