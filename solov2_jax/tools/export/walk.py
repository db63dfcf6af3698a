"""Going through a traced program, equation by equation, for another format's writer.

What depends on constants alone (folded norms, coordinates, kernels in another layout)
is computed on the way, so that the written graph holds results instead of recipes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# A constant as a numpy array; anything else is what a rule returned for a value.
Value = Any
# (writer, equation, inputs) -> outputs.
Rule = Callable[[Any, Any, Sequence[Value]], Sequence[Value]]

# Primitives that only wrap a program; the parameter that holds it.
_WRAPPERS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# A constant larger than its own inputs and than this stays an operation.
_FOLD_BYTES = 1 << 20


def is_constant(value: Value) -> bool:
    """Returns whether a value is known while the graph is written."""
    return isinstance(value, np.ndarray | np.generic)


def walk(closed: Any, args: Sequence[Value], rules: Mapping[str, Rule], writer: Any) -> list[Value]:
    """Returns the outputs of a closed jaxpr whose equations went through the rules.

    Raises:
      ValueError: naming every primitive that no rule translates.
    """
    if missing := sorted(unknown_primitives(closed.jaxpr, rules)):
        raise ValueError(
            f"{writer.format}: it has no form of {', '.join(missing)}; export to "
            "another format (--format=stablehlo takes everything), or set the "
            "options under config.test that need it to other values"
        )
    return _walk(closed, args, rules, writer)


def _walk(
    closed: Any, args: Sequence[Value], rules: Mapping[str, Rule], writer: Any
) -> list[Value]:
    jaxpr = closed.jaxpr
    known: dict[Any, Value] = {}
    known.update(zip(jaxpr.constvars, map(np.asarray, closed.consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(variable: Any) -> Value:
        literal = hasattr(variable, "val")
        return _literal(variable) if literal else known[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        name = equation.primitive.name
        if name in _WRAPPERS:
            inner = equation.params[_WRAPPERS[name]]
            outputs = _walk(inner, inputs, rules, writer)
        elif all(is_constant(x) for x in inputs) and _foldable(equation, inputs):
            outputs = _fold(equation, inputs)
        else:
            outputs = rules[name](writer, equation, inputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def unknown_primitives(jaxpr: Any, rules: Mapping[str, Rule]) -> set[str]:
    """Returns the primitives of a jaxpr, and inside it, that have no rule."""
    found = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name not in rules and name not in _WRAPPERS and equation.invars:
            found.add(name)
        for inner in inner_programs(equation):
            found |= unknown_primitives(inner.jaxpr, rules)
    return found


def inner_programs(equation: Any) -> list[Any]:
    """Returns the closed jaxprs among an equation's parameters."""
    found = []
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else [value]
        found += [p for p in parts if hasattr(p, "jaxpr") and hasattr(p, "consts")]
    return found


def _literal(variable: Any) -> np.ndarray:
    return np.asarray(variable.val, variable.aval.dtype)


def _foldable(equation: Any, inputs: Sequence[Value]) -> bool:
    made = sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
    return made <= max(_FOLD_BYTES, sum(x.nbytes for x in inputs))


def _fold(equation: Any, inputs: Sequence[Value]) -> list[np.ndarray]:
    results = equation.primitive.bind(*inputs, **equation.params)
    if not equation.primitive.multiple_results:
        results = [results]
    return [np.asarray(x) for x in jax.device_get(results)]
