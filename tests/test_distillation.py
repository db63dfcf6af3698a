"""A teacher: equal networks have nothing to learn from each other; a wrong one is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accumulate import Network, make_batch, make_config, make_params
from tiny_network import NAMES, tiny_config, tiny_variables, write_weights, write_workdir

from solov2_jax import distillation, distributed, ops
from solov2_jax.io import InputError
from solov2_jax.pair_losses import pair_loss
from solov2_jax.training import optim
from solov2_jax.training.build import build_optimizer
from solov2_jax.training.loss import build_loss
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep
from solov2_jax.training.teacher import Teacher, load_teacher

PARTS = ("loss_distill_mask", "loss_distill_feature")


def toy_teacher(params, config):
    def outputs(variables, batch):
        mean, std = tuple(config.input.mean), tuple(config.input.std)
        image = ops.normalize_image(batch["image"], batch["image_size"], mean, std)
        return jax.lax.stop_gradient(Network.apply(variables, image))

    return Teacher({"params": params}, outputs)


def run(teacher_params, *, parts=1, num_devices=1, **weights):
    """Returns the metrics of a step, and the state after it."""
    config, params = make_config(), make_params()
    config.distill_from = "given"
    for key, value in weights.items():
        config.loss[key] = value
    trainable = optim.trainable_mask(params, 0)
    _, tx = build_optimizer(config, trainable)
    mesh, key = distributed.make_mesh(num_devices), jax.random.key(0)
    loss = build_loss(config, Network(), teacher=toy_teacher(teacher_params, config))
    step = TrainStep(loss=loss, tx=tx, mesh=mesh, key=key, trainable=trainable, accumulate=parts)
    state = jax.device_put(state_of({"params": params}, tx), distributed.replicated(mesh))
    state, metrics = step(state, distributed.put_batch(make_batch(), mesh))
    return jax.device_get(metrics), jax.device_get(state)


def other_params():
    return jax.tree.map(
        lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), make_params()
    )


def test_equal_outputs_have_nothing_to_learn():
    """Exactly nothing, in the gradient too."""
    rng = np.random.default_rng(0)
    kernels, feat = (jnp.float32(rng.normal(size=s)) for s in ((2, 3, 4), (2, 8, 8, 4)))
    weight = jnp.ones((2, 3))

    @jax.jit
    def losses(kernels, feat, teacher_kernels, teacher_feat):
        masks, _ = pair_loss(
            distillation.soft_mask_terms,
            kernels,
            feat,
            teacher_kernels,
            teacher_feat,
            weight,
            jnp.ones(1),
        )
        return masks + distillation.attention_distance(feat, teacher_feat).sum()

    value, grads = jax.value_and_grad(losses, (0, 1))(kernels, feat, kernels, feat)
    assert value == 0
    assert not any(g.any() for g in grads)
    assert losses(kernels, feat, kernels + 1, feat) > 1e-3
    assert losses(kernels, feat, kernels, feat[:, ::-1]) > 1e-3


def test_equal_networks_teach_each_other_nothing():
    """Exactly nothing; the step is another program, and so rounds in another way."""
    alone, alone_state = run(make_params(), distill_mask_weight=0.0, distill_feature_weight=0.0)
    metrics, state = run(make_params())
    assert [metrics[p] for p in PARTS] == [0, 0]
    assert metrics["loss"] == alone["loss"]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, state.params, alone_state.params)


def test_a_teacher_is_learned_from_and_not_changed():
    teacher = other_params()
    metrics, state = run(teacher)
    assert all(metrics[p] > 1e-3 for p in PARTS)
    total = sum(metrics[p] for p in (*PARTS, "loss_ins", "loss_cate"))
    assert metrics["loss"] == pytest.approx(total, rel=1e-6)
    plain, plain_state = run(teacher, distill_mask_weight=0.0, distill_feature_weight=0.0)
    assert metrics["loss_ins"] == plain["loss_ins"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, plain_state.params)
    assert changed["ins_head"]["kernel"] and changed["ins_head"]["mix"]
    saved = [x.size for x in jax.tree.leaves(state.parts())]
    assert saved == [x.size for x in jax.tree.leaves(plain_state.parts())]
    assert state.ema is None


def test_devices_and_microbatches_change_nothing():
    want, got = run(other_params()), run(other_params(), parts=2, num_devices=2)
    for a, b in zip(got, want, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_both_terms_by_hand():
    rng = np.random.default_rng(0)
    shapes = {"k": (2, 3, 4), "f": (2, 8, 8, 4), "tk": (2, 3, 6), "tf": (2, 8, 8, 6)}
    x = {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}
    weight = jnp.float32([[1, 0.5, 0], [0, 2, 0]])
    loss, sums = pair_loss(
        distillation.soft_mask_terms, x["k"], x["f"], x["tk"], x["tf"], weight, jnp.ones(1)
    )
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    ours = sigmoid(np.einsum("bpe,bhwe->bphw", x["k"], x["f"]))
    theirs = sigmoid(np.einsum("bpe,bhwe->bphw", x["tk"], x["tf"]))
    dice = 2 * (ours * theirs).sum((2, 3)) / (ours**2 + theirs**2).sum((2, 3))
    assert float(loss) == pytest.approx(float((weight * (1 - dice)).sum()), rel=1e-4)
    assert float(sums[0]) == pytest.approx(float(loss), rel=1e-6)
    a, b = ((np.asarray(x[n]) ** 2).sum(-1) for n in ("f", "tf"))
    a, b = (v / np.sqrt((v**2).sum((1, 2), keepdims=True)) for v in (a, b))
    got = distillation.attention_distance(jnp.asarray(x["f"]), jnp.asarray(x["tf"]))
    np.testing.assert_allclose(got, ((a - b) ** 2).sum((1, 2)), rtol=1e-4)


# --- Which network teaches


def config_for(source, **changes):
    config = tiny_config()
    config.distill_from = source
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_workdir(tmp_path_factory.mktemp("runs") / "teacher", tiny_config(), (3, 5))


def test_a_run_teaches_with_its_last_weights_where_there_is_no_best(workdir):
    teacher = load_teacher(config_for(workdir), NAMES)
    want = tiny_variables(tiny_config(), seed=5)
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, dict(want))
    batch = {
        "image": np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.uint8),
        "image_size": np.int32([[64, 64]]),
    }
    outputs = jax.jit(teacher.outputs)(teacher.variables, batch)
    turned = config_for(workdir)
    turned.input.channel_order = "RGB"
    turned_batch = {**batch, "image": batch["image"][..., ::-1]}
    again = load_teacher(turned, NAMES)
    same = jax.jit(again.outputs)(again.variables, turned_batch)
    np.testing.assert_allclose(same.mask_feat, outputs.mask_feat, rtol=1e-4, atol=1e-5)
    assert load_teacher(config_for("")) is None


def test_a_weights_file_teaches_with_its_config(tmp_path):
    weights = write_weights(tmp_path, tiny_config(), seed=2)
    (tmp_path / "teacher.py").write_text(
        "import tiny_network\n\ndef get_config():\n    return tiny_network.tiny_config()\n"
    )
    config = config_for(weights, distill_config=str(tmp_path / "teacher.py"))
    teacher = load_teacher(config, NAMES)
    want = tiny_variables(tiny_config(), seed=2)
    jax.tree.map(np.testing.assert_array_equal, teacher.variables["params"], dict(want["params"]))
    with pytest.raises(InputError, match="is a file; give its config file as distill_config"):
        load_teacher(config_for(weights), NAMES)


def test_classes_without_names_are_this_run_s_in_their_order(tmp_path):
    weights = write_weights(tmp_path, tiny_config(), names=())
    (tmp_path / "teacher.py").write_text(
        "import tiny_network\n\ndef get_config():\n    return tiny_network.tiny_config()\n"
    )
    config = config_for(weights, distill_config=str(tmp_path / "teacher.py"))
    assert load_teacher(config, ("bolt", "nut"))
    with pytest.raises(InputError, match="on the classes 'class 1', 'class 2', this run has 'a'"):
        load_teacher(config, ("a", "b", "c"))


def test_a_wrong_teacher_is_one_error(workdir, tmp_path):
    def refused(config, names=NAMES):
        with pytest.raises(InputError) as error:
            load_teacher(config, names)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "distill_from = '/nowhere': no such folder" in refused(config_for("/nowhere"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(config_for(str(tmp_path / "empty")))
    said = refused(config_for(workdir), ("dog", "cat"))
    assert "on the classes 'cat', 'dog', this run has 'dog', 'cat'" in said
    config = config_for(workdir)
    config.model.ins_head.num_grids = (8, 5, 4, 3, 2)
    said = refused(config)
    assert "its model.ins_head.num_grids is (6, 5, 4, 3, 2), this run's (8, 5, 4, 3, 2)" in said
