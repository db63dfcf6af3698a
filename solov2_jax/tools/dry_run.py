"""The train step compiled for every padded shape, from shapes alone: `--dry_run`.

Neither images nor annotations are opened and no array is allocated, so that a shape
that will not fit into the memory is known before the data is prepared.
"""

from typing import Any

import jax
import numpy as np

from solov2_jax.config_schema import AUTO
from solov2_jax.data.buckets import TOLERANCE, Bucket, Resize, check_buckets, derive_buckets
from solov2_jax.data.build import pixel_format, train_resize
from solov2_jax.training.memory import (
    STEPS_PER_EPOCH,
    StepMemory,
    batch_shapes,
    build_step,
    choose_batch_size,
    compile_step,
    with_batch_size,
)

# Where the config leaves them to the annotations: COCO's.
NUM_CLASSES, MAX_INSTANCES, PHOTOGRAPH = 80, 96, (480, 640)
NUM_POINTS = 17


def dry_run(config: Any) -> tuple[list[StepMemory], list[str]]:
    """Returns (a row for each padded shape, what had to be assumed)."""
    config = config.copy_and_resolve_references()
    notes = []
    with config.unlocked():
        if config.model.num_classes == 0:
            config.model.num_classes = NUM_CLASSES
            notes.append(f"model.num_classes is 0: {NUM_CLASSES} classes assumed")
        if config.data.mapper == "fcpose" and not config.model.keypoint_head.names:
            names = tuple(f"point {i + 1}" for i in range(NUM_POINTS))
            config.model.keypoint_head.names = names
            notes.append(f"model.keypoint_head.names is (): {NUM_POINTS} key points assumed")
        if config.data.max_instances == 0:
            config.data.max_instances = MAX_INSTANCES
            notes.append(f"data.max_instances is 0: {MAX_INSTANCES} objects per image assumed")
    resize = train_resize(config)
    height, width = PHOTOGRAPH
    if config.data.name == "shapes":
        height, width = config.data.generated.image_size
    elif not resize.buckets:
        notes.append(
            f"input.buckets_train is (): shapes for images of {height} x {width} and "
            f"{width} x {height} pixels assumed"
        )
    buckets = nominal_buckets(resize, height, width)
    varies = config.data.name != "shapes"
    if config.train.batch_size == AUTO:
        largest = max(buckets, key=lambda shape: shape[0] * shape[1])
        slots = config.data.max_instances
        number, _ = choose_batch_size(config, largest, slots)
        config = with_batch_size(config, number, ())
        notes.append(
            f"train.batch_size = {number} by memory; a training takes fewer images where an epoch "
            f"would have fewer than {STEPS_PER_EPOCH} steps"
        )
    step, state, mesh = build_step(config, own_padding=varies)
    rows = []
    for h, w in buckets:
        size, slots = config.train.batch_size, config.data.max_instances
        points = len(config.model.keypoint_head.names)
        batch = batch_shapes(size, slots, h, w, mesh, pixel_format(config), keypoints=points)
        rows.append(compile_step(step, state, batch, (h, w)))
    return rows, notes


def nominal_buckets(resize: Resize, height: int, width: int) -> tuple[Bucket, ...]:
    """Returns the padded training shapes where no data set is known.

    They are the configured ones, or else those of images of one size, upright and
    lying.
    """
    if resize.buckets:
        return check_buckets(resize.buckets, "input.buckets_train")
    sides = np.array([height, width])
    sizes = resize.sizes(sides, sides[::-1])
    return derive_buckets(sizes, resize.max_buckets, TOLERANCE["train"])


def format_rows(config: Any, rows: list[StepMemory], notes: list[str]) -> str:
    """Returns the rows as a table, with what was assumed."""
    devices = jax.devices()
    lines = [
        f"train step of {config.train.batch_size} images on {len(devices)} x "
        f"{devices[0].device_kind}; numbers of one device",
        "shape        compiled s   GFLOPs   state GB   work GB      total GB",
    ]
    for row in rows:
        name, gb = f"{row.shape[0]}x{row.shape[1]}", 2.0**30
        state, work = row.state_bytes / gb, row.work_bytes / gb
        lines.append(
            f"{name:<12} {row.seconds:>10.1f} {row.flops / 1e9:>8.1f} {state:>10.2f} "
            f"{work:>9.2f} {state + work:>13.2f}"
        )
    worst = max(rows, key=lambda row: row.state_bytes + row.work_bytes)
    lines.append(f"programs: {len(rows)}; most memory: {worst.shape[0]}x{worst.shape[1]}")
    return "\n".join([*lines, *notes])
