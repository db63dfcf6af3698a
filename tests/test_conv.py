"""Our convolutions and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from solov2_jax import ops
from solov2_jax.models import conv, conv_cpu
from solov2_jax.models.layers import Conv, ConvNorm
from solov2_jax.training.restore import state_of

CASES = {
    "winograd": ([(2, 23, 27), (2, 8, 6)], 3, 1, 128, 136, jnp.float32),
    "winograd for the filter": ([(2, 17, 19)], 3, 1, 64, 72, jnp.float32),
    "taps": ([(2, 9, 7)], 3, 1, 8, 12, jnp.float32),
    "taps at stride 2": ([(2, 9, 8)], 3, 2, 8, 12, jnp.float32),
    "stem": ([(1, 17, 20)], 7, 2, 3, 8, jnp.float32),
    "pointwise": ([(2, 5, 7), (2, 3, 3)], 1, 1, 8, 12, jnp.float32),
    "pointwise at stride 2": ([(2, 5, 8)], 1, 2, 8, 12, jnp.float32),
    "bfloat16": ([(2, 23, 27)], 3, 1, 128, 136, jnp.bfloat16),
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
        return [ops.conv2d(x, kernel, stride) for x in xs]

    def ours(xs, kernel):
        return conv.conv2d_levels(xs, kernel, stride)

    outputs = jax.eval_shape(plain, xs, kernel)
    cotangents = [jnp.asarray(rng.normal(size=y.shape), dtype) for y in outputs]

    arguments = (xs, kernel, cotangents)
    got = jax.jit(with_gradients, static_argnums=0)(ours, *arguments)
    want = jax.jit(with_gradients, static_argnums=0)(plain, *arguments)
    # Relative to the tensor's largest value; bfloat16 has 8 bits.
    tolerance = 2e-5 if dtype == jnp.float32 else 3e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_winograd_is_used_where_it_is_meant():
    def is_used(case, width=None, grad=False):
        shapes, k, stride, c, d, dtype = CASES[case]
        xs = [jnp.zeros((*s, c), dtype) for s in shapes]
        kernel = jnp.zeros((k, k, c, width or d), dtype)
        test = conv_cpu.uses_winograd_for_filter_grad if grad else conv_cpu.uses_winograd
        return test(xs, kernel, stride)

    assert is_used("winograd") and is_used("winograd", grad=True)
    assert not is_used("winograd for the filter")
    assert is_used("winograd for the filter", grad=True)
    for case in ("bfloat16", "taps at stride 2", "pointwise"):
        assert not is_used(case) and not is_used(case, grad=True)
    assert not is_used("winograd", width=32, grad=True)
    assert is_used("winograd", width=128) and not is_used("winograd", width=64)


@pytest.mark.parametrize("tiles", [8, 10_000], ids=["strips", "together"])
def test_winograd_forms(tiles, monkeypatch):
    """Strips and whole planes, in all three directions, against sums in float64."""
    for name in ("STRIP_TILES", "MAX_STRIP_TILES", "_WHOLE_TILES"):
        monkeypatch.setattr(conv_cpu, name, tiles)
    rng = np.random.default_rng(0)
    # Strips of one plane end beyond it, those of the other with it.
    xs = [rng.normal(size=(2, 43, 13, 5)), rng.normal(size=(2, 12, 30, 5))]
    gs = [rng.normal(size=(*x.shape[:3], 7)) for x in xs]
    kernel = rng.normal(size=(3, 3, 5, 7))

    def shifted(x, i, j):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return x[:, i : x.shape[1] - 2 + i, j : x.shape[2] - 2 + j]

    taps = [(i, j) for i in range(3) for j in range(3)]
    values = [sum(shifted(x, i, j) @ kernel[i, j] for i, j in taps) for x in xs]
    pairs = list(zip(xs, gs, strict=True))
    back = [sum(shifted(g, 2 - i, 2 - j) @ kernel[i, j].T for i, j in taps) for g in gs]
    grads = [
        sum(np.einsum("bhwc,bhwd->cd", shifted(x, i, j), g) for x, g in pairs) for i, j in taps
    ]

    def all_three(xs, gs, kernel):
        weights = conv_cpu.winograd_filter(kernel)
        values = conv_cpu.winograd_conv(xs, weights), conv_cpu.winograd_input_grad(gs, weights)
        return values, conv_cpu.winograd_filter_grad(xs, gs)

    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (xs, gs, kernel))
    got = jax.tree.leaves(jax.jit(all_three)(*arrays))
    want = [*values, *back, np.reshape(grads, (3, 3, 5, 7))]
    # float32 rounds to 6e-8 of sums of up to 1890 terms, the transforms add some.
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 5e-6 * np.abs(b).max()


def test_a_transformed_model_computes_the_same():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ConvNorm(128, 3, name="a")(x)
            return Conv(8, 1, name="b")(Conv(128, 3, name="c")(x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 40, 128)), jnp.float32)
    model = Two()
    variables = model.init(jax.random.key(0), x)
    assert set(variables) == {"params", "batch_stats"}
    with conv.transformed_for("cpu"):
        _, transformed = model.apply(variables, x, mutable=["transformed"])
    shapes = jax.tree.map(lambda k: k.shape, transformed["transformed"])
    assert shapes["a"]["kernel"] == shapes["c"]["kernel"] == (36, 128, 128)
    got = model.apply({**variables, **transformed}, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))
    with pytest.raises(AssertionError, match="do not train"):
        state_of({**variables, **transformed}, optax.sgd(0.1))
