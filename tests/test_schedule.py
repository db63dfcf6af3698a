import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from solov2_jax.config import load_config
from solov2_jax.data.coco import read_coco
from solov2_jax.tools.importers.instances import Instances
from solov2_jax.training.build import in_steps
from solov2_jax.training.optim import build_schedule, describe_rate, equal_milestones

# detectron2's WarmupMultiStepLR and its newer LRMultiplier gave the same values, for
# base rate 0.01, warm-up from 0.01 over 1000 steps, x 0.1 at 210k and 250k of 270k.
REFERENCE = {
    0: 0.0001,
    1: 0.0001099,
    2: 0.00011980000000000001,
    3: 0.00012969999999999998,
    4: 0.0001396,
    5: 0.00014950000000000003,
    6: 0.00015940000000000003,
    7: 0.00016930000000000002,
    8: 0.0001792,
    9: 0.0001891,
    10: 0.000199,
    11: 0.00020889999999999998,
    500: 0.00505,
    999: 0.0099901,
    1000: 0.01,
    1001: 0.01,
    209998: 0.01,
    209999: 0.01,
    210000: 0.001,
    210001: 0.001,
    249999: 0.001,
    250000: 0.00010000000000000002,
    250001: 0.00010000000000000002,
    269999: 0.00010000000000000002,
}


def schedule_of(**changes):
    """Returns the base config's schedule with keys of `optim` or `train` changed."""
    config = base.get_config()
    for key, value in changes.items():
        (config.train if key in config.train else config.optim)[key] = value
    return build_schedule(config)


def test_learning_rate_matches_reference():
    schedule = jax.jit(schedule_of())
    got = {step: float(schedule(jnp.int32(step))) for step in REFERENCE}
    # float32 itself is exact to 6e-8.
    np.testing.assert_allclose([*got.values()], [*REFERENCE.values()], rtol=3e-7)


def test_learning_rate_without_warmup_or_milestones():
    schedule = schedule_of(warmup_steps=0, milestones=())
    assert [float(schedule(step)) for step in (0, 10**6)] == [np.float32(0.01)] * 2


def test_a_milestone_within_the_warmup_counts_from_the_first_step():
    schedule = schedule_of(milestones=(500,))
    assert np.isclose(schedule(500), 0.1 * 0.00505, rtol=1e-6)


def test_cosine_is_half_a_cosine_and_then_stays():
    schedule = schedule_of(
        schedule="cosine", steps=101, warmup_steps=0, decay_steps=100, final_rate=0.002
    )
    steps = np.arange(120)
    # fvcore's CosineParamScheduler, written out in float64.
    want = 0.002 + 0.004 * (1 + np.cos(np.pi * np.minimum(steps / 100, 1)))
    np.testing.assert_allclose(jax.vmap(schedule)(steps), want, rtol=1e-6)
    assert float(schedule_of(schedule="cosine", steps=7)(7)) == 0.0


def test_fixed_gamma_decays_at_equal_distances():
    schedule = schedule_of(
        schedule="fixed_gamma", steps=10, warmup_steps=0, num_decays=3, gamma=0.5
    )
    # fvcore: values[int((step / 10 + 1e-6) * 4)] of 1, 1/2, 1/4, 1/8.
    index = [int((step / 10 + 1e-6) * 4) for step in range(10)]
    want = [0.01 * 0.5**i for i in index]
    np.testing.assert_allclose(jax.vmap(schedule)(np.arange(10)), want, rtol=1e-6)
    assert equal_milestones(3, 12) == (3, 6, 9) and equal_milestones(0, 12) == ()


@pytest.mark.parametrize("name", ["multistep", "cosine", "fixed_gamma"])
def test_warmup_multiplies_every_schedule(name):
    changes = {"schedule": name, "steps": 100, "milestones": (3,), "final_rate": 1e-3}
    steps = np.arange(100)
    cold = jax.vmap(schedule_of(**changes, warmup_steps=10))(steps)
    warm = jax.vmap(schedule_of(**changes, warmup_steps=0))(steps)
    line = 0.01 + 0.99 * np.minimum(steps / 10, 1)
    np.testing.assert_allclose(cold, warm * line, rtol=1e-5)


def test_the_rate_follows_the_batch_size_where_the_config_says_so():
    config = base.get_config()
    config.train.batch_size, config.optim.warmup_steps = 4, 0
    assert float(build_schedule(config)(0)) == np.float32(0.01)
    assert describe_rate(config) == (
        "learning rate 0.01 (as given, for 4 images per step), multistep"
    )
    config.optim.reference_batch_size = 16
    assert float(build_schedule(config)(0)) == np.float32(0.0025)
    assert describe_rate(config).startswith(
        "learning rate 0.0025 (0.01 for 16 images per step, scaled to 4)"
    )
    config.optim.schedule, config.optim.final_rate = "cosine", 0.004
    assert np.isclose(build_schedule(config)(10**6), 0.001)


def test_shares_of_the_run_are_the_steps_they_stand_for():
    shares = schedule_of(steps=1000, warmup_steps=0.05, milestones=(0.78, 0.93))
    steps = schedule_of(steps=1000, warmup_steps=50, milestones=(780, 930))
    every = jnp.arange(1000)
    np.testing.assert_array_equal(jax.vmap(shares)(every), jax.vmap(steps)(every))


def test_shares_and_steps_that_do_not_increase_are_refused():
    with pytest.raises(ValueError, match=r"are the steps \(500, 100\) of 1000"):
        schedule_of(steps=1000, milestones=(0.5, 100))


def images_of(tmp_path, objects):
    instances = Instances({1: "cell"})
    for i, number in enumerate(objects):
        instances.add_image(f"{i}.png", 32, 32)
        for _ in range(number):
            instances.add_polygons(1, [np.array([[2, 2], [20, 2], [20, 20]])])
    instances.write(tmp_path / "train.json")
    return read_coco(str(tmp_path), str(tmp_path / "train.json"))


def test_epochs_become_steps_of_the_images_that_are_trained_on(tmp_path):
    config = base.get_config()
    config.train.epochs, config.train.batch_size = 3, 4
    images = images_of(tmp_path, [1] * 8 + [0] * 2)
    train = in_steps(config, images).train
    assert (train.steps, train.eval_every, train.checkpoint_every) == (8, 2, 2)
    assert in_steps(in_steps(config, images), images) == in_steps(config, images)
    config.data.keep_empty = False
    config.train.eval_epochs = 0.5
    train = in_steps(config, images).train
    assert (train.steps, train.eval_every) == (6, 1)
    config.train.eval_epochs = 0
    train = in_steps(config, images).train
    assert (train.eval_every, train.checkpoint_every) == (0, 5000)
    config.train.epochs = 0
    assert in_steps(config, images) == config


def test_steps_have_no_effect_beside_epochs():
    for key in ("train.steps=5", "train.eval_every=5"):
        with pytest.raises(ValueError, match="it is for train.epochs = 0, and that is 36.0"):
            load_config("finetune", [f"--config.{key}"])
    load_config("finetune", ["--config.train.eval_epochs=0.5"])
