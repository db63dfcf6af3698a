"""`--dry_run`, `--overfit` and the validation loss, with the smallest network."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_coco
import toy
from conftest import ROOT
from tiny_network import tiny_config, tiny_variables

from configs import base
from solov2_jax.config import apply_preset
from solov2_jax.data.batch import shapes_at
from solov2_jax.data.build import build_loss_batches, build_train_batches
from solov2_jax.distributed import make_mesh, put_batch, replicated
from solov2_jax.models import build_model
from solov2_jax.tools.cli.train import overfit_config, verdict
from solov2_jax.tools.dry_run import dry_run, format_rows
from solov2_jax.training.loop import batches_at
from solov2_jax.training.loss import ValidationLoss, build_loss, unpack_masks
from solov2_jax.training.memory import batch_shapes
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep


def small_config(folder=None):
    config = tiny_config()
    config.input.min_sizes_train = (32, 48)
    config.input.max_size_train = 64
    config.train.batch_size = 8
    if folder is not None:
        images, annotations = tiny_coco.write(folder)
        config.data.train.images = config.data.val.images = images
        config.data.train.annotations = config.data.val.annotations = annotations
    return config


def test_every_bucket_is_compiled_from_shapes(tmp_path):
    config = small_config()
    config.model.num_classes = 0
    config.input.buckets_train = ((32, 64), (64, 64))
    rows, notes = dry_run(config)
    assert [row.shape for row in rows] == [(32, 64), (64, 64)]
    small, large = rows
    assert 1.5 * small.flops < large.flops and small.work_bytes < large.work_bytes
    # One device of eight holds the state: two float32 for what is trained.
    shapes = jax.eval_shape(lambda: tiny_variables(config_with_classes(config)))
    least = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    assert least < small.state_bytes < 3 * least
    assert len(notes) == 2 and "80 classes assumed" in notes[0]
    text = format_rows(config, rows, notes)
    assert "32x64" in text and "programs: 2; most memory: 64x64" in text


def config_with_classes(config):
    config = config.copy_and_resolve_references()
    config.model.num_classes = 2
    return config


def test_the_shapes_are_those_of_real_batches(tmp_path):
    config = small_config(tmp_path)
    batches = build_train_batches(config, tiny_coco.load(tmp_path))
    whole = next(iter(batches))
    batches.packed = True
    batch = next(iter(batches))
    b, g = batch["valid"].shape
    assert whole["masks"].any() and whole["masks"].shape[3] == 8 * batch["mask_bits"].shape[3]
    jax.tree.map(
        np.testing.assert_array_equal, unpack_masks(jax.tree.map(jnp.asarray, batch)), whole
    )
    shapes = batch_shapes(b, g, *batch["image"].shape[1:3], make_mesh(1))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }


@pytest.mark.parametrize("ahead", [False, True])
def test_programs_are_bounded_by_the_buckets(tmp_path, ahead):
    """Over many epochs of images of three sizes at two scales: one for each bucket, and none
    besides those that were compiled ahead from the first batch."""
    config = small_config(tmp_path)
    config.train.steps = 40
    batches = build_train_batches(config, tiny_coco.load(tmp_path))
    mesh, key = make_mesh(8), jax.random.key(0)

    def loss(params, model_state, batch, key):
        return params["fpn"] * jnp.mean(jnp.float32(batch["image"])) * 1e-6, {}

    params = {"fpn": jnp.float32(1)}
    tx = optax.sgd(0.1)
    step = TrainStep(loss=toy.plain_loss(loss), tx=tx, mesh=mesh, key=key, trainable={"fpn": True})
    state = jax.device_put(state_of({"params": params}, tx), replicated(mesh))
    used = batches.maker.schedule.used_buckets()
    assert sorted(used) == sorted(batches.buckets)
    batches.packed = True
    seen = []
    for batch in batches:
        arrays = put_batch(batch, mesh)
        seen.append(batch["image"].shape[1:3])
        if ahead and len(seen) == 1:
            step.compile_ahead(state, batches_at(arrays, used))
        state, metrics = step(state, arrays)
    assert tuple(dict.fromkeys(seen)) == used and int(state.step) == 40
    assert 1 < step.compiles == len(used) and step.recompiles == 0
    assert float(metrics["loss"]) == pytest.approx(0.0, abs=1e-2)


def test_shapes_at_another_bucket_are_those_of_its_batches(tmp_path):
    config = small_config(tmp_path)
    config.train.steps = 20
    batches = build_train_batches(config, tiny_coco.load(tmp_path))
    batches.packed = True
    made = {batch["image"].shape[1:3]: batch for batch in batches}
    assert len(made) > 1
    for batch in made.values():
        batch["semantic"] = np.zeros(batch["image"].shape[:3], np.uint8)  # as pixel maps are
    for batch in made.values():
        for bucket, other in made.items():
            expected = {name: x.shape for name, x in other.items()}
            assert shapes_at(batch, bucket) == expected


def test_the_command_touches_neither_data_nor_workdir(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "train.py", f"--workdir={workdir}", "--dry_run"]
    command += ["--config=configs/quickstart.py", "--cpu_devices=1"]
    command += [f"--config.data.generated.root={tmp_path}/shapes"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "programs: 1; most memory: 128x128" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_overfit_trains_the_first_images_and_only_those(tmp_path):
    config = small_config(tmp_path)
    config.augment.rotate_prob = config.augment.brightness = 0.5
    config.augment.crop_size = (24, 24)
    config.augment.preset = "strong"
    apply_preset(config, {}, [])
    config.augment.custom = ("albumentations:CLAHE",)
    config.data.vals = (("far", str(tmp_path), "far.json"),)
    config.train.best_metric, config.train.accumulate = "far/segm/AP", 4
    changed = overfit_config(config, 2)
    off = base.get_config().augment
    assert changed.augment.to_dict() == off.to_dict(), "nothing is augmented"
    assert not changed.data.vals and changed.train.best_metric == "segm/AP50"
    assert changed.train.accumulate == 1, "a batch of two has no four parts"
    assert config.data.train.max_images == 0, "the config given stays"
    assert (changed.train.batch_size, changed.train.steps) == (2, 200)
    dataset = tiny_coco.load(tmp_path)
    batches = build_train_batches(changed, dataset)
    seen = [b["image_id"] for b in itertools.islice(batches, 4)]
    assert set(np.ravel(seen)) == {7, 3}
    assert changed.is_locked and overfit_config(config, 12).train.steps == 300
    with pytest.raises(ValueError, match="--overfit -1: give a number"):
        overfit_config(config, -1)


def test_the_verdict_is_one_line():
    assert verdict({"segm/AP50": 0.9}, 8) == (
        True,
        "overfit 8: segm/AP50 0.900 on the training images: passed",
    )
    passed, line = verdict({"segm/AP50": 0.1}, 8)
    assert not passed and "FAILED" in line and "\n" not in line


def test_validation_loss_is_the_mean_over_all_batches(tmp_path):
    """Of two batches, the loss is that of one batch with the images of both."""
    config = small_config(tmp_path)
    config.input.buckets_test = ((64, 64),)
    config.eval.loss_images = 3
    dataset = tiny_coco.load(tmp_path)
    model = build_model(config, 2)
    loss_fn, variables = build_loss(config, model), tiny_variables(config)
    batch = next(iter(build_loss_batches(config, dataset)))
    assert len(list(build_loss_batches(config, dataset))) == 1
    again = next(iter(build_loss_batches(config, dataset)))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    objects = batch["valid"].sum(1)
    assert objects.min() == 0 and objects.max() == 2, "unequal counts in the parts"

    def repeated(rows):
        """A batch of eight with only these rows' images, each as often."""
        return {k: v[np.resize(rows, 8)] for k, v in batch.items()}

    def loss_of(*batches):
        loss = ValidationLoss(loss_fn, lambda: batches)
        values = loss(variables)
        assert loss.compiles == 1
        return values

    first, second = int(objects.argmax()), int(np.flatnonzero(objects == 1)[0])
    both = loss_of(repeated([first, second]))
    apart = loss_of(repeated([first]), repeated([second]))
    assert both.keys() == {"val/loss", "val/loss_ins", "val/loss_cate", "val/mean_iou"}
    # Twice the images of one kind each; the + 1 of the class loss is then 1 in 2 n.
    assert apart["val/loss_ins"] == pytest.approx(both["val/loss_ins"], rel=1e-5)
    assert apart["val/mean_iou"] == pytest.approx(both["val/mean_iou"], rel=1e-5)
    assert apart["val/loss_cate"] == pytest.approx(both["val/loss_cate"], rel=0.05)
