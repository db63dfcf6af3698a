"""One compiled shape for images of any size: the results are those of exact padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from solov2_jax import ops
from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_model, resnet
from solov2_jax.models.layers import BatchNorm

CANVAS = (160, 192)


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    """A bottleneck block with a stride or a shortcut in each stage, and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 50, ((1, 2, 1, 1), True))
        yield


@functools.cache
def network(norm="frozen_bn"):
    """Returns (config, model, variables) whose norms and biases are not trivial."""
    config = base.get_config()
    config.model.backbone.depth = 50
    config.model.backbone.norm = norm
    config.model.fpn.channels = 32
    config.model.mask_head.channels = 32
    config.model.ins_head.update(
        {"channels": 32, "num_kernels": 32, "num_convs": 1, "num_grids": (9, 7, 5, 4, 3)}
    )
    config.input.min_size_test, config.input.max_size_test = 96, 192
    config.test.score_threshold = config.test.update_threshold = 0.0
    config.test.nms_pre, config.test.max_per_image = 60, 20
    model = build_model(config, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    nudge = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return config, model, jax.tree.map(lambda x: nudge(x) if x.ndim < 4 else x, variables)


def sizes(number):
    rng = np.random.default_rng(1)
    return [
        tuple(int(n) for n in rng.integers(1, np.array(CANVAS) // 32 + 1) * 32)
        for _ in range(number)
    ]


def assert_equal_at(size, norm="frozen_bn"):
    """Compares the outputs on the canvas, beside another image, with the exact shape's."""
    _, model, variables = network(norm)
    rng = np.random.default_rng(2)
    image = rng.standard_normal((1, *size, 3)).astype(np.float32)
    canvas = rng.standard_normal((2, *CANVAS, 3)).astype(np.float32)
    canvas[0] = 0
    canvas[0, : size[0], : size[1]] = image[0]
    apply = jax.jit(model.apply)
    exact = apply(variables, image)
    shared = apply(variables, canvas, np.array([size, CANVAS], np.int32))
    for name in ("cate", "kernel", "mask_feat"):
        wanted = np.asarray(getattr(exact, name)[0])
        found = np.asarray(getattr(shared, name)[0])
        if name == "mask_feat":
            found = found[: size[0] // 4, : size[1] // 4]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_outputs_are_those_of_the_exact_shape(size):
    assert_equal_at(size)


def test_outputs_with_group_norm_in_the_backbone_are_too():
    assert_equal_at((64, 128), "gn")


@pytest.mark.slow
@pytest.mark.parametrize("size", sizes(20))
def test_outputs_at_random_sizes_are_those_of_the_exact_shape(size):
    assert_equal_at(size)


def test_twelve_odd_sizes_compile_two_programs_and_change_no_detection(caplog):
    config, model, variables = network()
    predictor = build_predictor(config, model, variables)
    exact = predictor.with_shapes(())
    rng = np.random.default_rng(3)
    shapes = [(41, 97), (33, 50), (50, 33), (77, 77), (64, 64), (120, 61)]
    shapes += [(31, 200), (90, 111), (100, 99), (55, 89), (13, 11), (201, 31)]
    images = [
        np.kron(rng.integers(0, 255, (-(-h // 8), -(-w // 8), 3)), np.ones((8, 8, 1)))[:h, :w]
        for h, w in shapes
    ]
    images = [image.astype(np.uint8) for image in images]
    with caplog.at_level("INFO", logger="solov2_jax.inference.programs"):
        predictions = list(predictor.predict_images(images))
    lines = [r.getMessage() for r in caplog.records if "compiling for" in r.getMessage()]
    assert len(lines) == 2, lines
    for i in (0, 11):
        (alone,) = exact.predict_images([images[i]])
        shared = predictions[i]
        assert len(alone) == len(shared) > 5
        np.testing.assert_array_equal(alone.labels, shared.labels)
        np.testing.assert_allclose(alone.scores, shared.scores, atol=2e-5)
        pixels = np.sum(alone.masks != shared.masks)
        assert pixels <= 1e-4 * alone.masks.size


def test_resize_weights_are_equal_in_every_bit():
    sizes_in = np.arange(1, 120, dtype=np.int32)
    within = jax.jit(ops.bilinear_matrix_within, static_argnums=(2, 3))
    for size_out in (40, 36, 12, 7):
        out = np.full(len(sizes_in), size_out, np.int32)
        found = np.asarray(within(sizes_in, out, 120, size_out))
        for row, size in zip(found, sizes_in.tolist(), strict=True):
            wanted = ops.bilinear_matrix(size, size_out)
            np.testing.assert_array_equal(row[:, :size], wanted)
            assert not row[:, size:].any()


def test_coordinates_within_an_extent():
    found = ops.coord_grid_within(jnp.array([[5, 1], [3, 8]]), 7, 8)
    np.testing.assert_allclose(found[0, :5, :1], ops.coord_grid(5, 1), atol=1.2e-7)
    np.testing.assert_allclose(found[1, :3], ops.coord_grid(3, 8), atol=1.2e-7)


def test_trained_batch_norm_counts_pixels_within_the_extents():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((2, 6, 8, 4)), jnp.float32)
    extent = jnp.array([[6, 4], [2, 8]], jnp.int32)
    norm = BatchNorm()
    variables = {
        "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }
    y, changed = norm.apply(variables, x, extent, mutable=["batch_stats"])
    own = np.concatenate([x[0, :6, :4].reshape(-1, 4), x[1, :2, :8].reshape(-1, 4)])
    wanted = (own - own.mean(0)) / np.sqrt(own.var(0) + norm.epsilon)
    found = np.concatenate([y[0, :6, :4].reshape(-1, 4), y[1, :2, :8].reshape(-1, 4)])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    mean = changed["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * own.mean(0), atol=1e-6)
