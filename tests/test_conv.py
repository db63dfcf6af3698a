"""Our convolutions and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax.models import conv

CASES = {
    "winograd": ([(2, 17, 19), (2, 8, 6)], 3, 1, 64, 72, jnp.float32),
    "taps": ([(2, 9, 7)], 3, 1, 8, 12, jnp.float32),
    "taps at stride 2": ([(2, 9, 8)], 3, 2, 8, 12, jnp.float32),
    "stem": ([(1, 17, 20)], 7, 2, 3, 8, jnp.float32),
    "pointwise": ([(2, 5, 7), (2, 3, 3)], 1, 1, 8, 12, jnp.float32),
    "pointwise at stride 2": ([(2, 5, 8)], 1, 2, 8, 12, jnp.float32),
    "bfloat16": ([(2, 17, 19)], 3, 1, 64, 72, jnp.bfloat16),
}


def with_gradients(function, xs, kernel, cotangents):
    """The values and both gradients."""
    values, pull_back = jax.vjp(function, xs, kernel)
    return values, pull_back(cotangents)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    shapes, k, stride, c, d, dtype = CASES[case]
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=(*s, c)), dtype) for s in shapes]
    kernel = jnp.asarray(rng.normal(size=(k, k, c, d)), dtype)

    def plain(xs, kernel):
        return [conv._lax_conv(x, kernel, stride) for x in xs]

    def ours(xs, kernel):
        return conv.conv2d_levels(xs, kernel, stride)

    outputs = jax.eval_shape(plain, xs, kernel)
    cotangents = [jnp.asarray(rng.normal(size=y.shape), dtype) for y in outputs]

    arguments = (xs, kernel, cotangents)
    got = jax.jit(with_gradients, static_argnums=0)(ours, *arguments)
    want = jax.jit(with_gradients, static_argnums=0)(plain, *arguments)
    # Relative to the tensor's largest value; bfloat16 has 8 bits.
    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_winograd_is_used_where_it_is_meant():
    shapes, *_, c, d, dtype = CASES["winograd"]
    xs = [jax.ShapeDtypeStruct((*s, c), dtype) for s in shapes]
    assert conv._is_winograd(xs, jax.ShapeDtypeStruct((3, 3, c, d), dtype), 1)
    assert not conv._is_winograd(xs, jax.ShapeDtypeStruct((3, 3, c, 32), dtype), 1)
