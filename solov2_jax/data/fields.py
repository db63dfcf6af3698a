"""Fields of the records of a json, read with one sentence about what is wrong."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from solov2_jax.data.outlines import are_numbers, as_json
from solov2_jax.io import InputError


@dataclasses.dataclass(frozen=True)
class Fields:
    """Reads a field of every record of a list, or raises one sentence about it.

    Attributes:
      title: of the i-th record, such as "annotation 7".
    """

    records: Sequence[dict[str, Any]]
    source: str
    title: Callable[[int], str]

    def name(self, i: int) -> str:
        """Returns what to call a record, with its file."""
        return f"{self.source}: {self.title(i)}"

    def __call__(
        self, key: str, read: Callable[[Any], Any], expected: str, default: Any = None
    ) -> list[Any]:
        """Returns the field's values.

        Args:
          read: what turns a value of json into one of ours, None if it is no such value.
          expected: what the value must be, in words.
          default: where the field is null or absent; None: it must be there.
        """
        values = [record.get(key) for record in self.records]
        absent = [i for i, value in enumerate(values) if value is None or value == []]
        if absent and default is None:
            raise InputError(
                f"{self.name(absent[0])}: has no `{key}` ({len(absent)} of {len(values)} have "
                f"none), it is {as_json(self.records[absent[0]])}; add it."
            )
        results = list(map(read, values))
        for i in absent:
            results[i] = default
        if None in results:
            bad = [i for i, result in enumerate(results) if result is None]
            raise InputError(
                f"{self.name(bad[0])}: `{key}` is {as_json(values[bad[0]])}, not {expected} "
                f"({len(bad)} of {len(values)} are not); correct it."
            )
        return results


def whole_number(value: Any) -> int | None:
    """Returns the whole number that a json value is or, as text, holds; else None."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,100}", value, re.ASCII):
        return int(value)
    return None


def read_box(value: Any) -> list[float] | None:
    """Returns four finite numbers as they are; else None."""
    return list(map(float, value)) if are_numbers(value) and len(value) == 4 else None


def describe(values: Iterable[Any], limit: int = 5) -> str:
    """Returns the first few of the values, and how many there are."""
    values = list(values)
    text = ", ".join(str(v)[:200] for v in values[:limit])
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"
