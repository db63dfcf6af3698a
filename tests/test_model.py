"""The network's variants; its numbers are tested in test_parity_forward.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import tiny_config, tiny_variables

from solov2_jax.models import SOLOv2, build_model
from solov2_jax.training.optim import trainable_mask

CLASSES = 2


def image(h=64, w=96):
    noise = np.random.default_rng(0).normal(0, 50, (1, h, w, 3))
    return jnp.asarray(noise, jnp.float32)


def shapes_of(config):
    """Shapes of the variables, and of the outputs for a 64 x 96 image."""
    model = build_model(config, CLASSES)

    def run(key):
        outputs, variables = model.init_with_output(key, image())
        return variables, (outputs.cate, outputs.kernel, outputs.mask_feat)

    return jax.eval_shape(run, jax.random.key(0))


@pytest.mark.parametrize(
    "depth, norm",
    [
        (18, "frozen_bn"),
        (34, "frozen_bn"),
        (50, "frozen_bn"),
        (101, "frozen_bn"),
        (152, "frozen_bn"),
        (18, "gn"),
        (50, "gn"),
        (50, "sync_bn"),
    ],
)
def test_outputs_of_every_backbone(depth, norm):
    config = tiny_config()
    config.model.backbone.depth, config.model.backbone.norm = depth, norm
    variables, (cate, kernel, mask_feat) = shapes_of(config)
    cells = sum(g * g for g in config.model.ins_head.num_grids)
    assert cate.shape == (1, cells, CLASSES)
    assert kernel.shape == (1, cells, 32)
    assert mask_feat.shape == (1, 16, 24, 32)
    assert ("batch_stats" in variables) == (norm != "gn")
    trained = trainable_mask(variables["params"], 2, norm)["backbone"]
    assert not any(jax.tree.leaves([trained["stem"], trained["res2_0"]]))
    assert all(jax.tree.leaves(trained["res5_1"]["conv1"]["norm"])) == (norm != "frozen_bn")


def test_bfloat16_computes_what_float32_does():
    config = tiny_config()
    variables = tiny_variables(config)
    want = jax.jit(build_model(config, CLASSES).apply)(variables, image())
    config.model.dtype = "bfloat16"
    half_variables, _ = shapes_of(config)
    assert {x.dtype for x in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
    got = jax.jit(build_model(config, CLASSES).apply)(variables, image())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        # 8 bits a product, about 25 layers deep.
        error = np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
        assert error < 0.1


def test_the_stride_moves_and_the_parameters_stay():
    def count_and_flops(stride_in_1x1):
        model = SOLOv2(CLASSES, depth=50, stride_in_1x1=stride_in_1x1)
        variables = jax.eval_shape(model.init, jax.random.key(0), image())
        lowered = jax.jit(model.apply).lower(variables, image())
        return jax.tree.map(lambda x: x.shape, variables), lowered.as_text()

    first, first_program = count_and_flops(True)
    second, second_program = count_and_flops(False)
    assert first == second
    assert first_program != second_program


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "depth",
            19,
            r"model.backbone.depth is 19; known are \[18, 34, 50, 101, 152\]",
        ),
        ("norm", "bn", "model.backbone.norm is 'bn'; choose one of"),
    ],
)
def test_unknown_backbones_are_errors(key, value, message):
    config = tiny_config()
    config.model.backbone[key] = value
    with pytest.raises(ValueError, match=message):
        shapes_of(config)


def test_sides_must_be_multiples_of_32():
    model = build_model(tiny_config(), CLASSES)
    with pytest.raises(ValueError, match="the image is 64x90; pad both sides"):
        jax.eval_shape(model.init, jax.random.key(0), image(w=90))
