"""The moving average of the weights: computed, saved, resumed, evaluated, used."""

import logging

import jax
import numpy as np
import pytest
import toy

from solov2_jax import distributed
from solov2_jax.checkpoint import restore_variables
from solov2_jax.training.loop import train
from solov2_jax.training.restore import create_state
from solov2_jax.training.step import TrainStep

DECAY = 0.3  # reached at step 3: the warm-up and what comes after it are both seen


def test_it_follows_the_formula_and_skipped_steps_leave_it_alone():
    task = toy.toy_task(toy.toy_config(optim__warmup_steps=0), None)
    mesh, key = distributed.make_mesh(2), jax.random.key(0)
    state = create_state(task.init, task.tx, key, mesh, ema=True)
    step = TrainStep(
        loss=task.loss,
        tx=task.tx,
        mesh=mesh,
        key=key,
        trainable=task.trainable,
        ema_decay=DECAY,
    )
    want = jax.device_get(state.variables)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), want)
    for t in range(6):
        batch = toy.toy_batch(t)
        if t == 2:
            batch["image"][0] = np.nan
        state, metrics = step(state, distributed.put_batch(batch, mesh))
        assert metrics["skipped"] == (t == 2)
        if t != 2:
            d = min(DECAY, (1 + t) / (10 + t))
            now = jax.device_get(state.variables)
            want = jax.tree.map(lambda a, x, d=d: d * a + (1 - d) * x, want, now)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.ema), want)
    frozen = [x["params"]["backbone"]["stem"] for x in (state.ema, state.variables)]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(frozen))


def test_without_it_nothing_is_kept(tmp_path):
    task, mesh = toy.toy_task(toy.toy_config(), None), distributed.make_mesh(1)
    state = create_state(task.init, task.tx, jax.random.key(0), mesh)
    assert state.ema is None
    train(toy.toy_config(train__steps=1), tmp_path, toy.toy_task)
    names = {p.name for p in (tmp_path / "checkpoints" / "1").iterdir()}
    assert {"variables", "optimizer", "position"} <= names and "ema" not in names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns (workdir, metrics, variables that were evaluated) of a run with it."""
    folder, seen = tmp_path_factory.mktemp("average"), []

    def evaluate(variables):
        seen.append(jax.device_get(variables))
        return toy.toy_evaluate(variables)

    build = lambda c, w: toy.toy_task(c, w, evaluate=evaluate)  # noqa: E731
    metrics = train(toy.toy_config(optim__ema_decay=0.5), folder, build)
    return folder, metrics, seen


def test_both_are_evaluated_saved_and_read(run):
    folder, metrics, (raw, average) = run
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, restore_variables(folder)[0], average)
    jax.tree.map(equal, restore_variables(folder, "best")[0], average)
    jax.tree.map(equal, restore_variables(folder, "last:raw")[0], raw)
    jax.tree.map(equal, restore_variables(folder, "12:raw")[0], raw)
    head = [x["params"]["ins_head"]["cate_pred"]["bias"] for x in (raw, average)]
    assert (head[0] != head[1]).all()
    assert metrics["bbox/AP"] == toy.toy_evaluate(average)["bbox/AP"]
    assert metrics["raw/bbox/AP"] == toy.toy_evaluate(raw)["bbox/AP"]
    with pytest.raises(ValueError, match="last:ray: only 'raw' may follow"):
        restore_variables(folder, "last:ray")


def test_it_resumes_where_it_was(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    for steps in (4, 12):
        config = toy.toy_config(optim__ema_decay=0.5, train__steps=steps)
        train(config, tmp_path, toy.toy_task)
    assert "at step 4" in caplog.text
    for which in ("last", "last:raw"):
        a, b = (restore_variables(f, which)[0] for f in (run[0], tmp_path))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_cannot_be_switched_on_in_a_run_without_it(tmp_path):
    train(toy.toy_config(train__steps=1), tmp_path, toy.toy_task)
    with pytest.raises(ValueError, match="optim.ema_decay was 0.0, is 0.5"):
        train(toy.toy_config(optim__ema_decay=0.5), tmp_path, toy.toy_task)


def test_weights_to_start_from_are_averaged_too(run, tmp_path):
    source = str(run[0])
    config = toy.toy_config(
        init_from=source,
        train__steps=1,
        optim__ema_decay=0.5,
        optim__learning_rate=1e-30,
    )
    train(config, tmp_path, toy.toy_task)
    for which in ("last", "last:raw"):
        a, b = restore_variables(source)[0], restore_variables(tmp_path, which)[0]
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_weights_themselves_need_not_be_evaluated(tmp_path):
    seen = []

    def evaluate(variables):
        seen.append(jax.device_get(variables))
        return toy.toy_evaluate(variables)

    build = lambda c, w: toy.toy_task(c, w, evaluate=evaluate)  # noqa: E731
    config = toy.toy_config(optim__ema_decay=0.5, eval__raw_weights=False)
    metrics = train(config, tmp_path, build)
    assert not [name for name in metrics if name.startswith("raw/")]
    jax.tree.map(np.testing.assert_array_equal, seen[-1], restore_variables(tmp_path)[0])
