"""Deformable convolution against torchvision's values and gradients, and by itself.

`golden/deform.npz` is written by `make_deform_golden.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_deform_golden import CASES, case_arrays, settings

from solov2_jax import ops
from solov2_jax.models import deform
from solov2_jax.models.deform import deform_conv2d

RNG = np.random.default_rng(0)
NAMES = ("x", "kernel", "offset", "mask")


def inputs_of(name):
    case, arrays = settings(CASES[name]), case_arrays(name)
    options = {key: case[key] for key in ("stride", "padding", "dilation", "groups")}
    args = [jnp.asarray(arrays[n]) if n in arrays else None for n in NAMES]
    return args, jnp.asarray(arrays["grad"]), options


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torchvisions(golden, monkeypatch, name, chunked):
    if chunked:
        monkeypatch.setattr(deform, "MAX_COLUMN_NUMBERS", 0)
    want, (args, grad, options) = golden("deform"), inputs_of(name)
    convolve = functools.partial(deform_conv2d, **options)

    @jax.jit
    def both(args, grad):
        y, pull_back = jax.vjp(convolve, *args)
        return y, pull_back(grad)

    y, grads = both(args, grad)
    np.testing.assert_allclose(y, want[f"{name}/y"], rtol=1e-4, atol=1e-4)
    for key, value in zip(NAMES, grads, strict=True):
        if value is not None:
            np.testing.assert_allclose(value, want[f"{name}/d_{key}"], rtol=1e-4, atol=2e-4)


def plain_case():
    x = jnp.asarray(RNG.standard_normal((2, 6, 7, 4)), jnp.float32)
    kernel = jnp.asarray(RNG.standard_normal((3, 3, 4, 5)), jnp.float32)
    return x, kernel, jnp.zeros((2, 6, 7, 18)), jnp.ones((2, 6, 7, 9))


def test_without_offsets_it_is_a_convolution():
    x, kernel, offset, mask = plain_case()
    np.testing.assert_allclose(
        deform_conv2d(x, kernel, offset, mask), ops.conv2d(x, kernel), rtol=1e-4, atol=1e-4
    )
    halved = deform_conv2d(x, kernel, offset, 0.5 * mask)
    np.testing.assert_allclose(halved, 0.5 * ops.conv2d(x, kernel), rtol=1e-4, atol=1e-4)


def test_whole_offsets_shift_what_is_read():
    x, kernel, offset, mask = plain_case()
    offset = offset.at[..., 0::2].set(1.0).at[..., 1::2].set(-2.0)  # one row down, two left
    shifted = jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0)))[:, 1:, :-2]
    inner = ops.conv2d(shifted, kernel)[:, 1:-1, 2:-1]  # pads at another place
    np.testing.assert_allclose(
        deform_conv2d(x, kernel, offset, mask)[:, 1:-1, 2:-1], inner, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("far", [1e9, -1e9, np.inf])
def test_what_is_far_outside_is_zero_and_so_are_its_gradients(far):
    x, kernel, offset, mask = plain_case()
    y, pull_back = jax.vjp(deform_conv2d, x, kernel, offset + far, mask)
    assert not np.any(y)
    assert not any(np.any(g) for g in pull_back(jnp.ones_like(y)))


def test_levels_are_those_one_by_one():
    (x, kernel, offset, mask), _, options = inputs_of("plain")
    small = [a[:, :4, :5] for a in (x, offset, mask)]
    xs, pairs = [x, small[0]], [(offset, mask), (small[1], small[2])]
    got = deform.deform_conv2d_levels(xs, kernel, pairs, **options)
    for a, level, (moved, factor) in zip(got, xs, pairs, strict=True):
        want = deform_conv2d(level, kernel, moved, factor, **options)
        np.testing.assert_allclose(a, want, rtol=1e-5, atol=1e-5)


def test_nan_stays_seen():
    x, kernel, offset, mask = plain_case()
    y = deform_conv2d(x, kernel, offset.at[0, 0, 0, 0].set(jnp.nan), mask)
    assert np.isnan(y[0, 0, 0]).all() and np.isfinite(y[1]).all()


def test_bfloat16_is_float32_rounded():
    (x, kernel, offset, mask), _, options = inputs_of("plain")
    want = deform_conv2d(x, kernel, offset, mask, **options)
    got = deform_conv2d(x.astype(jnp.bfloat16), kernel, offset, mask, **options)
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": jnp.zeros((2, 6, 7, 17))}, "offset has 17 channels"),
        ({"offset": jnp.zeros((2, 6, 7, 54))}, "divide 4 channels"),
        ({"mask": jnp.zeros((2, 6, 7, 8))}, "mask has 8 channels, not 9"),
        ({"kernel": jnp.zeros((3, 3, 3, 4))}, "does not fit 4 channels"),
        (
            {"offset": jnp.zeros((2, 5, 7, 18)), "mask": jnp.ones((2, 5, 7, 9))},
            "the result \\(6, 7\\)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    arrays = dict(zip(NAMES, plain_case(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        deform_conv2d(*(arrays[n] for n in NAMES))
