"""Going through a traced program, equation by equation, for another format's writer.

What depends on constants alone (folded norms, coordinates, kernels in another layout)
is computed on the way, so that the written graph holds results instead of recipes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from solov2_jax.io import InputError

# A constant as a numpy array; anything else is what a rule returned for a value.
Value = Any
# (writer, equation, inputs) -> outputs.
Rule = Callable[[Any, "Equation", Sequence[Value]], Sequence[Value]]

# Primitives that only wrap a program; the parameter that holds it.
_WRAPPERS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# Parameters that say how to compute, not what: devices, precision, hints.
_HINTS = frozenset(
    "accuracy dimensions indices_are_sorted is_stable new_sizes out_sharding "
    "precision preferred_element_type sharding unique_indices unroll weak_type".split()
)
# A constant larger than its own inputs and than this stays an operation.
_FOLD_BYTES = 1 << 20
_REMEDY = "export to another format (--format=stablehlo takes everything)"


@dataclass(frozen=True)
class Equation:
    """One operation of a traced program; `equation["axes"]` is its parameter."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple[Any, ...]  # types and shapes
    outputs: tuple[Any, ...]
    format: str  # of the writer, for messages
    _used: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        if name not in self.params:
            raise self._other_jax("no", name)
        self._used.add(name)
        return self.params[name]

    def __contains__(self, name: str) -> bool:
        return name in self.params

    def refuse(self, what: str) -> InputError:
        """Returns the error that the format has no form of something."""
        return InputError(f"{self.format}: {what} has no form here; {_REMEDY}")

    def check_all_used(self) -> None:
        """Raises InputError on a parameter that the rule has not looked at: a newer JAX
        may have given the primitive another meaning."""
        if unknown := sorted(set(self.params) - self._used - _HINTS):
            raise self._other_jax("the", unknown[0])

    def _other_jax(self, article: str, parameter: str) -> InputError:
        return InputError(
            f"{self.format}: {self.name} has {article} parameter {parameter!r} in JAX "
            f"{jax.__version__}, which this version does not know; install jax 0.10 to "
            f"0.12, or {_REMEDY}"
        )


def is_constant(value: Value) -> bool:
    """Returns whether a value is known while the graph is written."""
    return isinstance(value, np.ndarray | np.generic)


def walk(closed: Any, args: Sequence[Value], rules: Mapping[str, Rule], writer: Any) -> list[Value]:
    """Returns the outputs of a closed jaxpr whose equations went through the rules.

    Raises InputError naming every primitive that no rule translates.
    """
    if missing := sorted(unknown_primitives(closed.jaxpr, rules)):
        raise InputError(
            f"{writer.format}: it has no form of {', '.join(missing)}; {_REMEDY}, or set the "
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
        return np.asarray(variable.val, variable.aval.dtype) if literal else known[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        equation = Equation(
            name=name,
            params=eqn.params,
            inputs=tuple(v.aval for v in eqn.invars),
            outputs=tuple(v.aval for v in eqn.outvars),
            format=writer.format,
        )
        if name in _WRAPPERS:
            outputs = _walk(equation[_WRAPPERS[name]], inputs, rules, writer)
        elif all(is_constant(x) for x in inputs) and _foldable(equation, inputs):
            outputs = _fold(eqn, inputs)
        else:
            outputs = rules[name](writer, equation, inputs)
            equation.check_all_used()
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def unknown_primitives(jaxpr: Any, rules: Mapping[str, Rule]) -> set[str]:
    """Returns the primitives of a jaxpr, and inside it, that have no rule."""
    unknown = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name not in rules and name not in _WRAPPERS and eqn.invars:
            unknown.add(name)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if hasattr(part, "jaxpr") and hasattr(part, "consts"):
                    unknown |= unknown_primitives(part.jaxpr, rules)
    return unknown


def _foldable(equation: Equation, inputs: Sequence[Value]) -> bool:
    made = sum(aval.size * aval.dtype.itemsize for aval in equation.outputs)
    return made <= max(_FOLD_BYTES, sum(x.nbytes for x in inputs))


def _fold(eqn: Any, inputs: Sequence[Value]) -> list[np.ndarray]:
    results = eqn.primitive.bind(*inputs, **eqn.params)
    if not eqn.primitive.multiple_results:
        results = [results]
    return [np.asarray(x) for x in jax.device_get(results)]
