"""Figures of a measurement: statistics, the machine, a file of json, a few lines."""

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns median, extremes, quartiles and number of the values."""
    q1, median, q3 = values[0], values[0], values[0]
    if len(values) > 1:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "q1": q1,
        "q3": q3,
        "n": len(values),
    }


def ratio(
    ours: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Returns our time over the peer's: of the medians, and of runs side by side."""
    wall, cpu = (
        [[s[key] for s in samples] for samples in (ours, peer)]
        for key in ("seconds", "cpu_seconds")
    )
    pairs = [a / b for a, b in zip(*wall, strict=True)]
    return {
        "of_medians": statistics.median(wall[0]) / statistics.median(wall[1]),
        "of_pairs": summary(pairs),
        "of_cpu_medians": statistics.median(cpu[0]) / statistics.median(cpu[1]),
    }


def describe_machine() -> dict[str, Any]:
    """Returns processor, cores, memory and system: nothing that names a machine."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in info if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = {"avx2", "avx512f", "avx512_bf16", "amx_tile"}
    return {
        "cpu": fields.get("model name", platform.machine()),
        "vectors": sorted(known & set(fields.get("flags", "").split())),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def differences(programs: Mapping[str, Any], tolerances: Mapping[str, float]) -> list[str]:
    """Returns where a program found something else than the first one.

    Args:
      programs: {name: figures}; `figures["found"]` holds numbers, or lists of them.
      tolerances: {key of found: largest relative difference}; of "classes", lists of
        labels, the largest share that has no partner. Other keys may differ.
    """
    (first, ours), *others = programs.items()
    wrong = []
    for name, figures in others:
        for key, tolerance in tolerances.items():
            a, b = (_as_list(x["found"][key]) for x in (ours, figures))
            far = _unmatched if key == "classes" else _relative
            if len(a) != len(b) or any(far(x, y) > tolerance for x, y in zip(a, b, strict=True)):
                wrong.append(f"{key}: {a} of {first}, {b} of {name}")
    return wrong


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _unmatched(a: Sequence[int], b: Sequence[int]) -> float:
    """Returns the share of labels of the longer list that the other lacks."""
    common = (Counter(a) & Counter(b)).total()
    return 1 - common / max(len(a), len(b), 1)


def drop_classes(programs: Mapping[str, Any]) -> None:
    """Leaves of the classes found, once compared, how many there are; in place."""
    for figures in programs.values():
        if "classes" in figures["found"]:
            lists = figures["found"].pop("classes")
            figures["found"]["distinct_classes"] = [len(set(x)) for x in lists]


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Returns the file <folder>/<name>.json that now holds the result."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['name']}.json"
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n")
    return path


def _rounded(value: Any) -> Any:
    """Returns the same with floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def show(content: Mapping[str, Any]) -> None:
    """Prints a result for the one who waits for it."""
    print(f"{content['name']} ({content['allocator']} allocator)")
    for name, figures in content["programs"].items():
        s, cpu = figures["seconds"], figures["cpu_seconds"]["median"]
        line = f"  {name:24} {s['median']:8.3f} s ({s['min']:.3f} to {s['max']:.3f})"
        line += f"  cpu {cpu:8.3f} s  {figures['peak_memory_gb']:.2f} GB"
        if name in content["ratios"]:
            line += f"  ours / it {content['ratios'][name]['of_medians']:.2f}"
        print(line)
        for stage, seconds in figures.get("stages", {}).items():
            print(f"      {stage:20} {seconds['median']:8.3f} s")
        if figures["found"]:
            print(f"      {figures['found']}")
    for name, why in content["failed"].items():
        print(f"  {name}: {why}")
