"""Primitives against the reference's tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax import ops
from solov2_jax.models.group_norm import group_norm_levels
from solov2_jax.models.heads import split_features

# float32 rounding: a bilinear sample adds four products.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def units(golden):
    return golden("ops")


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("h, w", [(64, 80), (7, 5), (25, 34), (1, 4), (1, 1)])
def test_coord_grid(units, h, w):
    want = units[f"coord_{h}x{w}"].transpose(1, 2, 0)
    np.testing.assert_allclose(ops.coord_grid(h, w), want, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("size", [40, 36, 24, 16, 12])
def test_resize_to_the_grids(units, size):
    got = ops.resize_bilinear(nhwc(units["grid_in"]), (size, size))
    np.testing.assert_allclose(got, nhwc(units[f"grid_out_{size}"]), **ROUNDING)


def test_split_features(units):
    features = {f"p{i + 2}": nhwc(units[f"split_in_{i}"]) for i in range(5)}
    for i, got in enumerate(split_features(features)):
        np.testing.assert_allclose(got, nhwc(units[f"split_out_{i}"]), **ROUNDING)


def test_upsampling_and_subsampling(units):
    x = nhwc(units["up2_in"])
    want = nhwc(units["up2_out"])
    np.testing.assert_allclose(ops.upsample2x_bilinear(x), want, **ROUNDING)
    np.testing.assert_allclose(ops.resize_bilinear(x, (10, 14)), want, **ROUNDING)
    np.testing.assert_array_equal(ops.upsample2x_nearest(x), nhwc(units["nearest2_out"]))
    p6 = nhwc(units["p6_in"])[:, ::2, ::2]
    np.testing.assert_array_equal(p6, nhwc(units["p6_out"]))


def test_group_norm(units):
    weight, bias = jnp.asarray(units["gn_w"]), jnp.asarray(units["gn_b"])
    got = ops.group_norm(nhwc(units["gn_in"]), weight, bias, groups=32)
    np.testing.assert_allclose(got, nhwc(units["gn_out"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 50.3, 1000, -3000])
@pytest.mark.parametrize("extent", [None, (20, 24)])
def test_group_norm_of_a_mean_far_from_zero(offset, extent):
    """E[x^2] - E[x]^2 of the values themselves would be 45 % off at 1000."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 24, 32, 8)) + offset).astype(np.float32)
    h, w = extent or x.shape[1:3]
    own = x[:, :h, :w].astype(np.float64).reshape(-1, 2, 4)
    x[:, h:], x[:, :, w:] = 1e4, -1e4
    mean, var = own.mean((0, 2), keepdims=True), own.var((0, 2), keepdims=True)
    want = ((own - mean) / np.sqrt(var + 1e-5)).reshape(1, h, w, 8)
    own_size = None if extent is None else jnp.array([extent])
    got = ops.group_norm(jnp.asarray(x), jnp.ones(8), jnp.zeros(8), groups=2, extent=own_size)
    # A float32 at 3000 has steps of 2.4e-4.
    np.testing.assert_allclose(got[:, :h, :w], want, rtol=0, atol=2e-6 + 4e-7 * abs(offset))


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 1), (2, 9)])
def test_max_pool_is_torchs(shape):
    h, w = shape
    x = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)), constant_values=-np.inf)
    rows, cols = 2 * np.arange((h + 1) // 2), 2 * np.arange((w + 1) // 2)
    want = np.max([padded[:, rows + i][:, :, cols + j] for i in range(3) for j in range(3)], 0)
    np.testing.assert_array_equal(ops.max_pool_3x3_stride2(jnp.asarray(x)), want)


def test_normalize_pads_after_normalising():
    image = jnp.full((2, 4, 6, 3), 200, jnp.uint8)
    size = jnp.array([[4, 6], [3, 2]])
    got = ops.normalize_image(image, size, (100.0, 200.0, 50.0), (1.0, 1.0, 2.0))
    want = np.broadcast_to(np.float32([100, 0, 75]), (2, 4, 6, 3)).copy()
    want[1, 3:] = want[1, :, 2:] = 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("sides", [(), ((6, 8), (5, 2), (1, 1))])
def test_group_norm_of_levels_is_that_of_each(offset, sides):
    rng = np.random.default_rng(0)
    shapes = [(2, 8, 8, 8), (2, 5, 5, 8), (2, 1, 1, 8)]
    xs = [jnp.asarray(rng.normal(size=s) + offset * (1 + s[1]), jnp.float32) for s in shapes]
    scale, bias = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(2))

    extents = [jnp.array([own, x.shape[1:3]]) for own, x in zip(sides, xs, strict=False)]

    def together(xs, scale, bias):
        return group_norm_levels(xs, scale, bias, groups=2, extents=extents)

    def one_by_one(xs, scale, bias):
        own = extents or [None] * len(xs)
        pairs = zip(xs, own, strict=True)
        return [ops.group_norm(x, scale, bias, groups=2, extent=e) for x, e in pairs]

    both = together(xs, scale, bias), one_by_one(xs, scale, bias)
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 + 2e-6 * offset)
    weights = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]

    def grads(norm):
        def loss(xs, scale, bias):
            ys = norm(xs, scale, bias)
            return sum((y * w).sum() for y, w in zip(ys, weights, strict=True))

        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2))(xs, scale, bias))

    for got, want in zip(grads(together), grads(one_by_one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 + 1e-6 * offset)
