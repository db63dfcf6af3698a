"""Writes the tables of README.md from the results' json.

    python benchmarks/tables.py            # writes
    python benchmarks/tables.py --check    # fails if that would change something

`<!-- compile -->` and `<!-- gpu -->` hold what compile.py and gpu.py found. A table of
programs that took turns stands between `<!-- table: SCRIPT WHAT -->` and
`<!-- end -->`; it holds every result whose work has this script and begins with this
`what` ("*": any).
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compile_tables
import data_tables
import gpu_tables
import markdown

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results"
MARKER = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
EMPTY = "No result yet.\n"
HEADER = (
    "| work | allocator | program | median s (quartiles) | CPU s | peak GB "
    "| first call s | ours / it (quartiles of pairs) |\n" + "|---" * 8 + "|\n"
)


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the results of programs that took turns, by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if "work" in result]


def render(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the document with every table filled from the results."""

    def fill(match: re.Match) -> str:
        begin, script, what, end = match.groups()
        chosen = [
            r for r in results if r["work"]["script"] == script and what in ("*", r["work"]["what"])
        ]
        return begin + (written(script, chosen) if chosen else EMPTY) + end

    return MARKER.sub(fill, text)


def document(text: str, folder: Path) -> str:
    """Returns the document with everything filled that the folder has a result of."""
    text = render(text, load_results(folder))
    for name, of in (("compile", compile_tables.render), ("gpu", gpu_tables.render)):
        path = folder / f"{name}.json"
        found = of(json.loads(path.read_text())) if path.exists() else EMPTY.strip()
        text = markdown.fill(text, {name: found})
    return text


def written(script: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tables of a benchmark's results."""
    if script == "data":
        origins = [origin(r) for r in results if "programs" in r]
        return data_tables.render(results) + "".join(dict.fromkeys(origins))
    return tables_of(results)


def tables_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the programs, one of the stages, and a line of origin."""
    lines = [HEADER]
    for result in results:
        lines += [row(result, name) for name in result["programs"]]
        lines += [
            f"| {label(result)} | {result['allocator']} | {name} | does not run: "
            f"{short(why)} | | | | |\n"
            for name, why in result["failed"].items()
        ]
    for result in results:
        lines += stages_of(result)
    return "".join([*lines, "\n", *dict.fromkeys(origin(r) for r in results)])


def label(result: Mapping[str, Any]) -> str:
    """Returns what was done, in a cell's words."""
    work = result["work"]
    if "label" in work:
        return work["label"]
    h, w = work["size"]
    config, batch = Path(work["config"]).stem, work["batch"]
    words = f"`{config}` {h} x {w}, batch {batch}"
    if work["script"] == "postprocess":
        words = f"{work['what']}, {words}"
    return words


def row(result: Mapping[str, Any], name: str) -> str:
    """Returns a program's row."""
    figures = result["programs"][name]
    seconds, cpu = figures["seconds"], figures["cpu_seconds"]["median"]
    cells = [
        label(result),
        result["allocator"],
        name,
        f"{number(seconds['median'])} ({number(seconds['q1'])} to {number(seconds['q3'])})",
        number(cpu),
        f"{figures['peak_memory_gb']:.1f}",
        number(figures["about"].get("first_call_s", figures["about"]["start_s"])),
        "",
    ]
    if name in result["ratios"]:
        ratio = result["ratios"][name]
        pairs = ratio["of_pairs"]
        cells[-1] = f"**{ratio['of_medians']:.2f}** "
        cells[-1] += f"({pairs['q1']:.2f} to {pairs['q3']:.2f})"
    return f"| {' | '.join(cells)} |\n"


def stages_of(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table of stages, none where there are none."""
    columns = {n: p["stages"] for n, p in result["programs"].items() if "stages" in p}
    if not columns:
        return []
    title = f"{label(result)}, {result['allocator']} allocator, seconds"
    lines = [f"\n| {title} | {' | '.join(columns)} |\n", "|---" * (len(columns) + 1)]
    lines.append("|\n")
    for stage in dict.fromkeys(s for stages in columns.values() for s in stages):
        values = [c[stage]["median"] if stage in c else None for c in columns.values()]
        cells = ["" if v is None else number(v) for v in values]
        lines.append(f"| {stage} | {' | '.join(cells)} |\n")
    return lines


def origin(result: Mapping[str, Any]) -> str:
    """Returns where and with what a result was measured."""
    machine = result["machine"]
    versions: dict[str, str] = {}
    for figures in result["programs"].values():
        versions |= figures["about"].get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    runs = next(iter(result["programs"].values()))["seconds"]["n"]
    return (
        f"{result['date']}: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']:.0f} GB; {listed}; {runs} runs each.\n"
    )


def number(value: float) -> str:
    """Returns seconds with three significant digits, without exponents."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def short(text: str, limit: int = 100) -> str:
    """Returns the text in one line that a table bears."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def main() -> None:
    """Writes README.md, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = README.read_text()
    after = document(before, RESULTS)
    if check and after != before:
        sys.exit("error: README.md is not what the results say: run tables.py")
    if after != before:
        README.write_text(after)


if __name__ == "__main__":
    main()
