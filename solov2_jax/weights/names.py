"""Names of other programs' tensors -> leaves of our variables, and back.

A table, one for each program in `tables.py`, is a tuple of rules (source name, target leaf,
transform). Names are templates whose fields are integers: "res{s}.{i}" matches "res4.11" with
s = 4 and i = 11, and the same fields fill another template. A field may be scaled and
shifted: "layer{s-1}" matches "layer3" with s = 4; "tower.{3i+1}" matches "tower.7" with i = 2
and does not match "tower.8". Targets are flat paths ("params/backbone/stem/conv1/kernel");
kernels are HWIO here, OIHW there.

This module knows names and array layouts; it reads no files. `no_type_check`: called once
per name, too often for the type checks that the tests add to every call.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import no_type_check

import numpy as np

Flat = dict[str, np.ndarray]

_FIELD = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
NORM_EPS = 1e-5  # of the network's frozen batch norms and group norms


@dataclass(frozen=True)
class Rule:
    """Source tensors named `source` fill the leaves named `target`.

    `transform`: "same", "kernel" (OIHW -> HWIO), "matrix" (OI -> IO), "pixel" (OI11 -> IO),
    "vector" (C11 -> C), "rows" (1NC -> NC), "third0", "third1", "third2" (a third of the
    outputs of a layer, OI -> IO, or of its bias), "eps_1e-3" (a variance whose norm had that
    epsilon, not `NORM_EPS`), "zeros" or "identity_var" (the source has an affine norm only: its
    mean is 0 and its variance + epsilon is 1).
    """

    source: str
    target: str
    transform: str = "same"


@dataclass(frozen=True)
class Drop:
    """Source tensors that fully match the regular expression are not needed."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class NameTable:
    """What one source's names mean."""

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()

    @cached_property
    def by_source(self) -> dict[str, list[Rule]]:
        """Rules by the skeleton of their source name."""
        return self._by_skeleton("source")

    @cached_property
    def by_target(self) -> dict[str, list[Rule]]:
        """Rules by the skeleton of their target."""
        return self._by_skeleton("target")

    def _by_skeleton(self, side: str) -> dict[str, list[Rule]]:
        index: dict[str, list[Rule]] = {}
        for rule in self.rules:
            template = _FIELD.sub("0", getattr(rule, side))
            index.setdefault(skeleton(template), []).append(rule)
        return index


@no_type_check
def skeleton(name: str) -> str:
    """Returns the name with every number as "#": all that a template can match has
    the template's skeleton."""
    return re.sub(r"\d+", "#", name)


def conv(source: str, target: str, bias: bool = False) -> tuple[Rule, ...]:
    """Returns the rules of a convolution, with a bias or without."""
    kernel = Rule(f"{source}.weight", f"params/{target}/kernel", "kernel")
    if not bias:
        return (kernel,)
    return kernel, Rule(f"{source}.bias", f"params/{target}/bias")


def group_norm(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a norm's scale and bias."""
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
    )


def batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a batch norm: scale, bias, running mean and variance."""
    return (
        *group_norm(source, target),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    )


@cache
def _compile(template: str) -> tuple[re.Pattern[str], tuple[tuple[int, str, int], ...]]:
    """Returns the template's pattern and its fields (scale, letter, shift)."""
    pattern, fields, end = "", [], 0
    for field in _FIELD.finditer(template):
        pattern += re.escape(template[end : field.start()]) + r"(0|[1-9]\d{0,5})"
        scale, letter, shift = field.groups()
        fields.append((int(scale or 1), letter, int(shift or 0)))
        end = field.end()
    return re.compile(pattern + re.escape(template[end:])), tuple(fields)


@no_type_check
def match(template: str, name: str) -> dict[str, int] | None:
    """Returns the fields' values when the name has the template's form."""
    pattern, fields = _compile(template)
    matched = pattern.fullmatch(name)
    if matched is None:
        return None
    values: dict[str, int] = {}
    for (scale, letter, shift), text in zip(fields, matched.groups(), strict=True):
        value, rest = divmod(int(text) - shift, scale)
        if rest or value < 0 or values.setdefault(letter, value) != value:
            return None
    return values


@no_type_check
def fill(template: str, values: Mapping[str, int]) -> str:
    """Returns the name that the template gives for the fields' values."""

    def number(field: re.Match[str]) -> str:
        scale, letter, shift = field.groups()
        return str(int(scale or 1) * values[letter] + int(shift or 0))

    return _FIELD.sub(number, template)


COUNTER = Drop(
    r"(.*\.)?num_batches_tracked|n_averaged|steps?|initted",
    "a counter, of batches or averaged steps",
)


@no_type_check
def targets_of(table: NameTable, name: str) -> list[tuple[str, str]]:
    """Returns the (leaf, transform) pairs that the source tensor `name` fills."""
    targets = []
    for rule in table.by_source.get(skeleton(name), ()):
        values = match(rule.source, name)
        if values is not None:
            targets.append((fill(rule.target, values), rule.transform))
    return targets


def drop_reason(table: NameTable, name: str) -> str | None:
    """Returns why the table drops the source tensor, None when it does not."""
    for drop in table.drops:
        if re.fullmatch(drop.pattern, name):
            return drop.reason
    return None


@no_type_check
def apply_transform(transform: str, value: np.ndarray) -> np.ndarray:
    """Returns our form of a source array: [O, I, h, w] kernels become [h, w, I, O]."""
    if transform == "same":
        return value
    if transform == "kernel":
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    if transform == "matrix":
        return value.T if value.ndim == 2 else value
    if transform == "pixel":
        return value[:, :, 0, 0].T if value.shape[2:] == (1, 1) else value
    if transform == "vector":
        return value.ravel() if value.size == value.shape[0] else value
    if transform == "rows":
        return value[0] if value.ndim == 3 and len(value) == 1 else value
    if transform.startswith("third"):
        part = np.split(value, 3)[int(transform[5])] if len(value) % 3 == 0 else value
        return part.T if part.ndim == 2 else part
    if transform == "eps_1e-3":
        return value + np.asarray(1e-3 - NORM_EPS, value.dtype)
    if transform == "zeros":
        return np.zeros_like(value)
    if transform == "identity_var":
        return np.full_like(value, 1.0 - NORM_EPS)
    raise ValueError(f"unknown transform {transform!r}")


def from_names(table: NameTable, state: Mapping[str, np.ndarray]) -> tuple[Flat, Flat]:
    """Returns (leaves that the table fills, source tensors it has no rule for).

    Raises ValueError when two source tensors fill the same leaf.
    """
    flat: Flat = {}
    rest: Flat = {}
    filled_by: dict[str, str] = {}
    for name, value in state.items():
        targets = targets_of(table, name)
        if not targets:
            rest[name] = value
        for leaf, transform in targets:
            if leaf in flat:
                raise ValueError(
                    f"tensors {filled_by[leaf]!r} and {name!r} both fill {leaf}: "
                    "remove one of them from the file"
                )
            flat[leaf], filled_by[leaf] = apply_transform(transform, value), name
    return flat, rest


def to_names(table: NameTable, flat: Mapping[str, np.ndarray], program: str) -> Flat:
    """Returns the state dict (OIHW) that the table makes of our flat leaves.

    Raises ValueError naming the leaves that it has no rule for.
    """
    state, unknown = {}, []
    for leaf, value in flat.items():
        for rule in table.by_target.get(skeleton(leaf), ()):
            values = match(rule.target, leaf)
            if values is not None and rule.transform in ("same", "kernel"):
                kernel = rule.transform == "kernel"
                value = value.transpose(3, 2, 0, 1) if kernel else value
                state[fill(rule.source, values)] = value
                break
        else:
            unknown.append(leaf)
    if unknown:
        raise ValueError(f"{program} has no names for {shorten(unknown)}")
    return state


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """Returns the names in a list for a message, the first few and a count."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(name[:120] for name in names[:limit]) + more
