"""With bfloat16 convolutions, what must be exact stays float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import tiny_config

from solov2_jax import ops
from solov2_jax.models.heads import append_coords
from solov2_jax.models.layers import SharedConv
from solov2_jax.platforms import portable_forms
from solov2_jax.training.memory import batch_shapes, build_step

# Where few bits show: norms, losses, the sigmoid of masks, optimiser.
EXACT = {"exp", "log", "log1p", "logistic", "rsqrt", "sqrt", "div", "pow"}
BFLOAT16 = jnp.dtype(jnp.bfloat16)
CONVOLUTIONS = {"conv_general_dilated", "dot_general"}


def equations(jaxpr):
    """Yields all equations of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.fixture(scope="module")
def traced():
    """Returns (the train step's program, shapes of what it returns)."""
    config = tiny_config()
    config.model.dtype = "bfloat16"
    config.train.batch_size = 8
    config.optim.clip_norm, config.optim.ema_decay = 35.0, 0.999
    step, state, mesh = build_step(config)
    batch = batch_shapes(8, 8, 64, 64, mesh)
    with portable_forms():  # others are operations without equations until they are lowered
        lowered = step._step.trace(state, batch, step._inputs)
    return lowered.jaxpr.jaxpr, lowered.out_info


def test_state_and_metrics_are_float32(traced):
    state, metrics = traced[1]
    for leaf in jax.tree.leaves((state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert {"loss", "loss_ins", "loss_cate", "grad_norm"} <= metrics.keys()


def test_what_crosses_the_devices_is_float32(traced):
    """A ring adds n terms one after the other: in 8 bits the last ones would be lost."""
    sent = [
        v.aval
        for e in equations(traced[0])
        if e.primitive.name.startswith("psum")
        for v in e.invars
    ]
    assert {aval.dtype for aval in sent} == {jnp.dtype(jnp.float32)}
    assert sum(aval.ndim == 4 for aval in sent) > 20, "the filters' gradients"


def test_convolutions_are_bfloat16_and_nothing_exact_is(traced):
    wrong, low = [], 0
    for equation in equations(traced[0]):
        name = equation.primitive.name
        types = {getattr(v.aval, "dtype", None) for v in equation.invars}
        if name in EXACT and BFLOAT16 in types:
            wrong.append(str(equation)[:200])
        low += name in CONVOLUTIONS and BFLOAT16 in types
    assert not wrong, wrong[:3]
    assert low > 60, "forward and backward of some 30 convolutions"


@pytest.mark.parametrize("extent", [None, [[100, 168]]])
def test_resize_weights_are_float32(extent):
    """In bfloat16 a row's weights would add up to 1.002."""
    extent = None if extent is None else jnp.array(extent)
    ones = jnp.ones((1, 100, 168, 2), jnp.bfloat16)
    got = ops.resize_bilinear(ones.at[..., 1].set(77), (40, 36), extent)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.unique(np.float32(got)), [1, 77])
    x = jax.random.normal(jax.random.key(0), (1, 50, 70, 4)).astype(jnp.bfloat16)
    rounded_once = ops.resize_bilinear(x.astype(jnp.float32), (40, 24)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ops.resize_bilinear(x, (40, 24)), rounded_once)


def test_a_convolution_sees_coordinates_to_sixteen_bits():
    xy = jnp.asarray(ops.coord_grid(100, 168))[None]
    x = jnp.zeros((1, 100, 168, 3), jnp.bfloat16)
    kernel = jnp.zeros((1, 1, 5, 2)).at[0, 0, 3, 0].set(1).at[0, 0, 4, 1].set(1)
    conv = SharedConv(2, 1, use_bias=False, dtype=jnp.bfloat16, split_coords=True)
    split = append_coords(x, xy)
    assert split.dtype == jnp.bfloat16 and split.shape[-1] == 3 + 4
    wide = SharedConv(2, 1, use_bias=False, split_coords=True)  # sums in float32
    (got,) = wide.apply({"params": {"kernel": kernel}}, [split])
    np.testing.assert_allclose(got, xy, rtol=0, atol=2**-16)
    (low,) = conv.apply({"params": {"kernel": kernel}}, [split])
    assert low.dtype == jnp.bfloat16

    def loss(params):
        (y,) = conv.apply({"params": params}, [split])
        return jnp.sum(y.astype(jnp.float32) * xy)

    (grad,) = jax.tree.leaves(jax.grad(loss)({"kernel": kernel}))
    assert grad.shape == kernel.shape
    np.testing.assert_allclose(grad[0, 0, 3, 0], jnp.sum(xy[..., 0] ** 2), rtol=1e-2)
