"""Rules of the name tables; names as templates whose fields are integers.

"res{s}.{i}" matches "res4.11" with s = 4 and i = 11. A field may be scaled and shifted:
"layer{s-1}" matches "layer3" with s = 4, "tower.{3i+1}" matches "tower.7" with i = 2
and does not match "tower.8". The same fields fill another template.

`no_type_check` here and beside: called once per opcode or name, too often for the type
checks that the tests add to every call.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import no_type_check

_FIELD = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
NORM_EPS = 1e-5  # of the network's frozen batch norms and group norms


@dataclass(frozen=True)
class Rule:
    """Source tensors named `source` fill the leaves named `target`.

    `transform`: "same", "kernel" (OIHW -> HWIO), "zeros" or "identity_var" (the
    source has an affine norm only: its mean is 0 and its variance + epsilon is 1).
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
        return _by_skeleton((rule.source, rule) for rule in self.rules)

    @cached_property
    def by_target(self) -> dict[str, list[Rule]]:
        """Rules by the skeleton of their target."""
        return _by_skeleton((rule.target, rule) for rule in self.rules)


def _by_skeleton(rules: Iterable[tuple[str, Rule]]) -> dict[str, list[Rule]]:
    index: dict[str, list[Rule]] = {}
    for template, rule in rules:
        index.setdefault(skeleton(_FIELD.sub("0", template)), []).append(rule)
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
    found = pattern.fullmatch(name)
    if found is None:
        return None
    values: dict[str, int] = {}
    for (scale, letter, shift), text in zip(fields, found.groups(), strict=True):
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
