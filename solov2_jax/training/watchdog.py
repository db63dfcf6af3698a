"""Says why the mask loss does not fall, in one line with the metrics that show it."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from solov2_jax.config import is_used
from solov2_jax.training.hooks import HookBase, Run
from solov2_jax.training.optim import warmup_steps

log = logging.getLogger("solov2_jax")

# A dice loss above this has not started to fall: masks overlap hardly at all.
STUCK_DICE = 0.95
# Above this, and with an IoU below that, every mask is empty: see `_reason`.
EMPTY_DICE, EMPTY_IOU = 0.999, 1e-4
# Below this share of images with a pair, most steps train no mask.
FEW_IMAGES = 0.25
# The norm of a gradient that changes nothing, and of one whose step is far too large.
SMALL_NORM, LARGE_NORM = 1e-4, 1e3


class LossWatchdog(HookBase):
    """Logs a line when `loss_ins` stays where it starts: dice loss 1, times its weight.

    Reads the means of the metrics' window, so it comes after a hook that fetches them
    and before the one that clears them.

    `train.watch_steps` are the steps without progress before a line, and between two
    lines; 0: never. A fifth of them where every mask is empty, which no step mends.
    """

    transfer_guard = "disallow"

    def __init__(self, config: Any, schedule: optax.Schedule):
        self._config, self._schedule = config, schedule
        self._last_good: int | None = None

    def before_train(self, run: Run) -> None:
        self._last_good = run.step

    def after_step(self, run: Run) -> None:
        train = self._config.train
        if not train.watch_steps or not run.due(train.log_every):
            return
        means = run.window.means()
        if "loss_ins" not in means:
            return
        stuck = means["loss_ins"] > STUCK_DICE * self._config.loss.dice_weight
        patience = train.watch_steps
        if _is_empty(self._config, means):
            patience = max(patience // 5, 1)
        if not stuck and means["num_pairs"] > 0:
            self._last_good = run.step
        elif run.step - (self._last_good or 0) >= patience:
            log.warning("%s", diagnose(self._config, self._schedule, run.step, means))
            self._last_good = run.step  # the next line after another such time


def diagnose(config: Any, schedule: optax.Schedule, step: int, means: Mapping[str, float]) -> str:
    """Returns why the masks are not learned, the likeliest reason first, with its metrics.

    Args:
      step: steps done.
      means: of the metrics over the latest steps.
    """
    with jax.transfer_guard("allow"):
        rate = float(np.asarray(schedule(step - 1)))
    metrics = (
        f"step {step}: masks are not learned: loss_ins {means['loss_ins']:.3f} of at "
        f"most {config.loss.dice_weight:g}, mean IoU of pairs {means['mean_iou']:.3f}, "
        f"{means['num_pairs']:.1f} pairs per step in {means['positive_images']:.1f} of "
        f"{config.train.batch_size} images, gradient norm {means['grad_norm']:.3g}, learning "
        f"rate {rate:.3g}. "
    )
    return metrics + "Why: " + _reason(config, step, means)


def _is_empty(config: Any, means: Mapping[str, float]) -> bool:
    above = means["loss_ins"] > EMPTY_DICE * config.loss.dice_weight
    return above and means["num_pairs"] > 0 and means["mean_iou"] < EMPTY_IOU


def _reason(config: Any, step: int, means: Mapping[str, float]) -> str:
    norm = means["grad_norm"]
    if means["num_pairs"] == 0:
        return (
            "no object falls on a grid cell. Compare your boxes' sizes, after the "
            "resize, with targets.scale_ranges, and see whether the images have "
            "annotations at all"
        )
    if means["positive_images"] < FEW_IMAGES * config.train.batch_size:
        return (
            "most images have no object that falls on a grid cell. Set data.keep_empty="
            "False, or compare the boxes' sizes with targets.scale_ranges"
        )
    if norm > LARGE_NORM:
        return (
            "the gradient is huge, the run has diverged. Lower optim.learning_rate, "
            "lengthen optim.warmup_steps or set optim.clip_norm=35, in a new --workdir"
        )
    if norm < SMALL_NORM:
        return (
            "the gradient vanishes. Look at what is frozen (optim.freeze, "
            "model.backbone.freeze_at) and at input.mean and input.std"
        )
    if _is_empty(config, means):
        return (
            "every mask is empty, far from its threshold: there dice has no gradient, so this "
            "does not mend itself. Start again in a new --workdir with a lower "
            "optim.learning_rate, a longer optim.warmup_steps, another seed, or "
            "loss.mask_bce_weight=1, whose gradient does not vanish there"
        )
    if step <= warmup_steps(config):
        return (
            f"the warm-up lasts until step {warmup_steps(config)}; wait, or shorten "
            "optim.warmup_steps"
        )
    frozen = config.model.backbone.norm == "frozen_bn"
    if frozen and is_used(config, "model.backbone.norm") and not config.init_from:
        return (
            "the backbone has random weights under a frozen batch norm, which does not "
            "normalise. Give pretrained weights in init_from, or set model.backbone."
            "norm=gn"
        )
    return (
        "pairs, gradient and weights look sound, so the rate, or the pixels' "
        f"normalisation (input.std is {tuple(config.input.std)}), does not fit. Try 3 x and 1/3 of "
        "optim.learning_rate, and train.py --overfit 8, which tells the recipe from "
        "the data"
    )
