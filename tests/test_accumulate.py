"""A batch computed in parts gives the losses and gradients of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from solov2_jax import distributed
from solov2_jax.structs import Outputs
from solov2_jax.training import optim
from solov2_jax.training.build import build_optimizer
from solov2_jax.training.loss import build_loss
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep

B, G, H, W, K, E = 8, 3, 64, 96, 2, 4
GRIDS = (4, 3, 2, 2, 1)
CELLS = sum(n * n for n in GRIDS)


class Network:
    """Outputs that depend on the parameters and on the image, and nothing slow."""

    @staticmethod
    def apply(variables, image):
        params = variables["params"]["ins_head"]
        x = jnp.tanh(jnp.mean(image, axis=(1, 2)) @ params["mix"])  # [B, E]
        small = jnp.mean(image.reshape(image.shape[0], H // 4, 4, W // 4, 4, 3), (2, 4))
        feat = jnp.tanh(small @ params["mix"])
        kernel = params["kernel"][None] * (1 + x[:, None])
        cate = jnp.einsum("be,sek->bsk", x, params["cate"])
        return Outputs(cate, kernel, feat)


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"mix": (3, E), "kernel": (CELLS, E), "cate": (CELLS, E, K)}
    head = {n: jnp.float32(rng.normal(size=s)) for n, s in shapes.items()}
    return {"ins_head": head}


def make_batch(seed=0):
    """Images with 0 to 3 objects each: parts of the batch have unequal counts."""
    rng = np.random.default_rng(seed)
    fields = {
        "image": rng.integers(0, 255, (B, H, W, 3)).astype(np.uint8),
        "image_size": np.tile(np.int32([H, W]), (B, 1)),
        "boxes": np.zeros((B, G, 4), np.float32),
        "labels": rng.integers(0, K, (B, G)).astype(np.int32),
        "centers": np.zeros((B, G, 2), np.float32),
        "masks": np.zeros((B, G, H // 4, W // 4), np.uint8),
        "valid": np.arange(G)[None] < np.arange(B)[:, None] % (G + 1),
        "image_id": np.arange(B),
    }
    for b in range(B):
        for g in range(G):
            x, y = rng.integers(0, W - 40), rng.integers(0, H - 30)
            fields["boxes"][b, g] = x, y, x + 40, y + 30
            fields["centers"][b, g] = x + 20, y + 15
            fields["masks"][b, g, y // 4 : y // 4 + 7, x // 4 : x // 4 + 10] = 1
    return fields


def make_config():
    config = base.get_config()
    config.model.num_classes = K
    config.model.ins_head.num_grids = GRIDS
    config.targets.scale_ranges = ((1, 32), (16, 64), (32, 96), (64, 128), (96, 512))
    config.targets.max_pairs = 16
    config.optim.warmup_steps = 0
    return config


def run(parts, num_devices, boxes=False, **weights):
    """Returns the metrics of two steps, and the parameters after them.

    Args:
      boxes: of every second object only the box is known.
      weights: of the losses.
    """
    config, params = make_config(), make_params()
    for key, value in weights.items():
        config.loss[key] = value
    trainable = optim.trainable_mask(params, 0)
    _, tx = build_optimizer(config, trainable)
    mesh = distributed.make_mesh(num_devices)
    loss, key = build_loss(config, Network()), jax.random.key(0)
    step = TrainStep(loss=loss, tx=tx, mesh=mesh, key=key, trainable=trainable, accumulate=parts)
    state = jax.device_put(state_of({"params": params}, tx), distributed.replicated(mesh))
    metrics = []
    for seed in (0, 1):
        batch = make_batch(seed)
        if boxes:
            batch["has_mask"] = np.indices((B, G)).sum(0) % 2 == 0
        state, m = step(state, distributed.put_batch(batch, mesh))
        metrics.append(jax.device_get(m))
    return metrics, jax.device_get(state.params)


@pytest.fixture(scope="module")
def whole():
    return run(1, 1)


@pytest.mark.parametrize(("parts", "num_devices"), [(2, 1), (8, 1), (4, 2)])
def test_parts_give_the_whole(whole, parts, num_devices):
    got = run(parts, num_devices)
    assert whole[0][0]["num_pairs"] > 20 and whole[0][0]["mean_iou"] > 0.05
    # Sums over the batch in another order: a few float32 roundings.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, got, whole)


def test_parts_give_the_whole_where_some_objects_have_a_box_only():
    """Each kind is a mean over the whole batch; the pairwise term waits for its warm-up."""
    want = run(1, 1, boxes=True)
    got = run(4, 2, boxes=True)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, got, want)
    first, second = want[0]
    assert first["loss_projection"] > 0.1 and first["loss_pairwise"] == 0
    assert second["loss_pairwise"] > 0
    parts = ("loss_ins", "loss_cate", "loss_projection", "loss_pairwise")
    assert second["loss"] == pytest.approx(sum(second[p] for p in parts), rel=1e-5)


def test_further_terms_are_means_over_the_whole_batch_too(whole):
    weights = {"mask_bce_weight": 2.0, "boundary_weight": 1.5}
    want, got = run(1, 1, **weights), run(4, 2, **weights)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, got, want)
    first = want[0][0]
    parts = ("loss_ins", "loss_cate", "loss_mask_bce", "loss_boundary")
    assert all(first[p] > 0.05 for p in parts)
    assert first["loss"] == pytest.approx(sum(first[p] for p in parts), rel=1e-5)
    assert first["loss_ins"] == pytest.approx(whole[0][0]["loss_ins"], rel=1e-5)


def sums_over_devices(jaxpr, in_loop=False):
    """Yields (whether it is in a loop, its types) of every sum that a program sends."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith("psum"):
            yield in_loop, [v.aval for v in equation.invars]
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sums_over_devices(inner, in_loop or name in ("scan", "while"))


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_summed_over_the_devices_once(parts):
    """After the last part; and only those of what is trained."""
    config, params = make_config(), make_params()
    trainable = {"ins_head": {"mix": True, "kernel": True, "cate": False}}
    _, tx = build_optimizer(config, trainable)
    mesh, key = distributed.make_mesh(4), jax.random.key(0)
    loss = build_loss(config, Network())
    step = TrainStep(loss=loss, tx=tx, mesh=mesh, key=key, trainable=trainable, accumulate=parts)
    traced = step._step.trace(state_of({"params": params}, tx), make_batch(), step._inputs)
    sums = list(sums_over_devices(traced.jaxpr.jaxpr))
    assert not any(in_loop for in_loop, _ in sums)
    sent = sorted(aval.shape for _, avals in sums for aval in avals if aval.shape)
    head = params["ins_head"]
    assert sent == sorted([head["mix"].shape, head["kernel"].shape])


def test_the_batch_must_be_divisible_by_devices_times_parts():
    mesh = distributed.make_mesh(2)
    distributed.check_batch_size(8, mesh, 4)
    message = "batch_size = 12 .* 2 devices times train.accumulate = 4: use 8 or 16"
    with pytest.raises(ValueError, match=message):
        distributed.check_batch_size(12, mesh, 4)


def test_without_parts_the_program_has_no_loop():
    """What is off costs nothing: no scan, no sums that start at zero."""
    config, params = make_config(), make_params()
    trainable = optim.trainable_mask(params, 0)
    _, tx = build_optimizer(config, trainable)
    mesh, key = distributed.make_mesh(1), jax.random.key(0)
    loss = build_loss(config, Network())
    state = state_of({"params": params}, tx)
    loops = []
    for parts in (1, 2):
        step = TrainStep(
            loss=loss, tx=tx, mesh=mesh, key=key, trainable=trainable, accumulate=parts
        )
        text = step.lower(state, make_batch()).as_text()
        loops.append(text.count("stablehlo.while"))
    assert loops[0] == loops[1] - 1
