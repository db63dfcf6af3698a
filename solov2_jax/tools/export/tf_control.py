"""Loops and branches as TensorFlow's, in the forms that TFLite has too."""

from collections.abc import Sequence
from typing import Any

from solov2_jax.tools.export.tf_rules import ARRAY_RULES, TensorFlowBuilder
from solov2_jax.tools.export.walk import Rule, Value, walk

Inputs = Sequence[Value]


def _cond(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    index, *operands = inputs
    branches = eqn.params["branches"]

    def choose(first: int) -> list[Any]:
        def take() -> list[Any]:
            return _tensors(w, walk(branches[first], operands, RULES, w), eqn.outvars)

        if first == len(branches) - 1:
            return take()
        # TFLite has no operation that chooses one of many.
        return w.tf.cond(w.tf.equal(index, first), take, lambda: choose(first + 1))

    return list(choose(0))


def _while(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    params = eqn.params
    test_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    test_consts = inputs[:test_count]
    body_consts = inputs[test_count : test_count + body_count]
    carried = inputs[test_count + body_count :]

    def test(*state: Any) -> Any:
        return walk(params["cond_jaxpr"], [*test_consts, *state], RULES, w)[0]

    def body(*state: Any) -> list[Any]:
        made = walk(params["body_jaxpr"], [*body_consts, *state], RULES, w)
        return _tensors(w, made, eqn.outvars)

    return list(w.tf.while_loop(test, body, _tensors(w, carried, eqn.outvars)))


def _scan(w: TensorFlowBuilder, eqn: Any, inputs: Inputs) -> list[Value]:
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts = inputs[:num_consts]
    carried = inputs[num_consts : num_consts + num_carry]
    stacked, length = inputs[num_consts + num_carry :], params["length"]
    if params["reverse"]:
        raise ValueError(f"{w.format}: a scan from the end has no form here")
    rows_of = [w.tf.convert_to_tensor(x) for x in stacked]
    results = eqn.outvars[num_carry:]

    def turn(at: Any, state: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        rows = [w.tf.gather(x, at) for x in rows_of]
        out = walk(params["jaxpr"], [*consts, *state, *rows], RULES, w)
        return _tensors(w, out[:num_carry], eqn.outvars[:num_carry]), out[num_carry:]

    if length == 1:  # a batch of one image: no loop
        state, made = turn(0, carried)
        return [*state, *(w.tf.expand_dims(x, 0) for x in made)]
    arrays = [
        w.tf.TensorArray(w.tf.as_dtype(v.aval.dtype), length, element_shape=v.aval.shape[1:])
        for v in results
    ]

    def body(at: Any, state: list[Any], arrays: list[Any]) -> tuple[Any, ...]:
        state, made = turn(at, state)
        arrays = [a.write(at, x) for a, x in zip(arrays, made, strict=True)]
        return at + 1, state, arrays

    start = (w.tf.constant(0), _tensors(w, carried, eqn.outvars[:num_carry]), arrays)
    _, state, arrays = w.tf.while_loop(lambda at, *_: at < length, body, start)
    made = [a.stack() for a in arrays]
    return [*state, *(w.shaped(x, v) for x, v in zip(made, results, strict=True))]


def _tensors(w: TensorFlowBuilder, values: Inputs, variables: Sequence[Any]) -> list[Any]:
    """Returns values as tensors of the jaxpr's types and shapes."""
    return [w.shaped(w.tf.convert_to_tensor(x), v) for x, v in zip(values, variables, strict=True)]


RULES: dict[str, Rule] = {**ARRAY_RULES, "cond": _cond, "scan": _scan, "while": _while}
