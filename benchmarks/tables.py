"""Writes the tables of README.md, docs/scaling.md and docs/results.md from the files in results/.

    python benchmarks/tables.py            # --check: only whether they are up to date

A table stands in a document between `<!-- NAME -->` and `<!-- end -->`; what has no
result says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy import accuracy_table
from harness import RESULTS, ROOT, read
from markdown_tables import fill, size_words, table
from scaling_tables import ahead_table, scaling_tables

README, SCALING = ROOT / "benchmarks" / "README.md", ROOT / "docs" / "scaling.md"
REPORTED = ROOT / "docs" / "results.md"
EMPTY = "No result yet."
PROGRAM_COLUMNS = (
    "| work | allocator | program | median s (quartiles) | CPU s | peak GB "
    "| first call s | ours / it (quartiles of pairs) |\n" + "|---" * 8 + "|\n"
)
DATA_STAGES = ("decode", "resize", "rasterise")
Result = Mapping[str, Any]


def readme(text: str, folder: Path) -> str:
    """Returns the document with all its tables filled from the results in a folder."""
    loaded = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [result for result in loaded if "work" in result]
    blocks = {}
    for script, what in re.findall(r"<!-- table: (\S+) (\S+) -->", text):
        chosen = [
            r for r in results if r["work"]["script"] == script and what in ("*", r["work"]["what"])
        ]
        render = data_table if script == "data" else program_tables
        blocks[f"table: {script} {what}"] = render(chosen) if chosen else EMPTY
    if "<!-- compile -->" in text:
        compiled = [r for r in loaded if r["name"] == "compile"]
        blocks["compile"] = compile_table(compiled[0]) if compiled else EMPTY
    if "<!-- first_use -->" in text:
        used = [r for r in loaded if r["name"] == "first_use"]
        blocks["first_use"] = first_use_table(used[0]) if used else EMPTY
    return fill(text, blocks)


def first_use_table(content: Result) -> str:
    """Returns the table of whole commands, and a line of origin."""
    rows = []
    for work, programs in content["rows"].items():
        for name, figures in programs.items():
            compiled = figures["programs"] if name.startswith("ours") else ""
            cells = (_seconds(figures["seconds"]), _seconds(figures["cpu_seconds"]))
            rows.append((work, name, *cells, str(compiled)))
    machine = content["machine"]
    origin = (
        f"{content['date']}: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']:.0f} GB; one run each.\n"
    )
    header = ("command", "program", "seconds", "CPU seconds", "network programs")
    return table(header, rows) + "\n\n" + origin


def scaling_document(text: str, folder: Path) -> str:
    """Returns the document with all its tables filled from scaling.json and ahead.json."""
    blocks = scaling_tables(json.loads((folder / "scaling.json").read_text()))
    compiled = read(folder, "ahead").get("rows")
    return fill(text, blocks | {"ahead": ahead_table(compiled) if compiled else EMPTY})


def results_page(text: str, folder: Path) -> str:
    """Returns docs/results.md with the tables of metrics.json and accuracy.json."""
    writers = {"metrics": metrics_table, "accuracy": accuracy_table}
    found = {name: read(folder, name) for name in writers}
    return fill(text, {n: writers[n](c) if "rows" in c else EMPTY for n, c in found.items()})


def metrics_table(content: Result) -> str:
    """Returns the table of metrics beside their public programs, and a line of origin."""
    rows = []
    for name, row in content["rows"].items():
        seconds = [_seconds(row[key]) for key in ("ours_s", "public_s")]
        difference = f"{row['difference']:.1e}" if row["difference"] else "0"
        ap = f"{row['AP']:.4f}"
        rows.append((name, row["program"], str(row["compared"]), ap, difference, *seconds))
    machine = content["machine"]
    origin = (
        f"{content['date']}: {content['images']} images, {content['objects']} objects, "
        f"{content['predictions']} predictions; {machine['cores']} cores of {machine['cpu']}; one "
        "run each, with other work on the machine.\n"
    )
    header = ("metric", "public program", "numbers compared", "AP", "largest difference")
    return table((*header, "ours, s", "it, s"), rows) + "\n\n" + origin


# --- Programs that took turns --------------------------------------------------------


def program_tables(results: Sequence[Result]) -> str:
    """Returns the table of the programs, those of their stages, and lines of origin."""
    lines = [PROGRAM_COLUMNS]
    for result in results:
        lines += [_program_row(result, name) for name in result["programs"]]
    for result in results:
        lines += _stages_of(result)
    return "".join([*lines, "\n", *dict.fromkeys(_origin(r) for r in results)])


def _label(result: Result) -> str:
    """Returns what was done, in a cell's words."""
    work = result["work"]
    if "label" in work:
        return work["label"]
    h, w = work["size"]
    words = f"`{Path(work['config']).stem}` {h} x {w}, batch {work['batch']}"
    return f"{work['what']}, {words}" if work["script"] == "postprocess" else words


def _program_row(result: Result, name: str) -> str:
    figures = result["programs"][name]
    median, q1, q3 = (_seconds(figures["seconds"][key]) for key in ("median", "q1", "q3"))
    first = figures["about"].get("first_call_s", figures["about"]["start_s"])
    cells = [_label(result), result["allocator"], name, f"{median} ({q1} to {q3})"]
    cells += [_seconds(figures["cpu_seconds"]["median"]), f"{figures['peak_memory_gb']:.1f}"]
    return f"| {' | '.join([*cells, _seconds(first), _ratio(result, name)])} |\n"


def _ratio(result: Result, name: str) -> str:
    """Returns a program's last cell; the first program's is empty."""
    if name not in result["ratios"]:
        return ""
    ratio = result["ratios"][name]
    pairs = ratio["of_pairs"]
    return f"**{ratio['of_medians']:.2f}** ({pairs['q1']:.2f} to {pairs['q3']:.2f})"


def _stages_of(result: Result) -> list[str]:
    """Returns the lines of a table of stages, none where there are none."""
    columns = {n: p["stages"] for n, p in result["programs"].items() if "stages" in p}
    if not columns:
        return []
    title = f"{_label(result)}, {result['allocator']} allocator, seconds"
    lines = [f"\n| {title} | {' | '.join(columns)} |\n", "|---" * (len(columns) + 1) + "|\n"]
    for stage in dict.fromkeys(s for stages in columns.values() for s in stages):
        cells = [_seconds(c[stage]["median"]) if stage in c else "" for c in columns.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |\n")
    return lines


def _origin(result: Result) -> str:
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


def _seconds(value: float) -> str:
    """Returns seconds with three significant digits, without exponents."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


# --- Input pipeline and compile times ------------------------------------------------


def data_table(results: Sequence[Result]) -> str:
    """Returns the table of the measurements that have both parts, and the soak test."""
    rows = []
    by_what = {(r["work"]["what"], r["work"]["label"]): r for r in results}
    for (what, label), whole in by_what.items():
        stages = by_what.get(("stages", label))
        if what == "pipeline" and stages is not None:
            rows += [_data_row(whole, stages, program) for program in whole["programs"]]
    columns = ("data", "program", "images/s, one core", *(f"{s} ms" for s in DATA_STAGES))
    columns += ("batches, transport ms", "reader / worker GB", "ours / it (quartiles of pairs)")
    blocks = [table(columns, rows) + "\n\n"] if rows else []
    blocks += [_soak_line(r) for (what, _), r in by_what.items() if what == "soak"]
    return "".join([*blocks, *dict.fromkeys(_origin(r) for r in results if "programs" in r)])


def _data_row(whole: Result, stages: Result, program: str) -> tuple[str, ...]:
    """Returns a program's row.

    The stages are the batch maker's alone; what the pipeline takes beyond them is the
    making of batches and their way from the worker process to the reader.
    """
    figures, parts = whole["programs"][program], stages["programs"][program]["stages"]
    ms = [parts[s]["median"] / stages["work"]["images"] * 1e3 for s in DATA_STAGES]
    total = figures["seconds"]["median"] / whole["work"]["images"] * 1e3
    return (
        whole["work"]["label"],
        program,
        f"**{1e3 / total:.1f}**",
        *(f"{value:.2f}" for value in ms),
        f"{total - sum(ms):.2f}",
        f"{figures['peak_memory_gb']:.2f} / {figures['found']['worker_peak_gb']:.2f}",
        _ratio(whole, program),
    )


def _soak_line(content: Result) -> str:
    sides = ", ".join(map(str, content["sizes"][:-1]))
    memory = " and ".join(
        f"{name} {first:.0f} MB, then {second:.0f} MB"
        for name, first, second in halves(content["resident_mb"])
    )
    return (
        f"{content['batches']} batches of {content['batch']} images ({sides} px) through "
        f"{content['workers']} workers; largest resident memory in the first half and in the "
        f"second: {memory}.\n\n"
    )


def halves(samples: list[list[float]]) -> list[tuple[str, float, float]]:
    """Returns (process, largest in the first half, largest in the second), MB."""
    middle = len(samples) // 2
    columns = zip(("reader", "worker"), zip(*samples, strict=True), strict=True)
    return [(name, max(c[:middle]), max(c[middle:])) for name, c in columns]


def compile_totals(phases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the sums up to the first result: all phases but the second call."""
    first = [p for name, p in phases.items() if name != "second"]
    keys = ("seconds", "trace", "lower", "compile", "programs", "hits")
    return {key: sum(p[key] for p in first) for key in keys}


def compile_table(content: Result) -> str:
    """Returns the table of results/compile.json."""
    rows = []
    for name, row in content["rows"].items():
        cold, warm = compile_totals(row["cold"]), compile_totals(row["warm"])
        seconds = [cold["seconds"], warm["seconds"], row["cold"]["imports"]["seconds"]]
        seconds += [cold["trace"], cold["lower"]]
        cells = [f"{name}, {size_words(row['size'])}", *(f"{value:.1f}" for value in seconds)]
        cells += [f"{cold['compile']:.1f} / {warm['compile']:.1f}"]
        cells += [f"{row['cold']['second']['seconds']:.1f}"]
        cells += [f"{cold['programs']:.0f} / {warm['hits']:.0f}", f"{row['cache_mb']:.1f}"]
        rows.append(cells)
    columns = ("first ... of", "cold s", "warm s", "imports", "trace", "lower")
    columns += ("compile, cold / read, warm", "a second one", "programs / found in the cache")
    return table((*columns, "cache MB"), rows)


def main() -> None:
    """Writes the documents, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    documents = ((README, readme), (SCALING, scaling_document), (REPORTED, results_page))
    for path, document in documents:
        before = path.read_text()
        after = document(before, RESULTS)
        if check and after != before:
            sys.exit(f"error: {path.name} is not what the results say: run tables.py")
        if after != before:
            path.write_text(after)


if __name__ == "__main__":
    main()
