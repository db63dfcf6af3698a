"""Losses against the reference, padding, empty batches, and the tiled dice gradient.

`golden/losses.npz`: logits, targets, the reference's values and its gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax import losses, mask_losses, platforms
from solov2_jax.structs import Outputs, Targets

SETTINGS = dict(focal_alpha=0.25, focal_gamma=2.0, focal_weight=1.0, dice_weight=3.0)
B, G, H4, W4, E, S, K, P = 2, 5, 16, 24, 8, 52, 3, 12
PAIRS = (7, 3)


SMALL_TILE = B * P * 4 * W4  # 4 rows with all slots


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several tiles even at the tests' sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "CPU", platforms.CPU._replace(dice_logits=SMALL_TILE))
        yield


def solov2_loss(*args):
    return losses.solov2_loss(*args, **SETTINGS)


step = jax.jit(jax.value_and_grad(solov2_loss, has_aux=True))


def make_outputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = dict(cate=(B, S, K), kernel=(B, S, E), mask_feat=(B, H4, W4, E))
    return Outputs(**{k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()})


def make_targets(num_pairs=PAIRS, slots=P):
    rng = np.random.default_rng(1)
    fields = dict(
        pair_cell=np.zeros((B, slots), np.int32),
        pair_instance=np.zeros((B, slots), np.int32),
        pair_weight=np.zeros((B, slots), np.float32),
        cate=np.full((B, S), K, np.int32),
    )
    for i, n in enumerate(num_pairs):
        cells = rng.integers(0, S, n)
        fields["pair_cell"][i, :n] = cells
        fields["pair_instance"][i, :n] = rng.integers(0, G, n)
        fields["pair_weight"][i, :n] = 1
        fields["cate"][i, cells] = rng.integers(0, K, n)
    fields["num_pairs"] = np.int32(num_pairs)
    fields["num_cells"] = np.sum(fields["cate"] < K, axis=1, dtype=np.int32)
    return Targets(**{k: jnp.asarray(v) for k, v in fields.items()})


def make_masks():
    masks = np.random.default_rng(2).random((B, G, H4, W4)) < 0.3
    return jnp.asarray(masks, jnp.uint8)


def by_hand(outputs, targets, masks):
    """solov2.py, loss, and loss.py: one pair after another, every mask kept."""
    terms = []
    for i in range(B):
        for n in range(int(targets.num_pairs[i])):
            kernel = outputs.kernel[i, targets.pair_cell[i, n]]
            p = jax.nn.sigmoid(outputs.mask_feat[i] @ kernel)
            t = masks[i, targets.pair_instance[i, n]].astype(jnp.float32)
            a, b, c = (p * t).sum(), (p * p).sum() + 0.001, (t * t).sum() + 0.001
            terms.append(1 - 2 * a / (b + c))
    x, t = outputs.cate, jax.nn.one_hot(targets.cate, K)  # K is no class: all zero
    p = jax.nn.sigmoid(x)
    cross = -t * jnp.log(p) - (1 - t) * jnp.log(1 - p)
    p_t, alpha = p * t + (1 - p) * (1 - t), 0.25 * t + 0.75 * (1 - t)
    focal = (alpha * (1 - p_t) ** 2 * cross).sum() / (targets.num_cells.sum() + 1)
    return 3 * sum(terms) / len(terms) + focal


def assert_trees_close(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_focal_matches_the_reference(golden):
    g = golden("losses")
    one_class = g["focal_t"].sum(1) < 2  # two rows hold two: no cell of ours does
    g = {k: v[one_class] for k, v in g.items() if k.startswith("focal") and v.ndim}
    labels = jnp.asarray(np.where(g["focal_t"].any(1), g["focal_t"].argmax(1), 3))
    loss = functools.partial(losses.focal_loss, alpha=0.25, gamma=2.0)
    value, grad = jax.value_and_grad(loss)(jnp.asarray(g["focal_x"]), labels)
    np.testing.assert_allclose(value, g["focal_none"].sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, g["focal_grad"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_at_any_logit(gamma):
    x = jnp.float32([[-200.0], [-30.0], [0.0], [30.0], [200.0]])
    for label in (0, 1):
        loss = functools.partial(losses.focal_loss, alpha=0.25, gamma=gamma)
        value, grad = jax.value_and_grad(loss)(x, jnp.full(5, label))
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_dice_matches_the_reference(golden):
    """Each mask is its own feature channel, picked by a one-hot kernel.

    The reference's function takes probabilities p: of gradients, ours is p (1 - p)
    times as large.
    """
    g = golden("losses")
    n, p = len(g["dice_x"]), g["dice_x"].astype(np.float64)
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(p) - np.log1p(-p), -100, 100).astype(np.float32)
    feat = jnp.moveaxis(jnp.asarray(logits), 0, -1)[None]
    kernels, instance = jnp.eye(n)[None], jnp.arange(n, dtype=jnp.int32)[None]
    masks = jnp.asarray(g["dice_t"])[None]

    def mean_loss(feat):
        dice, iou = losses.pair_dice(kernels, feat, masks, instance, jnp.int32(n))
        return jnp.mean(1 - dice), (1 - dice, iou)

    (_, (dice, iou)), grad = jax.value_and_grad(mean_loss, has_aux=True)(feat)
    np.testing.assert_allclose(dice[0], g["dice_out"], rtol=1e-5, atol=1e-6)
    want = g["dice_grad_of_mean"] * p * (1 - p)
    got = jnp.moveaxis(grad[0], -1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())
    hard, t = logits > 0, g["dice_t"] > 0
    want = (hard & t).sum((1, 2)) / np.maximum((hard | t).sum((1, 2)), 1)
    np.testing.assert_allclose(iou[0], want, rtol=1e-6)


@pytest.mark.parametrize("tile", [1, SMALL_TILE, 2**24])
def test_loss_and_gradient_equal_the_plain_form(monkeypatch, tile):
    """Whatever the size of a tile and the number of slots in use."""
    monkeypatch.setattr(platforms, "CPU", platforms.CPU._replace(dice_logits=tile))
    outputs, masks = make_outputs(), make_masks()
    tiled = jax.jit(jax.value_and_grad(lambda *a: solov2_loss(*a), has_aux=True))
    for num_pairs in ((7, 3), (12, 12), (1, 0), (0, 5)):
        targets = make_targets(num_pairs)
        want, want_grad = jax.value_and_grad(by_hand)(outputs, targets, masks)
        (got, _), grad = tiled(outputs, targets, masks)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        # The same sums in another order.
        assert_trees_close(grad, want_grad, rtol=1e-4, atol=1e-7)


def test_padding_slots_change_nothing():
    outputs, masks = make_outputs(), make_masks()
    few, many = make_targets(slots=P), make_targets(slots=5 * P)
    # Where the padding points makes no difference either.
    pad = many.pair_weight == 0
    cell = jnp.where(pad, 3, many.pair_cell)
    many = many.replace(pair_cell=cell, pair_instance=jnp.where(pad, 4, many.pair_instance))
    (want, want_metrics), want_grad = step(outputs, few, masks)
    (got, metrics), grad = step(outputs, many, masks)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert_trees_close(metrics, want_metrics, rtol=1e-6)
    assert_trees_close(grad, want_grad, rtol=1e-5, atol=1e-8)


def test_batch_without_objects_is_finite():
    outputs = make_outputs()
    (total, metrics), grad = step(outputs, make_targets((0, 0)), make_masks())
    assert np.isfinite(total) and metrics["loss_ins"] == 0 and metrics["mean_iou"] == 0
    assert total == metrics["loss_cate"] and metrics["positive_images"] == 0
    np.testing.assert_array_equal(grad.kernel, 0)
    np.testing.assert_array_equal(grad.mask_feat, 0)
    assert np.isfinite(grad.cate).all() and grad.cate.any()


def test_empty_target_mask_has_loss_one_and_a_vanishing_gradient():
    """A mask too small for a quarter of the size still is a positive cell."""
    outputs, targets = make_outputs(), make_targets((1, 0))
    (_, metrics), grad = step(outputs, targets, jnp.zeros_like(make_masks()))
    np.testing.assert_allclose(metrics["loss_ins"], 3.0, rtol=1e-6)
    np.testing.assert_array_equal(grad.mask_feat, 0)


def test_weights_replace_dropped_pairs():
    """Each slot of a thinned image stands for num_pairs / kept pairs."""
    outputs, targets, masks = make_outputs(), make_targets((4, 4)), make_masks()
    thinned = targets.replace(
        pair_weight=targets.pair_weight * jnp.float32([[3.0], [1.0]]),
        num_pairs=jnp.int32([12, 4]),
    )
    (_, metrics), _ = step(outputs, thinned, masks)
    assert metrics["num_pairs"] == 16 and metrics["pairs_dropped"] == 8
    per_image = []
    for i in range(B):
        keep = jnp.arange(B)[:, None] == i
        one = targets.replace(pair_weight=targets.pair_weight * keep)
        per_image.append(step(outputs, one, masks)[0][1]["loss_ins"])
    want = (3 * per_image[0] + per_image[1]) / 4
    np.testing.assert_allclose(metrics["loss_ins"], want, rtol=1e-5)


def test_metrics_count():
    targets = make_targets()
    (_, metrics), _ = step(make_outputs(), targets, make_masks())
    assert metrics["num_pairs"] == sum(PAIRS) and metrics["pairs_dropped"] == 0
    assert metrics["num_cells"] == targets.num_cells.sum()
    assert metrics["positive_images"] == 2 and 0 < metrics["mean_iou"] < 1
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())


def test_perfect_masks_have_iou_one():
    masks = make_masks()
    feat = 20 * jnp.moveaxis(masks.astype(jnp.float32), 1, -1) - 10
    instance = jnp.broadcast_to(jnp.arange(G, dtype=jnp.int32)[None], (B, G))
    kernels = jnp.broadcast_to(jnp.eye(G)[None], (B, G, G))
    dice, iou = losses.pair_dice(kernels, feat, masks, instance, jnp.int32(G))
    np.testing.assert_array_equal(iou, 1)
    np.testing.assert_allclose(dice, 1, atol=1e-3)


def test_bfloat16_outputs_give_a_float32_loss():
    targets, masks = make_targets(), make_masks()
    outputs = make_outputs(dtype=jnp.bfloat16)
    (got, _), grad = step(outputs, targets, masks)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
    (want, _), want_grad = step(full, targets, masks)
    assert got.dtype == jnp.float32 and grad.mask_feat.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
        # Three significant digits are bfloat16's.
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.01 * np.abs(b).max())


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_the_mesh_changes_nothing(num_devices):
    """Each device but of the first mesh has one image, with its own number of pairs."""
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    copies = max(1, num_devices // B)
    args = make_outputs(), make_targets(), make_masks()
    args = jax.tree.map(lambda x: jnp.concatenate([x] * copies), args)
    leaves, tree = jax.tree.flatten(args)

    def on_mesh(*leaves):
        return step(*jax.tree.unflatten(tree, leaves))

    leaves = jax.device_put(leaves, by_batch)
    compiled = jax.jit(on_mesh, in_shardings=by_batch).lower(*leaves).compile()
    assert_trees_close(compiled(*leaves), step(*args), rtol=2e-5, atol=1e-7)
    # Only small sums cross the mesh: nothing gathers the mask features.
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_pixel_and_border_terms_by_hand(gamma):
    """With loops over the 3 x 3, in float64."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(2, 3, 9, 11)) * 3
    target = (rng.random((2, 3, 9, 11)) < 0.3).astype(float)
    target[1, 2] = 0  # no pixel is left of it
    soft = 1 / (1 + np.exp(-logits))
    right = np.where(target > 0, soft, 1 - soft)
    focal = (-((1 - right) ** gamma) * np.log(right)).sum((2, 3))
    want = focal / np.maximum(target.sum((2, 3)), 1)
    got = mask_losses.binary_focal(jnp.float32(logits), jnp.float32(target), gamma)
    np.testing.assert_allclose(got, want, rtol=1e-4)

    def border(x):
        out = np.zeros_like(x)
        for i, j in np.ndindex(9, 11):
            part = x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            out[..., i, j] = part.max((-1, -2)) - part.min((-1, -2))
        return out

    a, b = border(soft), border(target)
    dice = 2 * (a * b).sum((2, 3)) / ((a * a).sum((2, 3)) + (b * b).sum((2, 3)) + losses.EPSILON)
    got = mask_losses.border_distance(jnp.float32(soft), jnp.float32(target))
    np.testing.assert_allclose(got, 1 - dice, rtol=1e-4)


def test_the_border_is_where_a_moved_mask_differs():
    """Two pixels off: dice hardly sees it in a large mask, the border does."""
    masks = np.zeros((1, 2, 40, 40), np.float32)
    masks[0, 0, 4:34, 4:34] = masks[0, 1, 6:36, 4:34] = 1
    target = jnp.asarray(masks[:, [0, 0]])
    border = mask_losses.border_distance(jnp.asarray(masks), target)[0]
    overlap = 1 - (masks[0, 1] * masks[0, 0]).sum() / masks[0, 0].sum()
    assert border[0] < 1e-4 and border[1] > 0.4 > 0.1 > overlap
