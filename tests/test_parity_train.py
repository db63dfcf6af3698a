"""Losses, gradients and optimiser steps against the reference, R18, 3 classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden_weights import golden_model
from plain_masks import spans_of, stride4_of

from configs import base
from solov2_jax.data.rasterize import mass_centers
from solov2_jax.training.build import build_optimizer
from solov2_jax.training.loss import build_loss
from solov2_jax.training.optim import trainable_mask
from solov2_jax.weights.tables import to_adelaidet

SLOTS, SIZE = 8, (256, 320)
CASES = {"one": [0], "two": [0, 1], "empty_second": [0, None], "empty": [None, None]}


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("train")


def make_batch(arrays, images):
    """Padded fields of the golden images; None is an image without objects."""
    n = len(images)
    quarter_size = (SIZE[0] // 4, SIZE[1] // 4)
    fields = {
        "image": np.zeros((n, *SIZE, 3), np.uint8),
        "image_size": np.zeros((n, 2), np.int32),
        "boxes": np.zeros((n, SLOTS, 4), np.float32),
        "labels": np.zeros((n, SLOTS), np.int32),
        "centers": np.zeros((n, SLOTS, 2), np.float32),
        "masks": np.zeros((n, SLOTS, *quarter_size), np.uint8),
        "valid": np.zeros((n, SLOTS), bool),
        "image_id": np.arange(n),
    }
    for row, number in enumerate(images):
        # The reference's image without objects is its second one.
        pixels = arrays[f"image_{1 if number is None else number}"].transpose(1, 2, 0)
        h, w, _ = pixels.shape
        fields["image"][row, :h, :w] = pixels
        fields["image_size"][row] = h, w
        if number is None:
            continue
        masks = np.unpackbits(arrays[f"gt_masks_{number}"], axis=-1)[..., :w]
        count = len(masks)
        fields["boxes"][row, :count] = arrays[f"gt_boxes_{number}"]
        fields["labels"][row, :count] = arrays[f"gt_classes_{number}"]
        found = spans_of(masks)
        small = stride4_of(found, count, (h, w))
        fields["masks"][row, :count, : small.shape[1], : small.shape[2]] = small
        fields["centers"][row, :count] = mass_centers(found, count)[0]
        fields["valid"][row, :count] = True
    return jax.tree.map(jnp.asarray, fields)


@pytest.fixture(scope="module")
def task():
    config = base.get_config()
    config.model.num_classes = 3
    config.targets.max_pairs = 128
    model, variables = golden_model()
    loss_fn = build_loss(config, model)
    trainable = trainable_mask(variables["params"], config.model.backbone.freeze_at)
    _, tx = build_optimizer(config, trainable)
    stats = {"batch_stats": variables["batch_stats"]}

    @jax.jit
    def gradient(params, batch):
        return jax.value_and_grad(
            lambda p: loss_fn(p, stats, batch, jax.random.key(0)), has_aux=True
        )(params)

    return variables["params"], gradient, tx, trainable


def reference_names(params):
    """{reference name: array in the reference's layout} of a tree like the params."""
    flat = {"params/" + "/".join(k): np.asarray(v) for k, v in flatten_dict(params).items()}
    return to_adelaidet(flat)


def losses_of(metrics):
    return np.array([metrics["loss_ins"], metrics["loss_cate"]], np.float64)


@pytest.mark.parametrize("case", ["one", "two", "empty_second"])
def test_losses_and_gradient_norms(arrays, task, case):
    params, gradient, _, _ = task
    (_, metrics), grads = gradient(params, make_batch(arrays, CASES[case]))
    np.testing.assert_allclose(losses_of(metrics), arrays[f"{case}_losses"], rtol=1e-5)
    counts = [metrics["num_pairs"], metrics["num_cells"]]
    np.testing.assert_array_equal(counts, arrays[f"{case}_counts"])
    assert metrics["pairs_dropped"] == 0

    named = reference_names(grads)
    names, norms = arrays[f"{case}_grad_names"], arrays[f"{case}_grad_norms"]
    assert len(names) == 83
    got = np.array([np.linalg.norm(named[n].astype(np.float64)) for n in names])
    # float32's own noise in these gradients is up to 3e-3.
    np.testing.assert_allclose(got, norms, rtol=5e-3)
    if case == "one":
        for key in (k for k in arrays if k.startswith("one_grad.")):
            want = arrays[key]
            grad = named[key.removeprefix("one_grad.")]
            grad = grad if grad.shape == want.shape else grad[::32]  # stored sparsely
            error = np.linalg.norm(grad - want) / np.linalg.norm(want)
            assert error < 1e-2, (key, error)


def test_batch_without_objects_is_finite(arrays, task):
    """The reference stops at torch.cat of an empty list."""
    params, gradient, _, _ = task
    (loss, metrics), grads = gradient(params, make_batch(arrays, CASES["empty"]))
    assert metrics["loss_ins"] == 0 and metrics["num_pairs"] == 0
    assert np.isfinite(loss) and loss > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["ins_head"]["cate_pred"]["kernel"]).max() > 0
    assert np.abs(grads["ins_head"]["kernel_pred"]["kernel"]).max() == 0


def test_four_optimiser_steps(arrays, task):
    params, gradient, tx, trainable = task
    batch = make_batch(arrays, CASES["two"])
    before = flatten_dict(params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _, *want in arrays["steps_losses"]:
        (_, metrics), grads = gradient(params, batch)
        np.testing.assert_allclose(losses_of(metrics), want, rtol=1e-4)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    named = reference_names(params)
    names, norms = arrays["steps_norm_names"], arrays["steps_norms"]
    got = np.array([np.linalg.norm(named[n].astype(np.float64)) for n in names])
    np.testing.assert_allclose(got, norms, rtol=1e-5)
    for key in (k for k in arrays if k.startswith("steps_param.")):
        value, want = named[key.removeprefix("steps_param.")], arrays[key]
        value = value if value.shape == want.shape else value[::32]
        np.testing.assert_allclose(value, want, rtol=1e-3, atol=1e-5)
    for path, moves in flatten_dict(trainable).items():
        unchanged = np.array_equal(before[path], flatten_dict(params)[path])
        assert unchanged != moves, path
