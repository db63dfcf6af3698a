"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
# "%name = (f32[3,4]{1,0}, /*index=1*/s32[]) all-reduce-start(...)"; a "-done" is its
# other half.
_LINE = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_SIZES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation; several arrays mean that the compiler combined them."""

    kind: str
    arrays: int
    bytes: int
    types: tuple[str, ...]
    source: str  # the operation in the program that it came from, "" if not told


def read_collectives(text: str) -> list[Collective]:
    """Returns the collective operations of a compiled program's text, in its order."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if not match:
            continue
        arrays = _ARRAY.findall(match[1])
        size = sum(_bytes(kind) * _elements(dims) for kind, dims in arrays)
        name = re.search(r'op_name="([^"]*)"', line)
        types = tuple(sorted({kind for kind, _ in arrays}))
        source = name[1] if name else ""
        found.append(Collective(match[2], len(arrays), size, types, source))
    return found


def summed(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Returns number of operations, of the arrays in them, and bytes, of each kind."""
    return [
        {
            "kind": kind,
            "types": sorted({t for c in some for t in c.types}),
            "operations": len(some),
            "arrays": sum(c.arrays for c in some),
            "bytes": sum(c.bytes for c in some),
        }
        for kind in dict.fromkeys(c.kind for c in found)
        if (some := [c for c in found if c.kind == kind])
    ]


def _bytes(kind: str) -> int:
    return _SIZES.get(kind) or int(kind[1:]) // 8


def _elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)
