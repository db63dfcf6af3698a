"""The trained batch norm: its formula, all devices together, precise statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from solov2_jax import distributed, ops
from solov2_jax.config import check_config
from solov2_jax.losses import solov2_loss
from solov2_jax.models import build_model
from solov2_jax.models.layers import ConvNorm
from solov2_jax.models.resnet import BasicBlock, ResNet
from solov2_jax.structs import Outputs, Targets
from solov2_jax.training.hooks import PreciseBN
from solov2_jax.training.loss import ValidationLoss, build_loss
from solov2_jax.training.optim import make_optimizer
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep
from solov2_jax.weights.settings import check_settings as check_settings

from test_accumulate import CELLS, E, H, K, W, make_batch, make_config  # isort: skip
from test_hooks import make_run  # isort: skip
from tiny_network import tiny_config, tiny_variables  # isort: skip


def conv_norm():
    module = ConvNorm(6, 3, norm="sync_bn")
    x = jax.random.normal(jax.random.key(0), (4, 5, 7, 3)) * 3 + 1
    variables = module.init(jax.random.key(1), x)
    rng = np.random.default_rng(0)
    norm = variables["params"]["norm"]
    noise = {k: jnp.float32(rng.uniform(0.5, 2, 6)) for k in norm}
    variables = {**variables, "params": {**variables["params"], "norm": noise}}
    return module, variables, x


def test_it_is_torchs_formula_in_training_and_in_prediction():
    module, variables, x = conv_norm()
    y, changed = module.apply(variables, x, mutable=["batch_stats"])
    kernel = variables["params"]["kernel"]
    z = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    z = np.float64(z).reshape(-1, 6)
    mean, var = z.mean(0), z.var(0)
    norm = jax.device_get(variables["params"]["norm"])
    want = (z - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(np.reshape(y, (-1, 6)), want, rtol=1e-4, atol=1e-5)
    stats = jax.device_get(changed["batch_stats"]["norm"])
    n = len(z)
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
    running = 0.9 * (1 - 1e-5) + 0.1 * var * n / (n - 1)
    np.testing.assert_allclose(stats["var"], running, rtol=1e-5)
    # Prediction: the running statistics, folded into the kernel as a frozen norm's.
    after = {**variables, **changed}
    got = module.apply(after, x)
    frozen = ConvNorm(6, 3, norm="frozen_bn").apply(after, x)
    np.testing.assert_array_equal(got, frozen)
    factor = norm["scale"] / np.sqrt(stats["var"] + 1e-5)
    want = (z - stats["mean"]) * factor + norm["bias"]
    np.testing.assert_allclose(np.reshape(got, (-1, 6)), want, rtol=1e-4, atol=1e-5)


def test_a_frozen_stage_keeps_its_statistics():
    model = ResNet(18, freeze_at=2, norm="sync_bn")
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    run = lambda v, x: model.apply(v, x, mutable=["batch_stats", "moments"])[1]  # noqa: E731
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    changed = flatten_dict(jax.eval_shape(run, variables, image)["moments"])
    stages = {path[0].split("_")[0] for path in changed}
    assert stages == {"res3", "res4", "res5"}


STAGE = {("res3_0", "conv1"), ("res3_0", "conv2"), ("res3_0", "shortcut")}


@pytest.mark.parametrize("pattern, kept", [("backbone/res3_0/*", STAGE), ("*/kernel", set())])
def test_a_norm_whose_parameters_are_frozen_keeps_its_statistics(pattern, kept):
    """And normalises by them; a frozen convolution alone does not make it."""
    config = tiny_config()
    config.model.backbone.norm, config.model.backbone.freeze_at = "sync_bn", 0
    variables = jax.tree.map(jnp.asarray, tiny_variables(config))
    image = jnp.zeros((1, 64, 64, 3))

    def trained_norms():
        apply = build_model(config, 2).apply
        run = lambda: apply(variables, image, mutable=["batch_stats", "moments"])[1]  # noqa: E731
        return {path[1:3] for path in flatten_dict(jax.eval_shape(run)["moments"])}

    every = trained_norms()
    assert len(every) == 20
    config.optim.freeze = (pattern,)
    assert every - trained_norms() == kept


class Network(nn.Module):
    """One trained block, and outputs made from it."""

    @nn.compact
    def __call__(self, image):
        x = BasicBlock(E, 1, "sync_bn", name="backbone")(image[:, ::4, ::4])
        kernel = self.param("kernel", nn.initializers.normal(1.0), (CELLS, E))
        cate = self.param("cate", nn.initializers.normal(1.0), (CELLS, E, K))
        mean = jnp.mean(x, (1, 2))
        return Outputs(
            jnp.einsum("be,sek->bsk", mean, cate),
            kernel[None] * (1 + mean[:, None]),
            x,
        )


def make_loss():
    config = make_config()
    config.model.backbone.norm = "sync_bn"
    loss_fn = build_loss(config, Network())
    image = jax.ShapeDtypeStruct((1, H, W, 3), jnp.float32)
    variables = jax.jit(lambda k: Network().lazy_init(k, image))(jax.random.key(3))
    return loss_fn, dict(variables)


def two_steps(num_devices, parts=1):
    loss_fn, variables = make_loss()
    mesh, key = distributed.make_mesh(num_devices), jax.random.key(0)
    trainable = jax.tree.map(lambda _: True, variables["params"])
    tx = make_optimizer(
        lambda step: 0.05,
        name="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        weight_decay_norm=0.0,
        clip_norm=0.0,
        trainable=trainable,
    )
    step = TrainStep(loss=loss_fn, tx=tx, mesh=mesh, key=key, trainable=trainable, accumulate=parts)
    start = jax.tree.map(np.array, variables)  # the state is donated
    state = jax.device_put(state_of(variables, tx), distributed.replicated(mesh))
    metrics = []
    for seed in (0, 1):
        state, m = step(state, distributed.put_batch(make_batch(seed), mesh))
        metrics.append(float(m["loss"]))
    return metrics, jax.device_get(state), start


@pytest.fixture(scope="module")
def one_device():
    return two_steps(1)


def test_statistics_are_those_of_all_devices(one_device):
    losses, state, start = one_device
    assert losses[1] != losses[0]
    moved = jax.tree.map(
        lambda a, b: bool((a != b).all()),
        state.model_state["batch_stats"],
        start["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))
    many = two_steps(4)
    # Sums over the batch in another order: a few float32 roundings.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, (losses, state), many[:2])


def test_parts_have_their_own_statistics(one_device):
    losses, state, _ = two_steps(1, parts=2)
    assert np.isfinite(losses).all() and losses[0] != one_device[0][0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.model_state))


def test_precise_statistics_are_those_of_all_images_together():
    loss_fn, variables = make_loss()
    taken = []

    def batches(step):
        for seed in range(step, 9):
            taken.append(seed)
            yield make_batch(seed)

    run = make_run(step=5, total=5)
    run.state = state_of(variables, _no_optimizer(), ema=True)
    PreciseBN(loss_fn.moments, batches, 0, 3).after_step(run)
    assert taken == [0, 1, 2, 0, 1, 2], "for the weights and for their average"
    # Of one batch with all images, the block's first norm sees the same statistics.
    together = {k: jnp.concatenate([make_batch(i)[k] for i in range(3)]) for k in make_batch(0)}
    want = loss_fn.moments(variables, together)["backbone"]["conv1"]["norm"]
    got = run.state.model_state["batch_stats"]["backbone"]["conv1"]["norm"]
    np.testing.assert_allclose(got["mean"], want["mean"], rtol=1e-4, atol=1e-6)
    # Each batch's variance is divided by n - 1: here n is 8 x 16 x 24.
    np.testing.assert_allclose(got["var"], want["var"], rtol=1e-3)
    assert jax.tree.structure(run.state.model_state) == jax.tree.structure(
        {"batch_stats": variables["batch_stats"]}
    )
    average = run.state.ema["batch_stats"]["backbone"]["conv1"]["norm"]
    jax.tree.map(np.testing.assert_array_equal, average, got)


def test_fewer_batches_than_asked_for_give_their_own_statistics():
    loss_fn, variables = make_loss()

    def stats(num_batches, available):
        run = make_run(step=5, total=5)
        run.state = state_of(variables, _no_optimizer())
        batches = lambda step: (make_batch(i) for i in range(available))  # noqa: E731
        PreciseBN(loss_fn.moments, batches, 0, num_batches).after_step(run)
        return run.state.model_state

    jax.tree.map(np.testing.assert_array_equal, stats(200, 2), stats(2, 2))
    with pytest.raises(ValueError, match="train.precise_bn: the training data gives no batch"):
        stats(200, 0)


def test_the_validation_loss_is_that_of_the_evaluated_network():
    """Statistics that are far off show in it, as they do in prediction."""
    _, variables = make_loss()
    config = make_config()
    config.model.backbone.norm = "sync_bn"
    loss = build_loss(config, Network(), evaluated=True)
    val_loss = ValidationLoss(loss, lambda: [make_batch(0)])
    stats = jax.tree.map(lambda x: jnp.full_like(x, 1e4), variables["batch_stats"])
    good, bad = val_loss(variables), val_loss({**variables, "batch_stats": stats})
    assert abs(good["val/loss"] - bad["val/loss"]) > 1e-2
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    outputs = Network().apply(variables, make_image(batch, config))
    targets, (normalizers, _) = loss.assign(batch, jax.random.key(0), 0)
    want, _ = solov2_loss(
        outputs,
        Targets(**targets),
        batch["masks"],
        focal_alpha=config.loss.focal_alpha,
        focal_gamma=config.loss.focal_gamma,
        focal_weight=config.loss.focal_weight,
        dice_weight=config.loss.dice_weight,
        normalizers=normalizers,
    )
    assert good["val/loss"] == pytest.approx(float(want), rel=1e-4)


def make_image(batch, config):
    mean, std = tuple(config.input.mean), tuple(config.input.std)
    return ops.normalize_image(batch["image"], batch["image_size"], mean, std)


def _no_optimizer():
    import optax

    return optax.identity()


def test_settings_of_weights_fit_frozen_and_trained_norms():
    config = make_config()
    for norm in ("frozen_bn", "sync_bn"):
        config.model.backbone.norm = norm
        check_settings({"model.backbone.norm": "frozen_bn"}, config, "x.npz")
    config.model.backbone.norm = "gn"
    with pytest.raises(ValueError, match="model.backbone.norm is gn"):
        check_settings({"model.backbone.norm": "frozen_bn"}, config, "x.npz")
    config.train.precise_bn = 10
    with pytest.raises(ValueError, match="train.precise_bn is for"):
        check_config(config)
    config.model.backbone.norm = "sync_bn"
    check_config(config)
    config.model.backbone.name = "swin_t"
    with pytest.raises(ValueError, match="swin_s, dinov2_s have no batch norm"):
        check_config(config)
