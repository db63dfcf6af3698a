import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from solov2_jax.training.optim import make_optimizer, staircase, trainable_mask, with_warmup


def paths(tree, value=True):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(p, simple=True, separator="/") for p, leaf in leaves if leaf == value}


def params_of_stages():
    stage = {"conv1": {"kernel": 0.0, "norm": {"scale": 0.0, "bias": 0.0}}}
    stages = ("stem", "res2_0", "res2_1", "res3_0", "res4_0", "res5_2")
    return {
        "backbone": dict.fromkeys(stages, stage),
        "fpn": {"lateral2": {"kernel": 0.0, "bias": 0.0}},
        "mask_head": {"gn_pred": {"scale": 0.0, "bias": 0.0}},
    }


@pytest.mark.parametrize(
    ("freeze_at", "trained"),
    [
        (0, ["stem", "res2_0", "res2_1", "res3_0", "res4_0", "res5_2"]),
        (1, ["res2_0", "res2_1", "res3_0", "res4_0", "res5_2"]),
        (2, ["res3_0", "res4_0", "res5_2"]),
        (4, ["res5_2"]),
        (5, []),
    ],
)
def test_frozen_stages_and_every_batch_norm_of_the_backbone(freeze_at, trained):
    mask = trainable_mask(params_of_stages(), freeze_at)
    assert paths(mask) == {f"backbone/{s}/conv1/kernel" for s in trained} | {
        "fpn/lateral2/kernel",
        "fpn/lateral2/bias",
        "mask_head/gn_pred/scale",
        "mask_head/gn_pred/bias",
    }


def test_parameters_are_frozen_by_the_patterns_of_their_names():
    patterns = ("backbone/res4*", "*/gn_pred/*")
    mask = trainable_mask(params_of_stages(), 0, "gn", patterns)
    free = paths(trainable_mask(params_of_stages(), 0, "gn"))
    names = {n for n in free if "res4" not in n and "gn_pred" not in n}
    assert paths(mask) == names and len(names) == len(free) - 5
    with pytest.raises(ValueError, match=r"matches 'fpn/lateral3/\*'; did you mean fpn"):
        trainable_mask(params_of_stages(), 0, "gn", ("fpn/lateral3/*",))


def torch_sgd(params, grads, steps, rates, momentum, decay):
    """torch.optim.SGD's formula in float64, for one array; decay of this array."""
    w, v = np.float64(params), 0.0
    for step in range(steps):
        v = momentum * v + grads[step] + decay * w
        w = w - rates[step] * v
    return w


@pytest.mark.parametrize("decay_norm", [0.0, 0.01])
def test_updates_are_torch_sgd(decay_norm):
    rng = np.random.default_rng(0)
    params = toy.toy_init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda x: x + 1.0, params)
    mask = trainable_mask(params, 2)
    schedule = with_warmup(staircase(0.5, (4,), 0.1), factor=0.1, steps=3)
    tx = make_optimizer(
        schedule,
        name="sgd",
        momentum=0.9,
        weight_decay=0.1,
        weight_decay_norm=decay_norm,
        clip_norm=0.0,
        trainable=mask,
    )
    grads = [jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), params) for _ in range(6)]
    state, now = tx.init(params), params
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, now)
        now = jax.tree.map(jnp.add, now, updates)
    rates = [float(schedule(i)) for i in range(6)]

    def check(path, got, start, trained, *steps):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not trained:
            np.testing.assert_array_equal(got, start)
            return
        decay = decay_norm if "gn0" in name else 0.1
        want = torch_sgd(start, steps, 6, rates, 0.9, decay)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)

    jax.tree_util.tree_map_with_path(check, now, params, mask, *grads)
    trained = sum(jax.tree.leaves(mask))
    buffers = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(buffers) == trained, "one momentum buffer for each trained parameter"


def test_clipping_sees_the_trained_parameters_only():
    params = toy.toy_init(jax.random.key(0))["params"]
    mask = trainable_mask(params, 2)
    tx = make_optimizer(
        lambda step: 1.0,
        name="sgd",
        momentum=0.0,
        weight_decay=0.0,
        weight_decay_norm=0.0,
        clip_norm=1.0,
        trainable=mask,
    )
    # Huge gradients where nothing is trained must not shrink the others.
    grads = jax.tree.map(lambda x, t: jnp.full(x.shape, 1e-3 if t else 1e6), params, mask)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["ins_head"]["cate_pred"]["bias"], -1e-3, rtol=1e-6)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 10.0), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    norm = np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_adamw_is_torchs():
    params = {"fpn": {"lateral2": {"kernel": jnp.full((1, 1, 2, 2), 2.0)}}}
    tx = make_optimizer(
        lambda step: 0.1,
        name="adamw",
        momentum=0.9,
        weight_decay=0.05,
        weight_decay_norm=0.0,
        clip_norm=0.0,
        trainable=jax.tree.map(lambda x: True, params),
    )
    state, w, m, v = tx.init(params), 2.0, 0.0, 0.0
    for step, g in enumerate([0.3, -1.0, 0.2], start=1):
        grads = jax.tree.map(lambda x, g=g: jnp.full_like(x, g), params)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        # torch.optim.AdamW, written out.
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        w = w - 0.1 * 0.05 * w - 0.1 * adam
        np.testing.assert_allclose(params["fpn"]["lateral2"]["kernel"], w, rtol=1e-5)


def test_unknown_optimiser_is_an_error():
    with pytest.raises(ValueError, match=r"optim.name is 'sgdd'; choose 'sgd' or"):
        make_optimizer(
            lambda step: 0.1,
            name="sgdd",
            momentum=0.9,
            weight_decay=0.0,
            weight_decay_norm=0.0,
            clip_norm=0.0,
            trainable={},
        )
