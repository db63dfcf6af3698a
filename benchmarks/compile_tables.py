"""The tables of compile times, from results/compile.json."""

from collections.abc import Mapping
from typing import Any

from markdown import table


def totals(phases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the sums up to the first result, and what no compiling explains."""
    some = [p for name, p in phases.items() if name != "second"]
    keys = ("seconds", "trace", "lower", "compile", "programs", "hits")
    found = {key: sum(p[key] for p in some) for key in keys}
    found["imports"] = phases["imports"]["seconds"]
    found["rest"] = found["seconds"] - sum(
        found[key] for key in ("imports", "trace", "lower", "compile")
    )
    return found


def line(name: str, what: str, row: Mapping[str, Any]) -> str:
    """Returns one measurement as a line of text."""
    cold, warm = (totals(row[state]) for state in ("cold", "warm"))
    return (
        f"{name} {what}: cold {cold['seconds']:.1f} s (compiling {cold['compile']:.1f})"
        f", warm {warm['seconds']:.1f} s, programs {cold['programs']:.0f}, "
        f"found {warm['hits']:.0f}"
    )


def render(content: Mapping[str, Any]) -> str:
    """Returns the table."""
    rows = []
    for name, row in content["rows"].items():
        cold, warm = (totals(row[state]) for state in ("cold", "warm"))
        sides = " x ".join(map(str, row["size"]))
        rows.append(
            (
                f"{name}, {sides}",
                f"{cold['seconds']:.1f}",
                f"{warm['seconds']:.1f}",
                f"{cold['imports']:.1f}",
                f"{cold['trace']:.1f}",
                f"{cold['lower']:.1f}",
                f"{cold['compile']:.1f} / {warm['compile']:.1f}",
                f"{row['cold']['second']['seconds']:.1f}",
                f"{cold['programs']:.0f} / {warm['hits']:.0f}",
                f"{row['cache_mb']:.1f}",
            )
        )
    header = (
        "first ... of",
        "cold s",
        "warm s",
        "imports",
        "trace",
        "lower",
        "compile, cold / read, warm",
        "a second one",
        "programs / found in the cache",
        "cache MB",
    )
    return table(header, rows)
