"""Settings that follow from the data, each with its reason: what `train.py --data` sets."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from solov2_jax.config import is_used
from solov2_jax.config_schema import RGB_ONLY
from solov2_jax.data.coco import CocoDataset
from solov2_jax.tools.doctor.data_report import settings_of, spread
from solov2_jax.tools.doctor.grids import SHORT_SIDES, Advice, advise, compact
from solov2_jax.tools.doctor.measure import measure
from solov2_jax.weights.backbones import suggest_weights

LIMIT = 200  # images whose objects are measured: a second or two
STEP = 32
SCALES = (0.8, 1.0, 1.2)  # of the shorter side, in training; a padded shape or two for each
# What a CPU is given, where a step costs what its pixels cost and a run has few: the size
# for the objects of middle size, one scale, and small batches, of which it takes more. On
# nuclei (docs/results.md) 880 images at 320 pixels in batches of 2 reach AP 0.19, where 960
# crops of 320 pixels at the size for nine of ten objects, in batches of 4, reach 0.03.
CPU_WIDE, CPU_SCALES, CPU_BATCH = 0.5, (1.0,), 2
# AdamW's rate for 2 images, with pretrained weights and without; it grows as the square
# root of the batch.
RATE, RATE_FROM_RANDOM, RATE_BATCH = 3e-4, 5e-4, 2
FINAL_RATE = 0.01  # of the rate
# The average looks back over this share of the run.
AVERAGED = 0.05


@dataclass(frozen=True)
class Derived:
    """Values of keys that belong together, and why."""

    values: dict[str, Any]
    reason: str

    def line(self) -> str:
        pairs = ", ".join(f"{key} = {compact(value)}" for key, value in self.values.items())
        return f"{pairs}: {self.reason}"


def derive(
    config: Any,
    dataset: CocoDataset,
    given: Collection[str],
    *,
    devices: int = 1,
    on_cpu: bool = False,
) -> list[Derived]:
    """Returns the values for a training data set, without those of keys that are given.

    Args:
      config: with what is given applied.
      given: names of keys that the user has set.
      devices: that a batch is shared out to.
      on_cpu: whether these are no accelerators.
    """
    settings = settings_of(config)
    short = settings.short
    objects = measure(dataset, spread(len(dataset), LIMIT).tolist(), short, settings.max_size)
    choices = (short,) if "input.min_size_test" in given else SHORT_SIDES
    wide = CPU_WIDE if on_cpu else 0.9
    advice = advise(dataset, objects, settings.layout, short, choices=choices, wide=wide)
    batch = config.train.batch_size
    if "train.batch_size" not in given:
        wanted = min(advice.batch_size, CPU_BATCH) if on_cpu else advice.batch_size
        batch = -(-wanted // devices) * devices
    epochs = config.train.epochs
    if "train.epochs" not in given:
        epochs = math.ceil(max(config.train.epochs, 500 * batch / len(dataset)))
    steps = math.ceil(epochs * len(dataset) / batch) if epochs else config.train.steps
    every = [
        _sizes(advice, on_cpu=on_cpu),
        _grids(advice),
        *_limits(config, dataset),
        *_pairs(config, advice),
        *_from_random(config, given),
        *_of_channels(config),
        Derived(
            {"train.batch_size": batch},
            f"by the number of images, {len(dataset)}"
            + (", and small on a CPU, for more steps" if on_cpu else "")
            + "; lower it if memory does not suffice",
        ),
        _rate(batch, bool(config.init_from)),
        Derived(
            {"train.epochs": epochs},
            f"{config.train.epochs:g} epochs, at least 500 steps; ends earlier after "
            f"{config.train.patience} evaluations without a better one",
        ),
        Derived(
            {"optim.ema_decay": round(min(max(1 - 1 / (AVERAGED * steps), 0.9), 0.9998), 4)},
            f"the average looks back over {100 * AVERAGED:.0f} % of {steps} steps",
        ),
    ]
    left = [Derived({k: v for k, v in d.values.items() if k not in given}, d.reason) for d in every]
    return [each for each in left if each.values]


def _sizes(advice: Advice, *, on_cpu: bool) -> Derived:
    scales = CPU_SCALES if on_cpu else SCALES
    shorts = sorted({max(STEP, round(advice.short * s / STEP) * STEP) for s in scales})
    most = math.ceil(advice.max_size * scales[-1] / STEP) * STEP
    values = {
        "input.min_size_test": advice.short,
        "input.max_size_test": advice.max_size,
        "input.min_sizes_train": tuple(shorts),
        "input.max_size_train": most,
    }
    # The first reasons are about the size: the objects' sides, and whether tiles help.
    reasons = [r for r in advice.reasons if "pixels wide" in r or "tiles" in r]
    if on_cpu:
        reasons.append("a GPU is given the size for 9 of 10, and three scales")
    return Derived(values, "; ".join(reasons))


def _grids(advice: Advice) -> Derived:
    values = {
        "model.ins_head.num_grids": advice.layout.num_grids,
        "targets.scale_ranges": advice.layout.scale_ranges,
    }
    share = 100 * advice.collisions.untrained_share
    return Derived(values, f"{share:.2f} % of the objects have no grid cell of their own")


def _pairs(config: Any, advice: Advice) -> list[Derived]:
    most = int(advice.collisions.pairs.max(initial=0))
    if most <= config.targets.max_pairs:
        return []
    rounded = math.ceil(most / 64) * 64
    return [
        Derived({"targets.max_pairs": rounded}, f"an image has {most} pairs of cell and object")
    ]


def _limits(config: Any, dataset: CocoDataset) -> list[Derived]:
    """Returns room for images with more objects than are kept or counted."""
    most = int(np.max(dataset.objects_per_image, initial=0))
    room = math.ceil(1.25 * most / 100) * 100
    if most <= config.test.max_per_image:
        return []
    values = {
        "test.max_per_image": room,
        "test.nms_pre": max(config.test.nms_pre, 3 * room),
        "eval.max_detections": max(config.eval.max_detections, room),
    }
    return [Derived(values, f"an image has {most} objects")]


def _from_random(config: Any, given: Collection[str]) -> list[Derived]:
    """Returns what lets a backbone start from random weights, if it has to."""
    if config.init_from or "model.backbone.norm" in given:
        return []
    values: dict[str, Any] = {"model.backbone.freeze_at": 0}
    if is_used(config, "model.backbone.norm"):
        grouped = not config.model.backbone.name.startswith("mobilenet")  # too few channels
        values = {"model.backbone.norm": "gn" if grouped else "sync_bn", **values}
    reason = (
        "init_from is empty, so nothing is known before: far more data and epochs are needed "
        f"than from pretrained weights, {suggest_weights(config.model.backbone)}"
    )
    return [Derived(values, reason)]


def _of_channels(config: Any) -> list[Derived]:
    """Returns what pictures that are not 8-bit RGB need."""
    from solov2_jax.data.build import pixel_format  # brings grain and JAX; `--help` has neither

    if pixel_format(config).is_rgb:
        return []
    derived = []
    on = [key for key in RGB_ONLY if config.augment[key]]
    if on:
        values = {f"augment.{key}": 0.0 for key in on}
        derived.append(Derived(values, "the pictures are not 8-bit RGB"))
    if config.data.channels != 3 and config.init_from and config.model.backbone.freeze_at:
        reason = "the stem's weights were made for RGB, and have to be trained"
        derived.append(Derived({"model.backbone.freeze_at": 0}, reason))
    return derived


def _rate(batch: int, pretrained: bool) -> Derived:
    base = RATE if pretrained else RATE_FROM_RANDOM
    rate = float(f"{base * math.sqrt(batch / RATE_BATCH):.2g}")
    values = {"optim.learning_rate": rate, "optim.final_rate": float(f"{FINAL_RATE * rate:.2g}")}
    weights = "pretrained" if pretrained else "random"
    return Derived(values, f"for {batch} images per step, from {weights} weights")
