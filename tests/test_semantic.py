"""The auxiliary semantic loss: its labels and value by plain numpy, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_coco
from tiny_network import tiny_config, tiny_variables

from solov2_jax import distributed, semantic
from solov2_jax.checkpoint import restore_variables
from solov2_jax.data.build import build_train_batches, load_train_dataset, semantic_folder
from solov2_jax.inference.predictor import build_predictor
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.structs import Batch
from solov2_jax.training.build import build_optimizer, build_trainable
from solov2_jax.training.loop import train
from solov2_jax.training.loss import ValidationLoss, build_loss
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep
from solov2_jax.weights.convert import match
from solov2_jax.weights.sources import Weights

K, H4, W4 = 3, 16, 24


def make_batch(**changes):
    """Two images, the second one smaller than its padding; small objects over large ones."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 3, H4, W4), np.uint8)
    masks[:, 0, 2:12, 3:20] = 1
    masks[:, 1, 4:8, 5:9] = 1
    masks[0, 2, 6:7, 0:7] = 1
    batch = Batch(
        image=jnp.zeros((2, 4 * H4, 4 * W4, 3)),
        image_size=jnp.int32([[64, 96], [40, 60]]),
        boxes=jnp.zeros((2, 3, 4)),
        labels=jnp.asarray(rng.integers(0, K, (2, 3)), jnp.int32),
        centers=jnp.zeros((2, 3, 2)),
        masks=jnp.asarray(masks),
        valid=jnp.asarray([[True, True, True], [True, True, False]]),
        image_id=jnp.arange(2),
    )
    return dataclasses.replace(batch, **changes)


def plain_labels(batch):
    """One object after the other, the largest first."""
    labels = np.full((2, H4, W4), K)
    for b in range(2):
        masks = np.asarray(batch.masks[b])
        for g in sorted(range(3), key=lambda g: -int(masks[g].sum())):
            if batch.valid[b, g]:
                labels[b][masks[g] > 0] = batch.labels[b, g]
        h, w = np.asarray(batch.image_size[b])
        labels[b, -(-h // 4) :] = labels[b, :, -(-w // 4) :] = -1
    return labels


def plain_loss(levels, labels, alpha, gamma):
    total = 0.0
    for i, logits in enumerate(levels):
        step, p = 2**i, 1 / (1 + np.exp(-np.float64(logits)))
        value = foreground = 0.0
        for b, y, x in np.ndindex(logits.shape[:3]):
            label = labels[b, step * y + step // 2, step * x + step // 2]
            foreground += 0 <= label < K
            for k in range(K if label >= 0 else 0):
                q, a = (p[b, y, x, k], alpha) if k == label else (1 - p[b, y, x, k], 1 - alpha)
                value -= a * (1 - q) ** gamma * np.log(q)
        total += value / max(foreground, 1)
    return total / len(levels)


def test_labels_are_the_smallest_objects():
    batch = make_batch()
    np.testing.assert_array_equal(semantic.semantic_labels(batch, K), plain_labels(batch))


def test_an_object_with_a_box_only_hides_what_is_in_it():
    batch = make_batch(has_mask=jnp.asarray([[True, False, True], [True, True, True]]))
    want = plain_labels(batch)
    want[0, 4:8, 5:9] = -1
    want[0, 6, 5:7] = batch.labels[0, 2]  # a mask that is smaller than the box
    np.testing.assert_array_equal(semantic.semantic_labels(batch, K), want)


def test_labels_of_a_mask_on_disk():
    values = np.random.default_rng(1).choice([0, 1, 2, 3, 255], (2, 4 * H4, 4 * W4))
    batch = make_batch(basis_sem=jnp.asarray(values, jnp.uint8))
    want = values[:, 2::4, 2::4] - 1
    want = np.where(want == -1, K, np.where(want == 254, -1, want))
    want = np.where(plain_labels(batch) == -1, -1, want)
    np.testing.assert_array_equal(semantic.semantic_labels(batch, K), want)


def test_the_loss_is_the_plain_one_and_sums_over_parts():
    rng, batch = np.random.default_rng(2), make_batch()
    levels = [rng.normal(size=(2, H4 >> i, W4 >> i, K)).astype(np.float32) for i in range(4)]
    labels = semantic.semantic_labels(batch, K)
    counts = semantic.foreground_counts(labels, K)

    def loss(rows):
        return semantic.semantic_loss(
            [jnp.asarray(x[rows]) for x in levels], labels[rows], counts, alpha=0.25, gamma=2.0
        )

    want = plain_loss(levels, np.asarray(labels), 0.25, 2.0)
    np.testing.assert_allclose(loss(slice(None)), want, rtol=1e-5)
    np.testing.assert_allclose(loss(slice(0, 1)) + loss(slice(1, 2)), want, rtol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (config, variables, state, metrics by step, the step's batch)."""
    folder = tmp_path_factory.mktemp("data")
    config = tiny_config()
    config.data.train.images, config.data.train.annotations = tiny_coco.write(folder)
    config.input.min_sizes_train, config.input.max_size_train = (48,), 64
    config.train.batch_size, config.train.steps = 2, 1
    config.loss.semantic_weight = 0.5
    config.optim.ema_decay, config.optim.learning_rate = 0.9, 0.1
    config.optim.warmup_steps = 0
    config.optim.freeze = ("semantic_head/logits/*",)
    data = load_train_dataset(config)
    config.model.num_classes = len(data.class_names)
    (batch,) = build_train_batches(config, data)
    model = build_model(config, config.model.num_classes, auxiliary=True)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.device_get(
        jax.jit(lambda k: dict(model.lazy_init(k, image)))(jax.random.key(0))
    )
    trainable = build_trainable(config, variables["params"])
    _, tx = build_optimizer(config, trainable)
    mesh = distributed.make_mesh(2)
    loss, key = build_loss(config, model), jax.random.key(0)
    step = TrainStep(loss=loss, tx=tx, mesh=mesh, key=key, trainable=trainable, ema_decay=0.9)
    state = jax.device_put(state_of(variables, tx, ema=True), distributed.replicated(mesh))
    metrics = []
    for _ in range(2):
        state, values = step(state, distributed.put_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return config, variables, jax.device_get(state), metrics, batch


def test_a_step_on_two_devices_trains_the_head(trained):
    config, before, state, metrics, _ = trained
    first, second = (m["loss_semantic"] for m in metrics)
    assert 0 < second < first
    parts = sum(metrics[0][k] for k in ("loss_ins", "loss_cate", "loss_semantic"))
    np.testing.assert_allclose(metrics[0]["loss"], parts, rtol=1e-6)
    old, new = (p["semantic_head"] for p in (before["params"], state.params))
    assert np.abs(new["tower"]["conv0"]["kernel"] - old["tower"]["conv0"]["kernel"]).max() > 0
    np.testing.assert_array_equal(new["logits"]["kernel"], old["logits"]["kernel"])  # frozen
    assert "semantic_head" in state.ema["params"]


def test_the_validation_loss_has_the_term(trained):
    config, variables, _, metrics, batch = trained
    model = build_model(config, config.model.num_classes, auxiliary=True)
    batch = {name: np.concatenate([x] * 4) for name, x in batch.items()}  # on 8 devices
    values = ValidationLoss(build_loss(config, model), lambda: [batch])(variables)
    np.testing.assert_allclose(values["val/loss_semantic"], metrics[0]["loss_semantic"], rtol=1e-5)
    parts = sum(values[f"val/{k}"] for k in ("loss_ins", "loss_cate", "loss_semantic"))
    np.testing.assert_allclose(values["val/loss"], parts, rtol=1e-6)


def test_parameters_exist_with_a_weight_only_and_prediction_has_none(trained):
    config, variables, _, _, _ = trained
    off = tiny_config()
    shapes = tiny_variables(off)["params"]
    assert "semantic_head" not in shapes
    model = build_model(config, 2)
    predictor = build_predictor(config, model, variables)
    assert "semantic_head" not in predictor.variables["params"]


def test_weights_with_the_head_fill_a_network_without(trained):
    config, variables, _, _, _ = trained
    flat = {
        "/".join(k.key for k in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    weights = Weights(path="w", sha256="", source="ours", settings={}, flat=flat, dropped=())
    without = {**variables, "params": {**variables["params"]}}
    del without["params"]["semantic_head"]
    kept, report = match(weights, without, strict=True)
    assert not report.new and not any("semantic" in leaf for leaf in kept)
    assert {leaf for leaf, _ in report.dropped} == {n for n in flat if "semantic_head" in n}


def test_masks_on_disk_reach_the_batch_or_are_refused(tmp_path, trained):
    config = trained[0].copy_and_resolve_references()
    with config.unlocked():
        config.data.train.semantic_masks = str(tmp_path / "none")
    with pytest.raises(InputError, match=r"data.train.semantic_masks = .*no such folder"):
        semantic_folder(config)
    data = load_train_dataset(config)
    config.data.train.semantic_masks = str(tmp_path)
    for i in range(len(data)):
        mask = np.full((data.heights[i], data.widths[i]), 2, np.uint8)
        path = (tmp_path / str(data.file_names[i])).with_suffix(".npz")
        path.parent.mkdir(exist_ok=True)
        np.savez(path, mask=mask)
    (batch,) = build_train_batches(config, data)
    h, w = batch["image_size"][0]
    assert (batch["basis_sem"][0, :h, :w] == 2).all() and not batch["basis_sem"][0, h:].any()
    for path in tmp_path.rglob("*.npz"):
        with np.load(path) as arrays:
            mask = arrays["mask"] + 1
        np.savez(path, mask=mask)
    with pytest.raises(InputError, match="has the value 3; with 2 classes"):
        list(build_train_batches(config, data))


@pytest.mark.slow  # two whole runs
def test_a_resumed_run_has_the_same_head(tmp_path):
    config = tiny_config()
    images, annotations = tiny_coco.write(tmp_path / "data")
    for part in (config.data.train, config.data.val):
        part.images, part.annotations = images, annotations
    config.model.num_classes = 0
    config.input.min_sizes_train, config.input.max_size_train = (48,), 64
    config.train.batch_size, config.train.eval_every = 8, 0
    config.loss.semantic_weight, config.optim.ema_decay = 0.5, 0.9
    config.train.after_training = config.train.after_evaluation = ()
    heads = []
    for name, ends in (("whole", (4,)), ("resumed", (2, 4))):
        for end in ends:
            config.train.steps = end
            train(config, tmp_path / name)
        variables, step = restore_variables(tmp_path / name, "last")
        assert step == 4
        heads.append(variables["params"]["semantic_head"])
    jax.tree.map(np.testing.assert_array_equal, *heads)
