"""What a train step takes of the devices' memory, and the batch that fits: "auto".

A step is compiled from shapes alone and tells what it will take; no array is allocated.
"""

import logging
import os
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from solov2_jax import distributed
from solov2_jax.checkpoint import list_steps
from solov2_jax.config import read_config
from solov2_jax.config_schema import AUTO
from solov2_jax.data.build import (
    build_train_batches,
    load_train_dataset,
    pixel_format,
    with_keypoints,
)
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.training.build import build_optimizer, build_trainable
from solov2_jax.training.loss import build_loss
from solov2_jax.training.restore import abstract, state_of
from solov2_jax.training.step import TrainState, TrainStep
from solov2_jax.training.teacher import load_teacher

log = logging.getLogger("solov2_jax")

GB = 2.0**30
RGB = PixelFormat()
# Shares of the memory that a step may take. The rest: of an accelerator, fragments and the
# workspace of its libraries; of a machine, batches on their way, the data and Python.
DEVICE_SHARE, MACHINE_SHARE = 0.9, 0.7
# Images per device that are tried: with few numbers a small change of the free memory
# seldom changes the batch.
SIZES = tuple(sorted({base << n for n in range(18) for base in (1, 3)}))
# An epoch keeps so many steps; and from so many times the rate's own batch on, a warning.
STEPS_PER_EPOCH, MANY_TIMES = 16, 8


@dataclass(frozen=True)
class StepMemory:
    """What compiling the train step for a padded shape shows."""

    shape: tuple[int, int]  # (height, width)
    seconds: float  # to trace and compile, or to read from the compilation cache
    flops: float  # of a step, on one device
    state_bytes: int  # parameters, optimiser state and batch, on one device
    work_bytes: int  # everything else at the same time, on one device

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return self.state_bytes + self.work_bytes


def build_step(
    config: Any, mesh: jax.sharding.Mesh | None = None, *, own_padding: bool = False
) -> tuple[TrainStep, TrainState, jax.sharding.Mesh]:
    """Returns the train step, the shapes of its state, and the mesh, as the loop's.

    Args:
      own_padding: see `build_loss`.
    """
    mesh, accumulate = mesh or distributed.make_mesh(), config.train.accumulate
    distributed.check_batch_size(config.train.batch_size, mesh, accumulate)
    model = build_model(config, config.model.num_classes, auxiliary=True)
    image = jax.ShapeDtypeStruct((1, 64, 64, config.data.channels), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda k: dict(model.lazy_init(k, image)), key)
    trainable = build_trainable(config, variables["params"])
    _, tx = build_optimizer(config, trainable)
    step = TrainStep(
        loss=build_loss(config, model, teacher=load_teacher(config), own_padding=own_padding),
        tx=tx,
        mesh=mesh,
        key=key,
        trainable=trainable,
        accumulate=accumulate,
        ema_decay=config.optim.ema_decay,
    )
    ema = config.optim.ema_decay > 0
    state = jax.eval_shape(lambda v: state_of(v, tx, ema=ema), variables)
    return step, abstract(state, mesh), mesh


def batch_shapes(
    batch: int,
    slots: int,
    height: int,
    width: int,
    mesh: jax.sharding.Mesh,
    pixels: PixelFormat = RGB,
    boxes_only: bool = False,
    keypoints: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the devices receive of a batch, as shapes.

    Args:
      slots: padded objects per image.
      pixels: what the images hold.
      boxes_only: whether some object of the data has a box and no mask.
      keypoints: of an object.
    """
    fields = {
        "image": ((height, width, pixels.channels), pixels.dtype),
        "image_size": ((2,), jnp.int32),
        "boxes": ((slots, 4), jnp.float32),
        "labels": ((slots,), jnp.int32),
        "centers": ((slots, 2), jnp.float32),
        "mask_bits": ((slots, height // 4, width // 32), jnp.uint8),
        "valid": ((slots,), jnp.bool_),
        "image_id": ((), jnp.int32),
    }
    if boxes_only:
        fields["has_mask"] = ((slots,), jnp.bool_)
    if keypoints:
        fields["keypoints"] = ((slots, keypoints, 3), jnp.float32)
    split = distributed.split_by_batch(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)
        for name, (shape, dtype) in fields.items()
    }


def compile_step(step: TrainStep, state: Any, batch: Any, shape: tuple[int, int]) -> StepMemory:
    """Returns what the step of a batch's shapes takes."""
    start = time.perf_counter()
    compiled: Any = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    # The new state lies where the old one was; only what does not is counted again.
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return StepMemory(
        shape=shape,
        seconds=seconds,
        flops=compiled.cost_analysis()["flops"],
        state_bytes=memory.argument_size_in_bytes,
        work_bytes=memory.temp_size_in_bytes + max(extra, 0),
    )


# --- How much memory there is --------------------------------------------------------


def memory_limit() -> tuple[int, str]:
    """Returns (bytes that a step may take on one device, where that is from).

    Raises:
      InputError: if the devices do not tell.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free, grouped = psutil.virtual_memory().available, cgroup_available()
        place = "free on this machine"
        if grouped is not None and grouped < free:
            free, place = grouped, "left by the control group's limit"
        shared = f", shared by {len(devices)} CPU devices" if len(devices) > 1 else ""
        text = f"{100 * MACHINE_SHARE:.0f} % of the {free / GB:.1f} GB {place}{shared}"
        return int(MACHINE_SHARE * free / len(devices)), text
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    if not min(limits):
        raise InputError(
            f'train.batch_size = "auto": the device {devices[0].device_kind} does not tell its '
            "memory; give a number"
        )
    text = f"{100 * DEVICE_SHARE:.0f} % of {min(limits) / GB:.1f} GB of a {devices[0].device_kind}"
    return int(DEVICE_SHARE * min(limits)), text


def cgroup_available(root: str | os.PathLike[str] = "/") -> int | None:
    """Returns the bytes that this process's control groups leave; None: nothing limits it.

    Of version 1 and 2, those above included. Cached files that can be dropped are free.
    """
    root = pathlib.Path(root)
    left = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == base or base in folder.parents:
                if (free := _group_free(folder, names)) is not None:
                    left.append(free)
    return min(left, default=None)


def _group_free(folder: pathlib.Path, names: tuple[str, str, str]) -> int | None:
    limit, usage, droppable = names
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return max(most - used + int(stat.get(droppable, 0)), 0)


# --- The batch -----------------------------------------------------------------------


def resolve_batch_size(
    config: Any, workdir: pathlib.Path, dataset: CocoDataset | None = None
) -> Any:
    """Returns the config with a number where `train.batch_size` is "auto"; writes nothing.

    Of a run that resumes, it is that of its first start. The same in all processes.

    Args:
      dataset: to train on; None: read here.
    """
    if config.train.batch_size != AUTO:
        return config
    stored = distributed.broadcast_from_host0(lambda: _stored(workdir))
    if stored:
        number, lines = stored
        log.info("train.batch_size = %d, as this run began", number)
        return with_batch_size(config, number, lines)
    if dataset is None:
        dataset = load_train_dataset(config)
    trial = with_batch_size(config, 1, ())
    with trial.unlocked():
        trial.model.num_classes = len(dataset.class_names)
        trial = with_keypoints(trial, dataset)
        trial.train.epochs, trial.train.steps = 0.0, 1
    batches = build_train_batches(trial, dataset)
    maker: Any = batches.maker
    shape = max(batches.buckets, key=lambda s: s[0] * s[1])
    number, lines = choose_batch_size(
        trial, shape, maker.slots, len(maker.images), boxes_only=maker.boxes_only
    )
    return with_batch_size(config, number, lines)


def _stored(workdir: pathlib.Path) -> tuple[int, list[str]] | None:
    """Returns the batch of the run in a folder, and the table that led to it."""
    path = workdir / "config.json"
    if not list_steps(workdir) or not path.is_file():
        return None
    config = read_config(path)
    return config.train.batch_size, list(config.user.get("batch_size", ()))


def with_batch_size(config: Any, number: int, lines: Sequence[str]) -> Any:
    """Returns a copy of the config with a number, and its reasons as `user.batch_size`."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.train.batch_size = number
        if lines:
            config.user.batch_size = tuple(lines)
    return config


def choose_batch_size(
    config: Any,
    shape: tuple[int, int],
    slots: int,
    images: int | None = None,
    boxes_only: bool = False,
) -> tuple[int, list[str]]:
    """Returns (images per step, lines of the table that led to it).

    Args:
      config: with classes counted; its batch does not matter.
      shape: the largest padded (height, width).
      slots: padded objects per image.
      images: of an epoch; None: not known.
      boxes_only: whether some object of the data has a box and no mask.
    """
    mesh, pixels = distributed.make_mesh(), pixel_format(config)
    unit = mesh.size * config.train.accumulate
    most = SIZES[-1] if images is None else max(1, images // (STEPS_PER_EPOCH * unit))
    tried = (2, 4) if most >= 4 else (1, 2)
    log.info(
        'train.batch_size = "auto": compiling the step for %d and %d images to see what it '
        "takes, which lasts as long as two starts without a compilation cache",
        *(n * unit for n in tried),
    )
    step, state, mesh = build_step(with_batch_size(config, unit, ()), mesh, own_padding=True)
    further = (boxes_only, len(config.model.keypoint_head.names))
    batches = (batch_shapes(n * unit, slots, *shape, mesh, pixels, *further) for n in tried)
    measured = [compile_step(step, state, batch, shape).total for batch in batches]
    limit, source = memory_limit()
    # What one process sees, others may see a little differently: the worst holds for all.
    seen = distributed.gather([*measured, limit])
    first, second, limit = (f(r[i] for r in seen) for i, f in enumerate((max, max, min)))
    per_image = max((second - first) / (tried[1] - tried[0]), 1.0)
    takes = {n: first + (n - tried[0]) * per_image for n in SIZES}
    fitting = [n for n in SIZES if takes[n] <= limit and n <= most]
    chosen = max(fitting, default=1)
    lines = [
        f"train step at {shape[0]}x{shape[1]} on {mesh.size} x {mesh.devices.flat[0].device_kind}; "
        f"a device may take {limit / GB:.2f} GB: {source}",
        "images/step   GB per device",
    ]
    for n in SIZES[: SIZES.index(chosen) + 3]:
        notes = ["chosen"] * (n == chosen) or ["too much"] * (takes[n] > limit)
        notes += ["compiled"] * (n in tried)
        if n != chosen and takes[n] <= limit and n > most:
            notes = [f"fewer than {STEPS_PER_EPOCH} steps for {images} images"]
        lines.append(f"{n * unit:>11} {takes[n] / GB:>15.2f}   {', '.join(notes)}".rstrip())
    if not fitting:
        lines.append("no batch fits by this estimate: lower the image sizes, or use more devices")
    meant = config.optim.reference_batch_size
    if meant and chosen * unit >= MANY_TIMES * meant:
        lines.append(
            f"the rate is {chosen * unit / meant:.0f} times the one for {meant} images: lower "
            "optim.learning_rate, or give a smaller train.batch_size, if the loss does not fall"
        )
    (log.info if fitting else log.warning)("%s", "\n".join(lines))
    return chosen * unit, lines
