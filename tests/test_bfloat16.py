"""With bfloat16 convolutions, what must be exact stays float32."""

import jax
import jax.numpy as jnp
import pytest
from tiny_network import tiny_config

from solov2_jax.tools.dry_run import batch_shapes, build_step

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
    lowered = step._step.trace(state, batch, jax.random.key(0))
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
