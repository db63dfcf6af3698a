"""The train step compiled for every padded shape, from shapes alone: `--dry_run`.

Neither images nor annotations are opened and no array is allocated, so that a shape
that will not fit into the memory is known before the data is prepared.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solov2_jax import distributed
from solov2_jax.data.buckets import DERIVED, Bucket, Resize, check_buckets, derive_buckets
from solov2_jax.data.build import train_resize
from solov2_jax.models import build_model
from solov2_jax.training.build import build_optimizer, build_trainable
from solov2_jax.training.loss import build_loss
from solov2_jax.training.restore import abstract, state_of
from solov2_jax.training.step import TrainState, TrainStep

# Where the config leaves them to the annotations: COCO's.
NUM_CLASSES, MAX_INSTANCES, PHOTOGRAPH = 80, 96, (480, 640)


@dataclass(frozen=True)
class Compiled:
    """What compiling the train step for a padded shape shows."""

    shape: tuple[int, int]  # (height, width)
    seconds: float  # to trace and compile, or to read from the compilation cache
    flops: float  # of a step, on one device
    state_bytes: int  # parameters, optimiser state and batch, on one device
    work_bytes: int  # everything else at the same time, on one device


def dry_run(config: Any) -> tuple[list[Compiled], list[str]]:
    """Returns (a row for each padded shape, what had to be assumed)."""
    config = config.copy_and_resolve_references()
    notes = []
    with config.unlocked():
        if config.model.num_classes == 0:
            config.model.num_classes = NUM_CLASSES
            notes.append(f"model.num_classes is 0: {NUM_CLASSES} classes assumed")
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
    step, state, mesh = build_step(config)
    rows = []
    for h, w in nominal_buckets(resize, height, width):
        batch = batch_shapes(config.train.batch_size, config.data.max_instances, h, w, mesh)
        rows.append(_compile(step, state, batch, (h, w)))
    return rows, notes


def nominal_buckets(resize: Resize, height: int, width: int) -> tuple[Bucket, ...]:
    """Returns the padded training shapes where no data set is known.

    They are the configured ones, or else those of images of one size, upright and
    lying.
    """
    if resize.buckets:
        return check_buckets(resize.buckets, "input.buckets_train")
    sides = np.array([height, width])
    return derive_buckets(resize.sizes(sides, sides[::-1]), *DERIVED["train"])


def build_step(
    config: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[TrainStep, TrainState, jax.sharding.Mesh]:
    """Returns the train step, the shapes of its state, and the mesh, as the loop's."""
    mesh, accumulate = mesh or distributed.make_mesh(), config.train.accumulate
    distributed.check_batch_size(config.train.batch_size, mesh, accumulate)
    model = build_model(config, config.model.num_classes)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda k: dict(model.lazy_init(k, image)), key)
    trainable = build_trainable(config, variables["params"])
    _, tx = build_optimizer(config, trainable)
    step = TrainStep(
        loss=build_loss(config, model),
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
    batch: int, slots: int, height: int, width: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `Batch`'s fields as shapes on the mesh's devices.

    Args:
      slots: padded objects per image.
    """
    fields = {
        "image": ((height, width, 3), jnp.uint8),
        "image_size": ((2,), jnp.int32),
        "boxes": ((slots, 4), jnp.float32),
        "labels": ((slots,), jnp.int32),
        "centers": ((slots, 2), jnp.float32),
        "masks": ((slots, height // 4, width // 4), jnp.uint8),
        "valid": ((slots,), jnp.bool_),
        "image_id": ((), jnp.int32),
    }
    split = distributed.split_by_batch(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)
        for name, (shape, dtype) in fields.items()
    }


def _compile(step, state, batch, shape) -> Compiled:
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    # The new state lies where the old one was; only what does not is counted again.
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        shape=shape,
        seconds=seconds,
        flops=compiled.cost_analysis()["flops"],
        state_bytes=memory.argument_size_in_bytes,
        work_bytes=memory.temp_size_in_bytes + max(extra, 0),
    )


def format_rows(config: Any, rows: list[Compiled], notes: list[str]) -> str:
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
