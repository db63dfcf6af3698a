"""The table of the input pipeline, from results/data_*.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from markdown import table

STAGES = ("decode", "resize", "rasterise")
HEADER = (
    "data",
    "program",
    "images/s, one core",
    *(f"{stage} ms" for stage in STAGES),
    "batches, transport ms",
    "reader / worker GB",
    "ours / it (quartiles of pairs)",
)


def per_image(result: Mapping[str, Any], program: str) -> float:
    """Returns the milliseconds an image takes, the median of the runs."""
    seconds = result["programs"][program]["seconds"]["median"]
    return seconds / result["work"]["images"] * 1e3


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the measurements that have both parts, and the soak."""
    rows = []
    by_what = {(r["work"]["what"], r["work"]["label"]): r for r in results}
    soaked = [render_soak(r) for (what, _), r in by_what.items() if what == "soak"]
    for (what, label), whole in by_what.items():
        parts = by_what.get(("stages", label))
        if what == "pipeline" and parts is not None:
            rows += [row(whole, parts, program) for program in whole["programs"]]
    return "".join([table(HEADER, rows) + "\n\n" if rows else "", *soaked])


def row(whole: Mapping[str, Any], parts: Mapping[str, Any], program: str) -> tuple[str, ...]:
    """Returns a program's row.

    The stages are the loader's alone; what the pipeline takes beyond them is the making
    of batches and their way from the worker process to the reader.
    """
    images = parts["work"]["images"]
    figures = whole["programs"][program]
    stages = [
        parts["programs"][program]["stages"][stage]["median"] / images * 1e3 for stage in STAGES
    ]
    every = per_image(whole, program)
    ratio = ""
    if program in whole["ratios"]:
        pairs = whole["ratios"][program]["of_pairs"]
        ratio = f"**{whole['ratios'][program]['of_medians']:.2f}** "
        ratio += f"({pairs['q1']:.2f} to {pairs['q3']:.2f})"
    return (
        whole["work"]["label"],
        program,
        f"**{1e3 / every:.1f}**",
        *(f"{value:.2f}" for value in stages),
        f"{every - sum(stages):.2f}",
        f"{figures['peak_memory_gb']:.2f} / {figures['found']['worker_peak_gb']:.2f}",
        ratio,
    )


def render_soak(content: Mapping[str, Any]) -> str:
    """Returns what a soak showed, in a sentence."""
    sides = ", ".join(map(str, content["sizes"][:-1]))
    found = " and ".join(
        f"{name} {first:.0f} MB, then {second:.0f} MB"
        for name, first, second in halves(content["resident_mb"])
    )
    return (
        f"{content['batches']} batches of {content['batch']} images ({sides} px) "
        f"through {content['workers']} workers; largest "
        f"resident memory in the first half and in the second: {found}.\n\n"
    )


def halves(samples: list[list[float]]) -> list[tuple[str, float, float]]:
    """Returns (process, largest in the first half, largest in the second), MB."""
    middle = len(samples) // 2
    columns = zip(("reader", "worker"), zip(*samples, strict=True), strict=True)
    return [(name, max(c[:middle]), max(c[middle:])) for name, c in columns]
