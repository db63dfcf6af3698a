"""Training steps with each part of the zoo: finite, better, the same on 1 and 8 devices."""

import functools

import jax
import numpy as np
import pytest
from golden_backbones import SWIN_HEADS, WIDTHS

from configs import quickstart
from solov2_jax import distributed
from solov2_jax.config_schema import set_below
from solov2_jax.training.build import build_task
from solov2_jax.training.restore import create_state
from solov2_jax.training.step import TrainStep

SMALL = {
    "data.generated.image_size": (64, 64),
    "data.generated.num_train": 8,
    "input.min_sizes_train": (64,),
    "input.max_size_train": 64,
    "model.fpn.channels": 32,
    "model.ins_head.num_convs": 1,
    "model.ins_head.channels": 32,
    "model.ins_head.num_kernels": 32,
    "model.ins_head.num_grids": (8, 6, 4, 3, 2),
    "model.mask_head.channels": 32,
    "optim.warmup_steps": 0,
    "optim.learning_rate": 2e-3,
    "train.batch_size": 8,
    "train.steps": 6,
}
PARTS = {
    "deformed": {
        "model.backbone.norm": "sync_bn",
        "model.backbone.deep_stem": True,
        "model.backbone.avg_down": True,
        "model.dcn.stages": (5,),
        "model.dcn.towers": "last",
        "model.dcn.mask_head": True,
        "model.fpn.norm": "gn",
    },
    "convnext_t": {"options.depths": (1, 1, 1, 1), "options.widths": WIDTHS},
    "swin_t": {"options.depths": (1, 2, 1, 1), "options.heads": SWIN_HEADS, "options.width": 8},
    "dinov2_s": {
        "options.depth": 2,
        "options.width": 32,
        "options.heads": 2,
        "options.grid": 5,
        "optim.layer_decay": 0.9,
    },
}


def part_config(part):
    config = quickstart.get_config()
    for key, value in {**SMALL, **PARTS[part]}.items():
        key = f"model.backbone.{key}" if key.startswith("options.") else key
        set_below(config, key, value)
    if part != "deformed":
        config.model.backbone.name = part
    return config


def losses_of(task, num_devices):
    """Returns the losses of a few steps on one batch."""
    mesh, key = distributed.make_mesh(num_devices), jax.random.key(0)
    state = create_state(task.init, task.tx, key, mesh)
    step = TrainStep(loss=task.loss, tx=task.tx, mesh=mesh, key=key, trainable=task.trainable)
    batch = next(task.batches(0))
    losses = []
    for _ in range(4):
        state, metrics = step(state, distributed.put_batch(batch, mesh))
        assert not metrics["skipped"]
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow  # two compilations each
@pytest.mark.parametrize("part", PARTS)
def test_steps_with_a_part(tmp_path, part):
    task = build_task(part_config(part), tmp_path)
    one, eight = (losses_of(task, n) for n in (1, 8))
    assert np.isfinite(one).all() and one[-1] < one[0]
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    near(eight[0], one[0])  # sums in another order
    # Adam divides a gradient by its own size: rounding of small ones grows from step to step.
    np.testing.assert_allclose(eight, one, rtol=5e-3)
