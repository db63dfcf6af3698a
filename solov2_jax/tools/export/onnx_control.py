"""Loops and branches as ONNX's Loop and If, whose graphs see the names around them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.onnx_graph import Graph
from solov2_jax.tools.export.onnx_rules import ARRAY_RULES
from solov2_jax.tools.export.walk import Rule, Value, walk


def _cond(g: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    index, *operands = inputs
    return _branch(g, eqn, index, operands, 0)


def _branch(g: Graph, eqn: Any, index: Value, operands: Sequence[Value], first: int) -> list[Value]:
    """Returns the outputs of branch `index`, which is not before `first`."""
    branches = eqn.params["branches"]
    if first == len(branches) - 1:
        return walk(branches[first], operands, RULES, g)
    dtype = eqn.invars[0].aval.dtype
    chosen = g.add("Equal", index, np.asarray(first, dtype))
    avals = [v.aval for v in eqn.outvars]

    def graph(make: Callable[[], Sequence[Value]]) -> Any:
        with g.inner() as nodes:
            names = [g.output(x) for x in make()]
        return g.make(nodes, [], [g.info(*pair) for pair in zip(names, avals, strict=True)])

    then = graph(lambda: walk(branches[first], operands, RULES, g))
    other = graph(lambda: _branch(g, eqn, index, operands, first + 1))
    arguments = {"then_branch": then, "else_branch": other}
    return list(g.add_many("If", len(avals), chosen, **arguments))


def _while(g: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    params = eqn.params
    test_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    test_consts = inputs[:test_count]
    body_consts = inputs[test_count : test_count + body_count]
    carried = inputs[test_count + body_count :]

    def test(state: Sequence[Value]) -> Value:
        return walk(params["cond_jaxpr"], [*test_consts, *state], RULES, g)[0]

    def body(_: str, state: Sequence[Value]) -> tuple[Sequence[Value], list[Value]]:
        return walk(params["body_jaxpr"], [*body_consts, *state], RULES, g), []

    return _loop(g, carried, eqn.outvars, [], body, start=test(carried), test=test)


def _scan(g: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts = inputs[:num_consts]
    carried = inputs[num_consts : num_consts + num_carry]
    stacked = inputs[num_consts + num_carry :]
    if params["reverse"]:
        raise ValueError("onnx: a scan from the end has no form here")

    def body(at: Value, state: Sequence[Value]) -> tuple[Sequence[Value], list[Value]]:
        rows = [g.add("Gather", x, at, axis=0) for x in stacked]
        out = walk(params["jaxpr"], [*consts, *state, *rows], RULES, g)
        return out[:num_carry], out[num_carry:]

    if params["length"] == 1:  # a batch of one image: no loop
        state, made = body(np.asarray(0, np.int64), carried)
        made = [g.add("Unsqueeze", x, g.ints([0])) for x in made]
        return [*state, *made]
    outputs, made = eqn.outvars[:num_carry], eqn.outvars[num_carry:]
    return _loop(g, carried, outputs, made, body, length=params["length"])


def _loop(
    g: Graph,
    carried: Sequence[Value],
    outputs: Sequence[Any],
    made: Sequence[Any],
    body: Callable[[str, Sequence[Value]], tuple[Sequence[Value], list[Value]]],
    *,
    length: int | None = None,
    start: Value = True,
    test: Callable[[Sequence[Value]], Value] | None = None,
) -> list[Value]:
    """Returns what a Loop carries at its end, and what it makes at each turn.

    Args:
      outputs, made: the jaxpr's variables, for types and shapes.
      body: (number of the turn, carried) -> (carried, made).
      length: of turns; without it `test(carried)` ends the loop.
    """
    at, going = g.new(), g.new()
    names = [g.new() for _ in carried]
    with g.inner() as nodes:
        state, parts = body(at, names)
        again = g.output(test(state) if test else np.asarray(True))
        state_names = [g.output(x) for x in state]
        part_names = [g.output(x) for x in parts]
    avals = [v.aval for v in outputs]
    helper, types = g.onnx.helper, g.onnx.TensorProto
    inputs = [
        helper.make_tensor_value_info(at, types.INT64, []),
        helper.make_tensor_value_info(going, types.BOOL, []),
        *(g.info(*pair) for pair in zip(names, avals, strict=True)),
    ]
    results = [
        helper.make_tensor_value_info(again, types.BOOL, []),
        *(g.info(*pair) for pair in zip(state_names, avals, strict=True)),
        *(
            helper.make_tensor_value_info(name, g.dtype(v.aval.dtype), list(v.aval.shape[1:]))
            for name, v in zip(part_names, made, strict=True)
        ),
    ]
    graph = g.make(nodes, inputs, results)
    limit = np.asarray(length if length is not None else np.iinfo(np.int64).max, np.int64)
    first = np.asarray(True) if test is None else start
    return list(g.add_many("Loop", len(avals) + len(made), limit, first, *carried, body=graph))


RULES: dict[str, Rule] = {
    **ARRAY_RULES,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
