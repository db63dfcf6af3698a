"""The network's variants; its numbers are tested in test_parity_forward.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import tiny_config, tiny_variables

from solov2_jax.losses import solov2_loss
from solov2_jax.models import ResNet, SOLOv2, build_model
from solov2_jax.paste import paste_masks
from solov2_jax.postprocess import detect
from solov2_jax.structs import Batch
from solov2_jax.targets import assign_targets
from solov2_jax.training.optim import trainable_mask

CLASSES = 2
DETECT_KEYS = inspect.signature(detect).parameters


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
    assert (got.kernel.dtype, got.mask_feat.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert got.cate.dtype == jnp.float32, "at the prior bfloat16 has steps of 0.03"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # 8 bits a product, about 25 layers deep.
        error = np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
        assert error < 0.1


def test_the_stride_moves_and_the_parameters_stay():
    def count_and_flops(stride_in_1x1):
        model = SOLOv2(CLASSES, ResNet(depth=50, stride_in_1x1=stride_in_1x1))
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


def test_a_trace_names_every_part():
    """The programs' operations carry the names that a profiler shows them under."""
    config = tiny_config()
    model, grids = build_model(config, CLASSES), config.model.ins_head.num_grids
    variables = jax.eval_shape(model.init, jax.random.key(0), image())
    rows = {
        "image": jnp.zeros((1, 64, 96, 3), jnp.uint8),
        "image_size": jnp.full((1, 2), 64),
        "boxes": jnp.zeros((1, 4, 4)),
        "labels": jnp.zeros((1, 4), jnp.int32),
        "centers": jnp.zeros((1, 4, 2)),
        "masks": jnp.zeros((1, 4, 16, 24), jnp.uint8),
        "valid": jnp.ones((1, 4), bool),
        "image_id": jnp.zeros(1, jnp.int32),
    }

    def loss(params, stats, rows):
        targets = assign_targets(
            Batch(**rows),
            num_grids=grids,
            scale_ranges=config.targets.scale_ranges,
            sigma=0.2,
            num_classes=CLASSES,
            max_pairs=8,
            key=jax.random.key(0),
        )
        outputs = model.apply({"params": params, "batch_stats": stats}, image())
        weights = {"focal_alpha": 0.25, "focal_gamma": 2.0, "focal_weight": 1.0}
        return solov2_loss(outputs, targets, rows["masks"], dice_weight=3.0, **weights)[0]

    def predict(variables):
        options = {key: value for key, value in config.test.items() if key in DETECT_KEYS}
        detections = detect(model.apply(variables, image()), num_grids=grids, **options)
        size = jnp.array([64, 96])
        return paste_masks(detections.soft_masks[0], jnp.arange(4), 4, size, size, (64, 96), 0.5)

    def names(function, *args):
        return jax.jit(function).lower(*args).as_text(debug_info=True)

    step = names(jax.grad(loss), variables["params"], variables["batch_stats"], rows)
    for part in ("backbone", "fpn", "ins_head", "mask_head"):
        assert f"/jvp(SOLOv2)/{part}/" in step and f"/transpose(jvp(SOLOv2))/{part}/" in step
    assert "/jvp(targets)/" in step
    for part in ("focal", "dice"):
        assert f"/jvp({part})/" in step and f"/transpose(jvp({part}))/" in step
    prediction = names(predict, variables)
    for part in ("point_nms", "postprocess", "matrix_nms", "paste"):
        assert f"{part}/" in prediction
