"""The variants of the network: deformable convolutions, ResNeXt, ResNet-D, norms elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax import distributed
from solov2_jax.config import check_config, flatten
from solov2_jax.config_schema import set_below
from solov2_jax.models import build_model, resnet
from solov2_jax.models.conv import transformed_for
from solov2_jax.models.grouped import grouped_conv2d
from solov2_jax.training.build import build_optimizer, build_trainable
from solov2_jax.training.loss import build_loss
from solov2_jax.training.restore import state_of
from solov2_jax.training.step import TrainStep

from test_accumulate import B, make_batch, make_config  # isort: skip
from tiny_network import tiny_config  # isort: skip

DCN = {"model.dcn.stages": (3, 4, 5), "model.dcn.towers": "all", "model.dcn.mask_head": True}
VARIANTS = {
    "dcn_v2": DCN,
    "dcn_v1_groups": {
        **DCN,
        "model.dcn.towers": "last",
        "model.dcn.version": 1,
        "model.dcn.groups": 2,
    },
    "resnext_dcn_vd": {
        "model.dcn.stages": (4,),
        "model.backbone.groups": 4,
        "model.backbone.width_per_group": 4,
        "model.backbone.deep_stem": True,
        "model.backbone.avg_down": True,
        "model.dcn.mask_head": True,
        "model.dcn.head_bias": True,
    },
    "fpn_gn_no_norms": {
        "model.fpn.norm": "gn",
        "model.ins_head.norm": "none",
        "model.mask_head.norm": "none",
    },
    "no_norms_sync_bn": {
        "model.fpn.norm": "sync_bn",
        "model.backbone.norm": "sync_bn",
        "model.ins_head.norm": "none",
        "model.mask_head.norm": "none",
    },
}


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    """Blocks with a shortcut in each stage, and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 50, ((1, 2, 1, 1), True))
        patch.setitem(resnet.STAGES, 18, ((1, 1, 1, 1), False))
        yield


def config_of(variant, depth=50):
    config = tiny_config()
    config.model.backbone.depth = depth
    for key, value in VARIANTS[variant].items():
        set_below(config, key, value)
    check_config(config)
    return config


def variables_of(model, seed=0):
    """Returns variables whose offsets, norms and biases are not trivial."""
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(seed)

    def nudge(path, x):
        scale = 0.02 if any(k.key == "offset" for k in path) else 0.1 * (x.ndim < 4)
        return x + np.float32(scale * rng.standard_normal(x.shape))

    return jax.tree_util.tree_map_with_path(nudge, variables)


@functools.cache
def network(variant):
    model = build_model(config_of(variant), 2)
    return model, variables_of(model)


@pytest.mark.parametrize("variant", ["dcn_v1_groups", "resnext_dcn_vd", "fpn_gn_no_norms"])
def test_outputs_within_an_extent_are_those_of_the_exact_shape(variant):
    model, variables = network(variant)
    image = np.random.default_rng(2).standard_normal((1, 64, 32, 3)).astype(np.float32)
    canvas = np.zeros((1, 96, 96, 3), np.float32)
    canvas[0, :64, :32] = image[0]
    apply = jax.jit(model.apply)
    exact = apply(variables, image)
    shared = apply(variables, canvas, np.array([[64, 32]], np.int32))
    assert np.ptp(exact.cate) > 1e-3 and np.ptp(exact.mask_feat) > 1e-2
    for name in ("cate", "kernel", "mask_feat"):
        want, got = np.asarray(getattr(exact, name)), np.asarray(getattr(shared, name))
        got = got[:, :16, :8] if name == "mask_feat" else got
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.ptp(want))


def test_bfloat16_and_transformed_kernels_compute_the_same():
    variant = "dcn_v1_groups"
    model, variables = network(variant)
    image = jnp.asarray(np.random.default_rng(4).standard_normal((1, 64, 64, 3)), jnp.float32)
    config = config_of(variant)
    config.model.dtype = "bfloat16"
    with transformed_for("cpu"):
        make = jax.jit(lambda v: model.apply(v, image, mutable=["transformed"]))
        want, extra = make(variables)
    half = jax.jit(build_model(config, 2).apply)(variables, image)
    whole = jax.jit(model.apply)({**variables, **extra}, image)
    for a, b, c in zip(*map(jax.tree.leaves, (half, want, whole)), strict=True):
        assert np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b) < 0.1
        np.testing.assert_allclose(c, b, rtol=0, atol=1e-4 * float(jnp.ptp(b)))


def step_of(variant, num_devices, depth=18):
    """Returns (metrics, parameters) after two steps on `num_devices`, and those before."""
    config, targets = config_of(variant, depth), make_config()
    config.model.num_classes, config.optim.warmup_steps = 2, 0
    config.model.ins_head.num_grids = targets.model.ins_head.num_grids
    config.targets = targets.targets
    model = build_model(config, 2)
    variables = variables_of(model)
    before = jax.device_get(variables["params"])  # the step takes the arrays over
    trainable = build_trainable(config, variables["params"])
    _, tx = build_optimizer(config, trainable)
    mesh = distributed.make_mesh(num_devices)
    step = TrainStep(
        loss=build_loss(config, model),
        tx=tx,
        mesh=mesh,
        key=jax.random.key(0),
        trainable=trainable,
        accumulate=1,
    )
    state = jax.device_put(state_of(variables, tx), distributed.replicated(mesh))
    batch = jax.tree.map(lambda a: a, make_batch())
    assert len(batch["image"]) == B
    metrics = []
    for _ in range(2):
        state, of_step = step(state, distributed.put_batch(batch, mesh))
        metrics.append(jax.device_get(of_step))
    return metrics, jax.device_get(state.params), before


@pytest.mark.parametrize("variant", ["resnext_dcn_vd", "no_norms_sync_bn"])
def test_a_step_is_finite_and_lowers_the_loss(variant):
    metrics, after, before = step_of(variant, 1, depth=50 if "next" in variant else 18)
    assert all(np.isfinite(m["loss"]) for m in metrics), metrics
    assert metrics[1]["loss"] < metrics[0]["loss"]
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after, before)
    names = {
        "/".join(k.key for k in p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c
    }
    if "dcn" in variant:
        assert any("offset/kernel" in n for n in names) and any("offset/bias" in n for n in names)


def test_one_and_eight_devices_are_equal_with_deformable_convolutions():
    (one, params, _), (eight, others, _) = step_of("dcn_v2", 1), step_of("dcn_v2", 8)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, others, params)


@pytest.mark.parametrize("stride", [1, 2])
def test_groups_are_convolutions_of_their_channels(stride):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((2, 6, 9, 8)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 2, 12)), jnp.float32)

    def apart(x, kernel):
        def of_group(g):
            return jax.lax.conv_general_dilated(
                x[..., 2 * g : 2 * g + 2],
                kernel[..., 3 * g : 3 * g + 3],
                (stride, stride),
                [(1, 1), (1, 1)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        return jnp.concatenate([of_group(g) for g in range(4)], -1)

    together = functools.partial(grouped_conv2d, stride=stride, groups=4)
    want, back = jax.vjp(apart, x, kernel)
    got, pull_back = jax.vjp(together, x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(pull_back(jnp.ones_like(got)), back(jnp.ones_like(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dcn.groups": 4, "model.dcn.towers": "all"}, "model.dcn.groups = 4 must divide"),
        ({"model.dcn.groups": 3, "model.dcn.stages": (5,)}, "model.dcn.groups = 3 must divide"),
        ({"model.dcn.stages": (1,)}, "model.dcn.stages"),
        ({"model.dcn.stages": (5, 4)}, "increase"),
        ({"model.dcn.version": 3}, "model.dcn.version"),
        ({"model.fpn.norm": "bn"}, "model.fpn.norm"),
        ({"model.fpn.norm": "gn", "model.fpn.channels": 40}, "a multiple of 32"),
        ({"model.ins_head.norm": "bn"}, "model.ins_head.norm"),
    ],
)
def test_impossible_networks_are_refused(changes, message):
    config = tiny_config()
    assert changes.keys() <= flatten(config).keys()
    for key, value in changes.items():
        set_below(config, key, value)
    with pytest.raises(ValueError, match=message):
        check_config(config)
