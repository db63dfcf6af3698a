"""Names as templates whose fields are integers.

"res{s}.{i}" matches "res4.11" with s = 4 and i = 11. A field may be scaled and shifted:
"layer{s-1}" matches "layer3" with s = 4, "tower.{3i+1}" matches "tower.7" with i = 2 and
does not match "tower.8". The same fields fill another template.
"""

import re
from collections.abc import Mapping
from functools import cache

_FIELD = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")


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


def fill(template: str, values: Mapping[str, int]) -> str:
    """Returns the name that the template gives for the fields' values."""

    def number(field: re.Match[str]) -> str:
        scale, letter, shift = field.groups()
        return str(int(scale or 1) * values[letter] + int(shift or 0))

    return _FIELD.sub(number, template)
