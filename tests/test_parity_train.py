"""Losses, gradients and optimiser steps against the reference, R18, 3 classes."""

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden_batch import CASES, make_batch, reference_names
from golden_weights import golden_model

from configs import base
from solov2_jax.training.build import build_optimizer
from solov2_jax.training.loss import build_loss
from solov2_jax.training.optim import trainable_mask


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("train")


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
