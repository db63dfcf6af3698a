"""Training in a padded shape that is larger than the batch: its losses and gradients are those
of arrays that fit, whatever the shape."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_coco
from tiny_network import tiny_config

from solov2_jax import ops, targets
from solov2_jax.config import read_config, save_config
from solov2_jax.data import buckets
from solov2_jax.data.build import build_train_batches, has_own_padding
from solov2_jax.models import build_model, resnet
from solov2_jax.structs import Batch
from solov2_jax.training.loss import build_loss
from solov2_jax.training.teacher import Teacher
from solov2_jax.training.workdir import as_begun

SIZES = ((40, 60), (64, 33))  # of the images; a batch of both is padded to 64 x 64
EXACT, SHARED = (64, 64), (96, 160)


def make_batch(shape):
    """Two images of `SIZES` with random content, three objects each, in arrays of a shape."""
    rng, (h, w) = np.random.default_rng(0), shape
    batch = {
        "image": np.full((2, h, w, 3), 77, np.uint8),  # what is beyond an image means nothing
        "image_size": np.int32(SIZES),
        "boxes": np.zeros((2, 4, 4), np.float32),
        "labels": np.int32([[0, 1, 1, 0], [1, 0, 1, 0]]),
        "centers": np.zeros((2, 4, 2), np.float32),
        "masks": np.zeros((2, 4, h // 4, w // 4), np.uint8),
        "valid": np.array([[True, True, True, False]] * 2),
        "image_id": np.arange(2, dtype=np.int32),
        "has_mask": np.array([[True, False, True, True], [True, True, False, True]]),
        "keypoints": np.zeros((2, 4, 2, 3), np.float32),
    }
    for b, (height, width) in enumerate(SIZES):
        colors = rng.integers(60, 90, (height, width, 1)) + 40 * (np.arange(width) > 30)[:, None]
        batch["image"][b, :height, :width] = colors
        for g in range(3):
            x0, y0 = rng.integers(0, 12, 2)
            x1, y1 = min(x0 + 10 + 9 * g, width), min(y0 + 14 + 8 * g, height)
            batch["boxes"][b, g] = x0, y0, x1, y1
            batch["centers"][b, g] = (x0 + x1) / 2, (y0 + y1) / 2
            batch["masks"][b, g, y0 // 4 : -(-y1 // 4), x0 // 4 : -(-x1 // 4)] = 1
            batch["keypoints"][b, g] = [[x0 + 1, y0 + 2, 2], [x1 - 1, y1 - 3, 1]]
    return jax.tree.map(jnp.asarray, batch)


def make_config():
    """Every term of the loss, and norms over the map in all parts."""
    config = tiny_config()
    config.model.num_classes = 2
    config.model.backbone.norm = "gn"
    config.model.keypoint_head.names, config.model.keypoint_head.channels = ("a", "b"), 32
    config.data.mapper = "fcpose"
    config.targets.scale_ranges = ((1, 24), (12, 48), (24, 96), (48, 192), (96, 999))
    config.loss.semantic_weight = config.loss.mask_bce_weight = config.loss.boundary_weight = 1.0
    config.loss.box_supervised, config.loss.pairwise_warmup = True, 0
    return config


@pytest.fixture(scope="module")
def network():
    """Returns (config, model, variables, teacher), with one block a stage."""
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 18, ((1, 1, 1, 1), False))
        model = build_model(config, 2, auxiliary=True)
        variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, *EXACT, 3)))
        config.distill_from = "given"

        def outputs(variables, batch, extent=None):
            inside = ops.inside(batch["image_size"], *batch["image"].shape[1:3])[..., None]
            image = jnp.where(inside, batch["image"].astype(jnp.float32) / 99, 0)
            return model.apply(variables, image, extent)

        wave = lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape))  # noqa: E731
        yield config, model, variables, Teacher(jax.tree.map(wave, variables), outputs)


def loss_of(network, *, own_padding):
    """Returns (parameters, batch) -> (loss, metrics)."""
    config, model, variables, teacher = network
    loss = build_loss(config, model, own_padding=own_padding, teacher=teacher)
    state = {name: tree for name, tree in variables.items() if name != "params"}
    return jax.jit(lambda params, batch: loss(params, state, batch, jax.random.key(0)))


def test_losses_and_gradients_are_those_of_arrays_that_fit(network):
    params = network[2]["params"]

    def run(shape, own_padding):
        gradient = jax.value_and_grad(loss_of(network, own_padding=own_padding), has_aux=True)
        return jax.device_get(gradient(params, make_batch(shape)))

    (want, wanted_metrics), wanted_grads = run(EXACT, False)
    (loss, metrics), grads = run(SHARED, True)
    terms = ("ins", "cate", "mask_bce", "boundary", "projection", "pairwise")
    terms += ("semantic", "keypoint", "distill_mask", "distill_feature")
    assert all(wanted_metrics[f"loss_{name}"] > 0 for name in terms), wanted_metrics
    assert loss == pytest.approx(want, rel=1e-5)
    assert set(metrics) == set(wanted_metrics)
    for name, value in wanted_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    close = 5e-5 * max(np.abs(x).max() for x in jax.tree.leaves(wanted_grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=close), grads, wanted_grads
    )
    _, beside = loss_of(network, own_padding=False)(params, make_batch(SHARED))
    for name in terms:
        if name not in ("projection", "pairwise"):  # which see the box alone
            change = abs(beside[f"loss_{name}"] / wanted_metrics[f"loss_{name}"] - 1)
            assert change > 1e-3, f"{name}: the shape matters where nobody looks at it"


def test_cells_are_those_of_arrays_that_fit():
    """Bit by bit, also where a centre lies on a cell's border."""
    rng, grids = np.random.default_rng(2), (13, 9, 5)
    settings = {
        "num_grids": grids,
        "scale_ranges": ((1, 40), (20, 80), (40, 400)),
        "sigma": 0.2,
        "num_classes": 3,
        "max_pairs": 64,
        "key": jax.random.key(0),
    }

    def batch_of(objects, shape, extent=None):
        b = len(objects["boxes"])
        return Batch(
            image=jnp.zeros((b, *shape, 3)),
            image_size=jnp.zeros((b, 2), jnp.int32),
            masks=jnp.zeros(
                (b, objects["labels"].shape[1], shape[0] // 4, shape[1] // 4), jnp.uint8
            ),
            image_id=jnp.arange(b),
            extent=extent,
            **objects,
        )

    shared = jax.jit(lambda batch: targets.assign_targets(batch, **settings))
    for size in ((32, 32), (96, 64), (160, 192), (128, 224)):
        sides = np.array([size[1], size[0]])
        low = rng.random((2, 20, 2)) * sides * 0.7
        boxes = np.concatenate([low, low + rng.random((2, 20, 2)) * sides * 0.3 + 1], -1)
        centers = rng.integers(0, 13, (2, 20, 2)) / 13 * sides
        objects = {
            "boxes": jnp.float32(boxes),
            "centers": jnp.float32(centers),
            "labels": jnp.asarray(rng.integers(0, 3, (2, 20)), jnp.int32),
            "valid": jnp.asarray(rng.random((2, 20)) < 0.9),
        }
        want = targets.assign_targets(batch_of(objects, size), **settings)
        extent = jnp.tile(jnp.int32([size]), (2, 1))
        got = shared(batch_of(objects, (160, 224), extent))
        for field in dataclasses.fields(want):
            a, b = getattr(got, field.name), getattr(want, field.name)
            np.testing.assert_array_equal(a, b, err_msg=f"{field.name} at {size}")


def sized(tmp_path, sizes):
    """Returns a data set of images of (height, width), and a config to train on it."""
    config = tiny_config()
    config.input.min_sizes_train, config.input.max_size_train = (64, 80, 96), 160
    config.train.steps, config.train.batch_size = 3, 1
    tiny_coco.write(tmp_path)
    dataset = tiny_coco.load(tmp_path)
    sizes = np.resize(sizes, (len(dataset), 2))
    return dataclasses.replace(dataset, heights=sizes[:, 0], widths=sizes[:, 1]), config


def test_both_strides_are_one():
    assert ops.STRIDE == buckets.STRIDE


def test_two_shapes_hold_images_of_any_size(tmp_path):
    sizes = np.random.default_rng(0).integers(20, 200, (9, 2))
    dataset, config = sized(tmp_path, sizes)
    assert len(build_train_batches(config, dataset).buckets) <= 2
    assert has_own_padding(config, dataset)
    config.input.buckets_train = ((160, 160),)
    assert has_own_padding(config, dataset)


@pytest.mark.parametrize(
    "values, varies",
    [
        ({}, False),
        ({"input.buckets_train": ((64, 96),)}, True),
        ({"augment.crop_size": (0.5, 0.5)}, True),
        ({"augment.scale": (0.5, 2.0)}, True),
        ({"augment.mosaic_prob": 0.5}, True),
        ({"augment.brightness": 0.5, "augment.vflip_prob": 0.5, "augment.blur_prob": 0.1}, False),
        ({"augment.jitter_scale": (0.1, 2.0), "augment.crop_size": (0.5, 0.5)}, False),
    ],
)
def test_whether_padding_varies(tmp_path, values, varies):
    dataset, config = sized(tmp_path, (60, 60))
    config.input.min_sizes_train, config.input.max_size_train = (60,), 60
    config.update_from_flattened_dict(values)
    assert has_own_padding(config, dataset) == varies


def test_a_run_from_before_the_key_keeps_its_shapes(tmp_path):
    config, path = tiny_config(), tmp_path / "config.json"
    save_config(config, path)
    assert config.input.max_buckets_train == 2
    values = json.loads(path.read_text())
    del values["input"]["max_buckets_train"]
    path.write_text(json.dumps(values))
    assert read_config(path).input.max_buckets_train == 5
    assert as_begun(tmp_path, config).input.max_buckets_train == 2, "nothing was trained there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("solov2_jax.training.workdir.list_steps", lambda _: [3])
        assert as_begun(tmp_path, config).input.max_buckets_train == 5
        config.input.max_buckets_train = 3
        assert as_begun(tmp_path, config).input.max_buckets_train == 3, "as it is asked for"
