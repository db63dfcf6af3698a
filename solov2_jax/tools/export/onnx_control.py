"""Loops and branches as ONNX's Loop and If, whose graphs see the names around them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solov2_jax.tools.export.jaxpr import Equation, Rule, Value, walk
from solov2_jax.tools.export.onnx_graph import Graph
from solov2_jax.tools.export.rules import ARRAY_RULES, scan_inputs, while_inputs


def _cond(g: Graph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    index, *operands = inputs
    return _branch(g, eqn, index, operands, 0)


def _branch(
    g: Graph, eqn: Equation, index: Value, operands: Sequence[Value], first: int
) -> list[Value]:
    """Returns the outputs of branch `index`, which is not before `first`."""
    branches = eqn["branches"]
    if first == len(branches) - 1:
        return walk(branches[first], operands, RULES, g)
    dtype = eqn.inputs[0].dtype
    chosen = g.add("Equal", index, np.asarray(first, dtype))
    avals = eqn.outputs

    def graph(make: Callable[[], Sequence[Value]]) -> Any:
        with g.inner() as nodes:
            names = [g.output(x) for x in make()]
        return g.make(nodes, [], [g.info(*pair) for pair in zip(names, avals, strict=True)])

    then = graph(lambda: walk(branches[first], operands, RULES, g))
    other = graph(lambda: _branch(g, eqn, index, operands, first + 1))
    arguments = {"then_branch": then, "else_branch": other}
    return list(g.add_many("If", len(avals), chosen, **arguments))


def _while(g: Graph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    test_consts, body_consts, carried = while_inputs(eqn, inputs)
    test_program, body_program = eqn["cond_jaxpr"], eqn["body_jaxpr"]

    def test(state: Sequence[Value]) -> Value:
        return walk(test_program, [*test_consts, *state], RULES, g)[0]

    def body(_: str, state: Sequence[Value]) -> tuple[Sequence[Value], list[Value]]:
        return walk(body_program, [*body_consts, *state], RULES, g), []

    return _loop(g, carried, eqn.outputs, [], body, start=test(carried), test=test)


def _scan(g: Graph, eqn: Equation, inputs: Sequence[Value]) -> list[Value]:
    consts, carried, stacked = scan_inputs(eqn, inputs)
    program, length, num_carry = eqn["jaxpr"], eqn["length"], len(carried)

    def body(at: Value, state: Sequence[Value]) -> tuple[Sequence[Value], list[Value]]:
        rows = [g.take(x, at, 0) for x in stacked]
        out = walk(program, [*consts, *state, *rows], RULES, g)
        return out[:num_carry], out[num_carry:]

    if length == 1:  # a batch of one image: no loop
        state, made = body(np.asarray(0, np.int64), carried)
        return [*state, *(g.add("Unsqueeze", x, g.ints([0])) for x in made)]
    outputs, made = eqn.outputs[:num_carry], eqn.outputs[num_carry:]
    return _loop(g, carried, outputs, made, body, length=length)


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
      outputs, made: types and shapes of what is carried, and of what all turns make.
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
    helper, types = g.onnx.helper, g.onnx.TensorProto
    inputs = [
        helper.make_tensor_value_info(at, types.INT64, []),
        helper.make_tensor_value_info(going, types.BOOL, []),
        *(g.info(*pair) for pair in zip(names, outputs, strict=True)),
    ]
    results = [
        helper.make_tensor_value_info(again, types.BOOL, []),
        *(g.info(*pair) for pair in zip(state_names, outputs, strict=True)),
        *(
            helper.make_tensor_value_info(name, g.dtype(aval.dtype), list(aval.shape[1:]))
            for name, aval in zip(part_names, made, strict=True)
        ),
    ]
    graph = g.make(nodes, inputs, results)
    limit = np.asarray(length if length is not None else np.iinfo(np.int64).max, np.int64)
    first = np.asarray(True) if test is None else start
    return list(g.add_many("Loop", len(outputs) + len(made), limit, first, *carried, body=graph))


RULES: dict[str, Rule] = {
    **ARRAY_RULES,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
