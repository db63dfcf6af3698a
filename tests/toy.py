"""A task that compiles in a second: the engine's tests train it instead of SOLOv2.

Also a command, for tests that kill it:

    python tests/toy.py --workdir DIR [--config.key=value] [--kill_at STEP]
"""

import contextlib
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import base  # noqa: E402
from solov2_jax.config import apply_overrides, check_config
from solov2_jax.config_schema import number, text, whole
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.training import optim
from solov2_jax.training.build import Task
from solov2_jax.training.loop import train
from solov2_jax.training.loss import Loss
from solov2_jax.training.optim import build_schedule

WORKDIR = Flag("workdir", text(), "Folder of the run.", required=True)
KILL_AT = Flag("kill_at", whole(-1, -1), "Step whose batch is never delivered.")
FAIL_AT = Flag("fail_at", whole(-1, -1), "Step whose batch is an error.")
WIDTH = Flag("width", whole(16, 1), "Of the layers.")
SECONDS_PER_BATCH = Flag("seconds_per_batch", number(0.0, 0), "To have time for a signal.")
FLAGS = (WORKDIR, KILL_AT, FAIL_AT, WIDTH, SECONDS_PER_BATCH, *shared.PROCESSES)


def toy_config(**changes):
    """Returns the base config with short periods; changes as train__steps=3."""
    config = base.get_config()
    config.train.steps = 12
    config.train.batch_size = 8
    config.train.log_every = 1
    config.train.checkpoint_every = 4
    config.optim.warmup_steps = 4
    config.optim.milestones = (8,)
    for key, value in changes.items():
        *groups, name = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    config.lock()
    return config


def toy_init(key, width=16):
    """Returns variables named like the network's: a frozen stage, a norm, a head."""
    keys = jax.random.split(key, 3)

    def kernel(key, a, b):
        return jax.random.normal(key, (a, b)) / np.sqrt(a)

    params = {
        "backbone": {
            "stem": {"conv1": {"kernel": kernel(keys[0], 12, width)}},
            "res3_0": {
                "conv1": {
                    "kernel": kernel(keys[1], width, width),
                    "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
                }
            },
        },
        "ins_head": {
            "cate_pred": {"kernel": kernel(keys[2], width, 3), "bias": jnp.zeros(3)},
            "gn0": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        },
    }
    return {"params": params, "batch_stats": {"mean": jnp.zeros(width)}}


def toy_loss(params, model_state, batch, key):
    """A small regression with noise, so that the step's key matters; a key for each row."""
    backbone, head = params["backbone"], params["ins_head"]
    x = batch["image"].reshape(batch["image"].shape[0], -1)
    x = jnp.tanh(x @ backbone["stem"]["conv1"]["kernel"])
    conv = backbone["res3_0"]["conv1"]
    norm = conv["norm"]
    x = (x - model_state["batch_stats"]["mean"][None]) @ conv["kernel"]
    x = jnp.tanh(x * norm["scale"][None] + norm["bias"][None])
    x = x + 0.1 * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(key)
    x = x * head["gn0"]["scale"][None] + head["gn0"]["bias"][None]
    y = x @ head["cate_pred"]["kernel"] + head["cate_pred"]["bias"][None]
    loss = jnp.mean(jnp.square(y - batch["label"]))
    return loss, {"loss_cate": loss, "num_pairs": jnp.sum(batch["label"] > 0)}


def plain_loss(loss_fn):
    """Returns the loss of a function of rows, (params, model_state, batch, keys) -> (mean
    loss, metrics: means where they are losses, else sums)."""

    def assign(batch, key, step):
        rows = len(jax.tree.leaves(batch)[0])
        return {"keys": jax.random.split(key, rows)}, jnp.float32(rows)

    def compute(params, model_state, batch, targets, num_rows, constants):
        loss, metrics = loss_fn(params, model_state, batch, targets["keys"])
        share = len(targets["keys"]) / num_rows
        metrics = {k: v * share if k.startswith("loss") else v for k, v in metrics.items()}
        return loss * share, (metrics, model_state)

    return Loss(assign=assign, compute=compute)


def toy_batch(step, size=8, seed=0):
    """Returns the batch of a step."""
    rng = np.random.default_rng((seed, step))
    return {
        "image": np.float32(rng.normal(size=(size, 2, 2, 3))),
        "label": np.float32(rng.normal(size=(size, 3)) + 2),
        "image_id": np.arange(step * size, (step + 1) * size),
    }


def toy_batches(start, size=8, seed=0):
    """Yields the batches from a step on."""
    while True:
        yield toy_batch(start, size, seed)
        start += 1


def rows_of_this_process(batches):
    """Yields the rows of each batch that this process reads: all, if it is alone."""
    index, count = jax.process_index(), jax.process_count()
    with contextlib.closing(batches):
        for batch in batches:
            n = len(batch["label"]) // count
            yield {k: v[index * n : (index + 1) * n] for k, v in batch.items()}


def toy_evaluate(variables):
    """Returns metrics that get worse after a while: the best is not the last."""
    norm = float(jnp.linalg.norm(variables["params"]["ins_head"]["cate_pred"]["bias"]))
    return {"segm/AP": float(np.sin(4 * norm)), "bbox/AP": norm}


def toy_task(config, workdir, *, batches=toy_batches, width=16, **replaced):
    """Returns the task; `replaced` are fields of it."""
    del workdir

    def init(key):
        return toy_init(key, width)

    params = jax.eval_shape(init, jax.random.key(0))["params"]
    o = config.optim
    trainable = optim.trainable_mask(params, config.model.backbone.freeze_at, patterns=o.freeze)
    schedule = build_schedule(config)
    tx = optim.make_optimizer(
        schedule,
        name="sgd",
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        weight_decay_norm=o.weight_decay_norm,
        clip_norm=o.clip_norm,
        trainable=trainable,
    )
    fields = {
        "config": config,
        "class_names": ("a", "b", "c"),
        "category_ids": (1, 5, 7),
        "init": init,
        "loss": plain_loss(toy_loss),
        "tx": tx,
        "schedule": schedule,
        "trainable": trainable,
        "batches": lambda step: rows_of_this_process(
            batches(step, config.train.batch_size, config.seed)
        ),
        "evaluate": toy_evaluate,
        "fingerprint": "toy",
    }
    return Task(**{**fields, **replaced})


def cache_everything():
    """Keeps small compiled programs too: the tests start the same ones many times."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def main(overrides):
    """Trains; kills itself hard when the batch of `--kill_at` is asked for."""
    cache_everything()
    config = toy_config()
    apply_overrides(config, overrides)
    check_config(config)

    def batches(step, size, seed):
        for batch in toy_batches(step, size, seed):
            if step == KILL_AT.value:
                print("killed", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if step == FAIL_AT.value:
                raise ValueError(f"image {step} is broken")
            time.sleep(SECONDS_PER_BATCH.value)
            yield batch
            step += 1

    def build(config, workdir):
        return toy_task(config, workdir, batches=batches, width=WIDTH.value)

    train(config, WORKDIR.value, build)


if __name__ == "__main__":
    app.run(main, FLAGS, shared.run_joined)
