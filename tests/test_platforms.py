"""The form of an operation is the platform's that a program is lowered for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_network
from jax import export

from solov2_jax import ops, platforms
from solov2_jax.distributed import make_mesh
from solov2_jax.inference.programs import (
    DetectOptions,
    compile_kernel_transform,
    detect_images,
)
from solov2_jax.losses import pair_dice
from solov2_jax.models import build_model
from solov2_jax.models.conv import conv2d_levels
from solov2_jax.models.group_norm import group_norm_levels
from solov2_jax.paste import paste_masks
from solov2_jax.training.memory import batch_shapes, build_step


def lowered(function, platform, *shapes):
    """Returns the StableHLO text of a function for a platform that need not be here."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    return export.export(jax.jit(function), platforms=(platform,))(*shapes).mlir_module()


def counts(text):
    """Returns the number of convolutions, and of calls of Winograd's forms."""
    return text.count("stablehlo.convolution"), len(re.findall(r"call @winograd\w*", text))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_convolutions_and_gradients_are_plain_off_the_cpu(platform):
    xs = [jnp.zeros((2, h, h, 128)) for h in (40, 24)]

    def loss(xs, kernels):
        wide, point = kernels
        return sum(jnp.sum(jnp.square(y)) for y in conv2d_levels(conv2d_levels(xs, wide), point))

    kernels = jnp.zeros((3, 3, 128, 128)), jnp.zeros((1, 1, 128, 32))
    there = lowered(jax.grad(loss, argnums=(0, 1)), platform, xs, kernels)
    here = lowered(jax.grad(loss, argnums=(0, 1)), "cpu", xs, kernels)
    # Two levels, two kernels: forward, input's gradient, kernel's gradient.
    assert counts(there) == (12, 0)
    assert counts(here)[0] == 0 and counts(here)[1] >= 3
    assert "dot_general" not in there and "dot_general" in here


def test_the_network_is_lowered_for_the_platform_that_is_asked_for():
    config = tiny_network.tiny_config()
    model = build_model(config, 2)
    variables = tiny_network.tiny_variables(config)
    options = DetectOptions.from_config(config)
    detect = functools.partial(
        detect_images, model, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), options=options
    )
    image, size = jnp.zeros((1, 256, 256, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32)
    text = {p: lowered(detect, p, variables, image, size) for p in ("cuda", "tpu", "cpu")}
    assert counts(text["cuda"]) == counts(text["tpu"])
    assert counts(text["cuda"])[1] == 0 < counts(text["cpu"])[1]
    assert counts(text["cuda"])[0] > counts(text["cpu"])[0]
    # Where kernels are transformed for it, as for prediction.
    for platform, ndim in (("gpu", {4}), ("cpu", {3, 4})):
        ready = compile_kernel_transform(model, (256, 256), platform)(variables)
        leaves = jax.tree.leaves(ready["transformed"])
        assert {leaf.ndim for leaf in leaves} == ndim


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cells_of_all_levels_are_normalised_together_on_the_cpu_alone(dtype):
    """Elsewhere no float32 array holds them all, forward or backward."""
    xs = [jnp.zeros((2, h, h, 64), dtype) for h in (12, 8)]

    def loss(xs, scale, bias):
        return sum(jnp.sum(jnp.square(y)) for y in group_norm_levels(xs, scale, bias, groups=32))

    grads = jax.grad(loss, argnums=(0, 1, 2))
    for platform, together in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = lowered(grads, platform, xs, jnp.ones(64), jnp.zeros(64))
        assert ("2x208x64xf32>" in text) == ("dot_general" in text) == together


def test_masks_are_pasted_in_windows_on_the_cpu_alone():
    soft, part = jnp.zeros((50, 16, 16)), jnp.zeros(50, jnp.int32)
    numbers = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32)
    paste = functools.partial(paste_masks, canvas=(128, 128), threshold=0.5)
    assert "stablehlo.case" in lowered(paste, "cpu", soft, part, *numbers)
    assert "stablehlo.case" not in lowered(paste, "tpu", soft, part, *numbers)


def test_tiles_of_the_dice_loss_are_of_the_platform_and_of_the_local_images():
    b, p, h, w = 2, 64, 200, 336
    operands = (
        jnp.zeros((b, p, 8)),
        jnp.zeros((b, h, w, 8)),
        jnp.zeros((b, 4, h, w), jnp.uint8),
        jnp.zeros((b, p), jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    loops = {
        platform: lowered(pair_dice, platform, *operands).count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["cuda"] == loops["tpu"] == 0 < loops["cpu"]
    mesh = make_mesh(2)
    rows, one = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    shares = jax.shard_map(
        pair_dice,
        mesh=mesh,
        in_specs=(rows, rows, rows, rows, one),
        out_specs=rows,
        check_vma=False,
    )
    # Rows in 16 MiB, as a divisor of 200: of both images' logits 97, of one's 195.
    assert f"tensor<2x{p}x50x{w}xf32>" in jax.jit(pair_dice).lower(*operands).as_text()
    assert f"tensor<1x{p}x100x{w}xf32>" in jax.jit(shares).lower(*operands).as_text()


def test_an_operation_keeps_the_precision_of_where_it_was_called():
    double = platforms.PlatformOp("double", cpu=lambda x: x @ x, other=lambda x: x @ x)

    def function(x):
        with jax.default_matmul_precision("highest"):
            return double(x)

    text = lowered(function, "tpu", jnp.zeros((4, 4)))
    assert "HIGHEST" in text
    assert "HIGHEST" not in lowered(lambda x: double(x), "tpu", jnp.zeros((4, 4)))
    np.testing.assert_array_equal(double(jnp.eye(4)), np.eye(4))  # without jit, too
    with pytest.raises(NotImplementedError, match="double takes batches"):
        jax.vmap(double)(jnp.zeros((2, 4, 4)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_convolutions_are_lowered_with_the_precision_of_where_they_were_called(platform):
    xs = [jnp.zeros((1, 16, 16, 8))]

    def loss(xs, kernel):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(jnp.square(conv2d_levels(xs, kernel)[0]))

    text = lowered(jax.grad(loss, argnums=(0, 1)), platform, xs, jnp.zeros((3, 3, 8, 8)))
    assert text.count("HIGHEST") >= 3 and "precision DEFAULT" not in text


@pytest.fixture(scope="module")
def train_step():
    """Returns the text of the whole train step for a platform."""
    config = tiny_network.tiny_config()
    with config.unlocked():
        config.train.batch_size, config.optim.ema_decay = 2, 0.9
    mesh = make_mesh(1)
    step, state, _ = build_step(config, mesh)
    batch, inputs = batch_shapes(2, 8, 128, 128, mesh), step._inputs
    return lambda platform: export.export(step._step, platforms=(platform,))(
        state, batch, inputs
    ).mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_train_step_has_no_branch_or_loop_that_a_host_reads(train_step, platform):
    text = train_step(platform)
    assert "stablehlo.case" not in text and "stablehlo.if" not in text
    assert "stablehlo.while" not in text


def test_the_train_step_on_a_cpu_keeps_its_branches(train_step):
    text = train_step("cpu")
    # The dice loss's sums and gradients, and the update.
    assert text.count("stablehlo.case") + text.count("stablehlo.if") == 3


@pytest.mark.parametrize(("channels", "parts"), [(66, 2), (68, 2), (64, 1), (72, 1), (3, 1)])
def test_coordinates_are_convolved_by_themselves(channels, parts):
    """Off the CPU; the sum, and the gradients, are those of one convolution."""
    keys = jax.random.split(jax.random.key(0), 3)
    xs = [jax.random.normal(keys[0], (2, h, 9, channels)) for h in (8, 5)]
    kernel = jax.random.normal(keys[1], (3, 3, channels, 16))
    weight = jax.random.normal(keys[2], (16,))

    def loss(xs, kernel, convolve):
        return sum(jnp.sum(jnp.tanh(y) @ weight) for y in convolve(xs, kernel))

    def convolve(xs, kernel):
        with platforms.portable_forms():
            return conv2d_levels(xs, kernel)

    def whole(xs, kernel):
        return [ops.conv2d(x, kernel) for x in xs]

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, convolve=form), argnums=(0, 1)))
        for form in (convolve, whole)
    ]
    found, expected = (form(xs, kernel) for form in both)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)
    jax.tree.map(close, found, expected)
    text = lowered(functools.partial(conv2d_levels, xs), "cuda", kernel)
    assert counts(text)[0] == 2 * parts
    # On the CPU it is one product or convolution of all channels, as before.
    text = lowered(functools.partial(conv2d_levels, xs), "cpu", kernel)
    assert f"x{channels}x16xf32>" in text
