"""Each primitive through ONNX Runtime against JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from solov2_jax.io import InputError
from solov2_jax.keypoints import decode_keypoints
from solov2_jax.tools.export.jaxpr import Equation, walk
from solov2_jax.tools.export.onnx_graph import IR_VERSION, OPSET, Graph
from solov2_jax.tools.export.rules import RULES, scan_inputs

onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6)).astype(np.float32)
V = np.array([3.0, 1.0, 3.0, -2.0, 1.0, 3.0], np.float32)  # with ties
I = np.array([2, 0, 5, 1, 9, -3], np.int32)  # noqa: E741
IMAGE = RNG.normal(size=(2, 7, 9, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 3, 5)).astype(np.float32)


def run(function, *arguments):
    """Returns what ONNX Runtime computes for `function(*arguments)`."""
    closed = jax.make_jaxpr(function)(*arguments)
    graph = Graph()
    names = [f"in{i}" for i in range(len(arguments))]
    outputs = [graph.output(x) for x in walk(closed, names, RULES, graph)]
    helper = graph.onnx.helper
    made = helper.make_graph(
        graph.nodes,
        "test",
        [graph.info(n, v) for n, v in zip(names, closed.in_avals, strict=True)],
        [graph.info(n, v) for n, v in zip(outputs, closed.out_avals, strict=True)],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)
    graph.onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = dict(zip(names, map(np.asarray, arguments), strict=True))
    return session.run(None, given)


def count_up(x):
    """A loop whose number of turns depends on the data."""
    return lax.while_loop(
        lambda s: s[1].sum() < 40.0, lambda s: (s[0] + 1, s[1] + x * x), (0, x * 0)
    )


def chain(x):
    """A scan that carries, reads and makes rows."""

    def step(total, row):
        return total + row, jnp.tanh(total) * 2

    return lax.scan(step, jnp.zeros(6), x)


CASES = {
    "error function": (lax.erf, X),
    "stable sort by a key": (lambda v: lax.sort((v, jnp.arange(6)), num_keys=1), V),
    "sort of whole numbers": (lambda i: jnp.sort(i), I),
    "top k with ties": (lambda v: lax.top_k(v, 4), V),
    "rows by index": (lambda x, i: x[jnp.minimum(i, 3)], X, np.abs(I)),
    "columns by index": (lambda x, i: x[:, i], X, np.abs(I) % 6),
    "index with fill": (lambda v, i: v.at[i].get(mode="fill", fill_value=7.0), V, I),
    "index with clip": (lambda v, i: v.at[i].get(mode="clip"), V, I),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (I[2], jnp.int32(1)), (2, 3)), X),
    "dynamic update": (
        lambda v, n: lax.dynamic_update_slice_in_dim(v, v[:2] * 9, n, 0),
        V,
        np.int32(5),
    ),
    "update that would not fit": (
        lambda v, n: lax.dynamic_update_slice_in_dim(v, v[:4] * 9, n, 0),
        V,
        np.int32(5),
    ),
    "pad and cut": (lambda x: lax.pad(x, 2.0, [(1, -1, 0), (-2, 3, 0)]), X),
    "pad of booleans": (lambda x: jnp.pad(x > 0, 1), X),
    "strides and reversal": (lambda x: (x[::2, 1::3], x[:, ::-1]), X),
    "choice of booleans": (lambda x: jnp.where(x > 0, x > 1, x < -1), X),
    "reductions": (
        lambda x: (x.sum(0), x.max(1), x.min(), (x > 2).any(0), (x > -9).all(1)),
        X,
    ),
    "product and shift": (
        lambda i: (jnp.prod(i), lax.shift_right_logical(i + 31, 5)),
        np.abs(I) + 1,
    ),
    "first maximum": (lambda v: (jnp.argmax(v), jnp.argmax(v < 0)), V),
    "batched product": (lambda a: jnp.einsum("bhwc,bhwd->bcd", a, a), IMAGE),
    "outer product": (lambda v: jnp.einsum("i,j->ij", v, v), V),
    "convolution": (
        lambda x: lax.conv_general_dilated(
            x,
            KERNEL,
            (2, 1),
            [(1, 0), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        IMAGE,
    ),
    "remainders": (lambda i: (lax.rem(i, np.int32(4)), i // 2, i % 3), I),
    "rounding": (lambda x: (jnp.floor(x), jnp.square(x) ** 3, lax.rsqrt(x * x + 1)), X),
    "clamp": (lambda i: lax.clamp(np.int32(0), i, np.int32(3)), I),
    "stack and split": (lambda x: (jnp.stack([x, x + 1], 1), *jnp.split(x, 2, 1)), X),
    "branch": (
        lambda v, n: lax.switch(n, [jnp.exp, lambda x: x + 1, lambda x: x * n], v),
        V,
        np.int32(2),
    ),
    "loop": (count_up, V),
    "scan": (chain, X),
    "sort of columns": (lambda x: lax.sort((x, x * 2), dimension=0, num_keys=1), X),
    "top k of columns": (lambda x: lax.top_k(x, 2, axis=0), X),
    "map of one": (lambda x: lax.map(lambda row: row + 1, x[:1]), X),
    "map of loops": (lambda x: lax.map(count_up, x), X),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_jax(name):
    function, *arguments = CASES[name]
    want = jax.tree.leaves(jax.jit(function)(*arguments))
    got = run(function, *arguments)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Sums in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_has_no_form_is_named():
    with pytest.raises(ValueError, match="onnx: it has no form of cumsum, sin;"):
        run(lambda x: jnp.cumsum(jnp.sin(x)), V)
    with pytest.raises(ValueError, match="onnx: a gather of"):
        run(lambda x, i: x[i, i], X, np.abs(I) % 4)


def equation(name, **params):
    return Equation(name=name, params=params, inputs=(), outputs=(), format="onnx")


def test_parameters_that_are_missing_or_unknown_are_named():
    """Another JAX, whose primitives have other parameters."""
    with pytest.raises(InputError, match="onnx: scan has no parameter 'length' in JAX"):
        equation("scan", reverse=False)["length"]
    with pytest.raises(InputError, match="onnx: scan has no parameter 'num_consts' in JAX"):
        scan_inputs(equation("scan", reverse=False), [])
    eqn = equation("cumsum", axis=0, reverse=True, precision=None)
    assert eqn["axis"] == 0
    with pytest.raises(InputError, match="cumsum has the parameter 'reverse' in JAX"):
        eqn.check_all_used()
    assert eqn["reverse"]
    eqn.check_all_used()


def test_what_depends_on_constants_is_computed_before():
    closed = jax.make_jaxpr(lambda x: x * (jnp.asarray(X) * 2 + 1).sum())(V)
    graph = Graph()
    walk(closed, ["x"], RULES, graph)
    assert [node.op_type for node in graph.nodes] == ["Mul"]


def test_key_points_are_those_of_jax():
    """The decoder by itself: heatmaps, their maxima, and the parabola through them."""
    features = jnp.asarray(RNG.normal(size=(6, 8, 5)), jnp.float32)
    kernels = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)
    inside = jnp.asarray(np.arange(48).reshape(6, 8) % 8 < 6)
    (got,) = run(lambda k, f, i: decode_keypoints(k, f, i), kernels, features, inside)
    want = decode_keypoints(kernels, features, inside)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
