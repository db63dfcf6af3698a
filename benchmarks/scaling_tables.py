"""The tables of docs/scaling.md from results/scaling.json and results/ahead.json."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hlo import COLLECTIVES
from markdown_tables import size_words, table

Result = Mapping[str, Any]


def scaling_tables(content: Result) -> dict[str, str]:
    """Returns {name: table} of what results/scaling.json holds."""
    blocks: dict[str, str] = {}
    for part, tables in SCALING_TABLES.items():
        if part in content:
            blocks |= {name: render(content[part]) for name, render in tables.items()}
    return blocks


def _basis(paper: Result) -> str:
    flops, gradients = paper["flops_per_image"], paper["gradients"]
    assumed = paper["assumptions"]
    latency = ("host_latency", "network_latency", "hop_latency")
    values = {
        "configuration, padded size": f"{paper['config']}, {size_words(paper['size'])}",
        "convolutions of one image, forward / whole step": (
            f"{flops['forward'] / 1e9:.0f} / {flops['step'] / 1e9:.0f} GFLOP"
        ),
        "gradients summed each step, as float32": (
            f"{gradients['arrays']} arrays, {gradients['bytes'] / 1e6:.1f} MB"
        ),
        "time of a step on one chip": paper["step"],
        **{
            f"bytes that an image moves, {family.upper()}": (
                f"{t['bytes_per_image'] / 1e9:.1f} GB ({t['source']})"
            )
            for family, t in paper["traffic"].items()
        },
        "backward pass, of a step's FLOPs": f"{paper['backward_share']:.0%}",
        "assumed: of a link's published rate": f"{assumed['link_share']:.0%}",
        "assumed: an empty all-reduce in a host / more between hosts / a torus hop": (
            " / ".join(f"{assumed[key] * 1e6:.0f} µs" for key in latency)
        ),
        "gradients put together in one message up to": (
            f"{assumed['combine_bytes'] / 2**20:.0f} MiB"
        ),
    }
    return table(("what", "value"), list(values.items()))


def _links(paper: Result) -> str:
    rows = []
    for s in paper["systems"]:
        outside = f"{s['outside'] / 1e9:.4g}" if s["outside"] else "-"
        rates = (f"{s['peak'] / 1e12:.0f}", f"{s['bandwidth'] / 1e12:.2f}")
        rates += (f"{s['inside'] / 1e9:.0f}", outside)
        rows.append((s["name"], *rates, str(s["chips_per_host"]), s["source"]))
    columns = ("system", "bf16 TFLOP/s", "memory TB/s", "GB/s one way, in the host or torus")
    return table((*columns, "GB/s one way, between hosts", "chips a host", "source"), rows)


def _efficiency(paper: Result) -> str:
    rows, chips = [], paper["rows"][0]["chips"]
    for row in paper["rows"]:
        ms = [1e3 * c["all_reduce_s"] for c in row["chips"].values()]
        step = (str(row["images_per_chip"]), f"{1e3 * row['step_s']:.1f}")
        reduce = f"{min(ms):.2f} to {max(ms):.2f}"
        rate = f"{row['images_per_chip'] / row['step_s']:.0f}"
        shares = (_shares(of) if (of := row["chips"].get(n)) else "-" for n in chips)
        rows.append((row["system"], *step, rate, reduce, *shares))
    columns = ("system", "images a chip", "step ms", "images/s a chip", "all-reduce ms")
    return table((*columns, *chips), rows)


def _by_step(paper: Result) -> str:
    systems = paper["by_step"]
    steps = [f"{1e3 * float(s):g} ms" for s in next(iter(systems.values()))]
    rows = [(name, *map(_shares, of_steps.values())) for name, of_steps in systems.items()]
    return table(("largest number of chips, a step of", *steps), rows)


def _host_input(paper: Result) -> str:
    most = {row["system"]: row["host"] for row in paper["rows"]}  # the largest batch is last
    rows = []
    for name, host in most.items():
        rates = [host[key] for key in ("images_per_s", "decode_cores", "read_mb_per_s")]
        to_chips = f"{host['to_chips_mb_per_s'] / 1e3:.1f}"
        rows.append((name, *(f"{rate:.0f}" for rate in rates), to_chips))
    cores = f"cores, at {paper['images_per_core']:g} images/s each"
    return table(("system", "images/s a host", cores, "JPEG MB/s", "to the chips GB/s"), rows)


def _sent(emulated: Result) -> str:
    rows = []
    for form, title in (("cpu", "CPU's"), ("accelerator", "plain")):
        for devices, row in emulated[form].items():
            by_kind = {c["kind"]: c for c in row["collectives"]}
            cells = [
                f"{c['operations']} of {c['arrays']}, {c['bytes'] / 1e6:.3g} MB"
                if (c := by_kind.get(kind))
                else "0"
                for kind in COLLECTIVES
            ]
            rows.append((f"{title}, {devices}", *cells))
    return table(("convolutions' form, devices", *COLLECTIVES), rows)


def _emulated_cost(emulated: Result) -> str:
    one, rows = emulated["cpu"]["1"], []
    for devices, row in emulated["cpu"].items():
        pairs = zip(row["losses"], one["losses"], strict=True)
        largest, cpu = max(abs(a - b) / abs(b) for a, b in pairs), row["cpu_seconds"]
        spread = f"{cpu['median']:.3f} ({cpu['min']:.3f} to {cpu['max']:.3f})"
        share = f"{cpu['median'] / one['cpu_seconds']['median']:.2f}"
        rows.append((devices, f"{largest:.1e}", spread, share, f"{row['seconds']['median']:.3f}"))
    columns = ("devices", "largest relative difference of a loss", "CPU seconds a step")
    return table((*columns, "of one device's", "seconds a step"), rows)


def ahead_table(compiled: Mapping[str, Result]) -> str:
    """Returns the table of the rows of results/ahead.json."""
    rows = []
    for row in compiled.values():
        config, size = Path(row["config"]).stem, size_words(row["size"])
        program = f"{row['what']}, {config}, {row['dtype']}, {size}"
        parts = f", in {row['accumulate']} parts" if row["accumulate"] > 1 else ""
        loops = ", ".join("?" if n is None else str(n) for n in row["loops"])
        sums = [f"{c['kind']}s" for c in row["collectives"] if c["kind"] != "all-reduce"]
        for c in row["collectives"]:
            if c["kind"] == "all-reduce":
                types = ", ".join(f"{k} {v / 1e6:.4g} MB" for k, v in c["types"].items())
                place = f", {c['in_loops']} in loops" if c["in_loops"] else ""
                sums.append(f"{c['operations']} of {c['arrays']} arrays: {types}{place}")
        moved = row["moved"]
        cells = [f"{row['devices']} x {row['kind']}", program, f"{row['images']}{parts}"]
        cells += [str(row["conditionals"]), loops or "none", "; ".join(sums) or "none"]
        cells += [f"{row[key] / 1e9:.2f}" for key in ("temp_bytes", "argument_bytes")]
        cells += [f"{row['aliased_bytes'] / row['state_bytes']:.1%}" if row["state_bytes"] else "-"]
        sizes = (moved[key] / 1e9 for key in ("convolutions", "other", "in_loops"))
        cells += [" + ".join(f"{part:.1f}" for part in sizes)]
        counted = f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else "-"
        rows.append([*cells, counted, f"{row['compile_s']:.0f}"])
    columns = ("devices", "program", "images a device", "conditionals", "loops' trips", "sums")
    columns += ("temporaries GB", "arguments GB", "of the state donated")
    columns += ("GB moved: convolutions + others + in loops", "by XLA's own count", "compiled in s")
    return table(columns, rows)


def _shares(of_chips: Mapping[str, float]) -> str:
    """Returns percent: nothing hidden / overlapped."""
    return f"{100 * of_chips['efficiency']:.0f} / {100 * of_chips['efficiency_overlapped']:.0f}"


SCALING_TABLES: dict[str, dict[str, Callable[[Result], str]]] = {
    "paper": {
        "basis": _basis,
        "links": _links,
        "efficiency": _efficiency,
        "by step time": _by_step,
        "input": _host_input,
    },
    "emulated": {"sent": _sent, "emulated": _emulated_cost},
}
