import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from solov2_jax import distributed
from solov2_jax.training.restore import create_state
from solov2_jax.training.step import TrainStep


def make(num_devices, loss_fn=toy.toy_loss, **changes):
    task = toy.toy_task(toy.toy_config(**changes), None, loss=toy.plain_loss(loss_fn))
    mesh = distributed.make_mesh(num_devices)
    key = jax.random.key(0)
    state = create_state(task.init, task.tx, key, mesh)
    step = TrainStep(loss=task.loss, tx=task.tx, mesh=mesh, key=key, trainable=task.trainable)
    return mesh, state, step


def five_losses(num_devices):
    mesh, state, step = make(num_devices)
    losses = []
    for i in range(5):
        state, metrics = step(state, distributed.put_batch(toy.toy_batch(i), mesh))
        losses.append(jax.device_get(metrics))
    return losses, jax.device_get(state)


def test_losses_do_not_depend_on_the_number_of_devices():
    one, state = five_losses(1)
    assert one[4]["loss"] < one[0]["loss"]
    for num_devices in (2, 8):
        many, other = five_losses(num_devices)
        # Sums over the batch in another order: a few float32 roundings.
        compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(compare, (one, state), (many, other))


def test_frozen_parameters_and_model_state_do_not_change():
    mesh, state, step = make(1)
    before = jax.device_get(state)
    state, _ = step(state, distributed.put_batch(toy.toy_batch(0), mesh))
    after = jax.device_get(state)
    a, b = before.params["backbone"], after.params["backbone"]
    same = np.testing.assert_array_equal
    jax.tree.map(same, a["stem"], b["stem"])
    jax.tree.map(same, a["res3_0"]["conv1"]["norm"], b["res3_0"]["conv1"]["norm"])
    jax.tree.map(same, before.model_state, after.model_state)
    assert (a["res3_0"]["conv1"]["kernel"] != b["res3_0"]["conv1"]["kernel"]).all()
    assert after.step == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bad):
    mesh, state, step = make(2)
    state, metrics = step(state, distributed.put_batch(toy.toy_batch(0), mesh))
    assert metrics["skipped"] == 0
    before, batch = jax.device_get(state), toy.toy_batch(1)
    batch["label"][5, 1] = bad  # 1e30: the loss is finite, the gradient's square not
    state, metrics = step(state, distributed.put_batch(batch, mesh))
    assert metrics["skipped"] == 1
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    after = jax.device_get(state)
    assert after.step == 2
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=after.step), after)
    state, metrics = step(state, distributed.put_batch(toy.toy_batch(2), mesh))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    head = [x.params["ins_head"]["cate_pred"]["bias"] for x in (after, state)]
    assert (head[0] != np.asarray(head[1])).all()


def test_the_state_is_donated():
    mesh, state, step = make(1)
    step(state, distributed.put_batch(toy.toy_batch(0), mesh))
    assert state.params["ins_head"]["cate_pred"]["kernel"].is_deleted()


def test_one_compilation_for_each_shape(caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    mesh, state, step = make(8)
    small, large = toy.toy_batch(0, size=8), toy.toy_batch(0, size=16)
    for batch in (small, small, large, small, large):
        state, _ = step(state, distributed.put_batch(batch, mesh))
    assert (step.compiles, step.recompiles) == (2, 0)
    assert caplog.text.count("compiling the train step") == 2
    assert "8x2x2x3" in caplog.text and "16x2x2x3" in caplog.text


def test_a_recompilation_is_counted_and_logged(caplog):
    mesh, state, step = make(1)
    batch = distributed.put_batch(toy.toy_batch(0), mesh)
    state, _ = step(state, batch)
    jax.clear_caches()  # what a changed hidden setting would do
    step(state, batch)
    assert (step.compiles, step.recompiles) == (2, 1)
    assert "recompiled" in caplog.text


def test_the_key_of_a_step_depends_on_the_step_only():
    losses = []
    for _ in range(2):
        mesh, state, step = make(1, optim__learning_rate=1e-12)
        for _ in range(2):
            state, metrics = step(state, distributed.put_batch(toy.toy_batch(0), mesh))
            losses.append(float(metrics["loss"]))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_no_gradient_is_computed_for_frozen_stages():
    seen = []

    @jax.custom_vjp
    def watched(x):
        return x

    watched.defvjp(lambda x: (x, None), lambda _, g: (seen.append(1) or g,))

    def loss_fn(params, model_state, batch, key):
        stem = watched(params["backbone"]["stem"]["conv1"]["kernel"])
        loss, metrics = toy.toy_loss(params, model_state, batch, key)
        return loss + 0.0 * jnp.sum(stem), metrics

    for freeze_at, calls in ((2, 0), (0, 1)):
        seen.clear()
        mesh, state, step = make(1, loss_fn, model__backbone__freeze_at=freeze_at)
        step(state, distributed.put_batch(toy.toy_batch(0), mesh))
        assert len(seen) == calls


@pytest.mark.parametrize(("size", "message"), [(12, "use 8 or 16"), (3, "use 8"), (16, None)])
def test_batch_size_must_be_divisible_by_the_devices(size, message):
    mesh = distributed.make_mesh(8)
    if message is None:
        distributed.check_batch_size(size, mesh)
        return
    with pytest.raises(ValueError, match=f"batch_size = {size}.*8 devices: {message}"):
        distributed.check_batch_size(size, mesh)
