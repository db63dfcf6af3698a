"""The tables of docs/scaling.md, from results/scaling.json."""

from collections.abc import Mapping
from typing import Any

from collectives import KINDS
from markdown import table


def blocks(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: table} of what the result holds."""
    found = {}
    if paper := content.get("paper"):
        found["basis"] = basis(paper)
        found["links"] = links(paper)
        found["efficiency"] = efficiency(paper)
        found["by step time"] = by_step(paper)
        found["input"] = host_input(paper)
    if emulated := content.get("emulated"):
        found["sent"] = sent(emulated)
        found["emulated"] = cost(emulated)
    if ahead := content.get("ahead"):
        found["ahead"] = compiled_ahead(ahead)
    return found


def basis(paper: Mapping[str, Any]) -> str:
    """Returns what the prediction starts from."""
    flops, gradients, given = (
        paper[key] for key in ("flops_per_image", "gradients", "assumptions")
    )
    rows = [
        ("configuration, padded size", f"{paper['config']}, {_size(paper['size'])}"),
        (
            "convolutions of one image, forward / whole step",
            f"{flops['forward'] / 1e9:.0f} / {flops['step'] / 1e9:.0f} GFLOP",
        ),
        (
            "gradients summed each step, as float32",
            f"{gradients['arrays']} arrays, {gradients['bytes'] / 1e6:.1f} MB",
        ),
        ("time of a step on one chip", paper["step"]),
        ("backward pass, of a step's FLOPs", f"{paper['backward_share']:.0%}"),
        ("assumed: of a link's published rate", f"{given['link_share']:.0%}"),
        (
            "assumed: an empty all-reduce in a host / more between hosts / a torus hop",
            " / ".join(
                f"{given[key] * 1e6:.0f} µs"
                for key in ("host_latency", "network_latency", "hop_latency")
            ),
        ),
        (
            "gradients put together in one message up to",
            f"{given['combine_bytes'] / 2**20:.0f} MiB",
        ),
    ]
    return table(("what", "value"), rows)


def links(paper: Mapping[str, Any]) -> str:
    """Returns the published figures."""
    rows = []
    for s in paper["systems"]:
        outside = f"{s['outside'] / 1e9:.4g}" if s["outside"] else "-"
        rate = (f"{s['peak'] / 1e12:.0f}", f"{s['inside'] / 1e9:.0f}", outside)
        rows.append((s["name"], *rate, str(s["chips_per_host"]), s["source"]))
    return table(
        (
            "system",
            "bf16 TFLOP/s",
            "GB/s one way, in the host or torus",
            "GB/s one way, between hosts",
            "chips a host",
            "source",
        ),
        rows,
    )


def efficiency(paper: Mapping[str, Any]) -> str:
    """Returns efficiency without / with overlap by number of chips."""
    chips = list(paper["rows"][0]["chips"])
    rows = []
    for row in paper["rows"]:
        cells = map(_shares, row["chips"].values())
        reduce = [1e3 * c["all_reduce_s"] for c in row["chips"].values()]
        rows.append(
            (
                row["system"],
                str(row["images_per_chip"]),
                f"{1e3 * row['step_s']:.1f}",
                f"{min(reduce):.2f} to {max(reduce):.2f}",
                *cells,
            )
        )
    header = ("system", "images a chip", "step ms", "all-reduce ms", *chips)
    return table(header, rows)


def by_step(paper: Mapping[str, Any]) -> str:
    """Returns efficiency on the most chips by the time of a step, whatever it does."""
    systems = paper["by_step"]
    rows = [(name, *map(_shares, steps.values())) for name, steps in systems.items()]
    steps = next(iter(systems.values()))
    most = list(paper["rows"][0]["chips"])[-1]
    header = (f"{most} chips, a step of", *(f"{1e3 * float(s):g} ms" for s in steps))
    return table(header, rows)


def compiled_ahead(ahead: Mapping[str, Any]) -> str:
    """Returns what the programs compiled for absent chips hold."""
    rows = []
    for row in ahead.values():
        (reduce,) = (c for c in row["collectives"] if c["kind"] == "all-reduce")
        others = sum(c["bytes"] for c in row["collectives"]) - reduce["bytes"]
        rows.append(
            (
                f"{row['chips']} x {row['kind']}",
                f"{row['config']}, {row['dtype']}",
                f"{row['images_per_chip']} of {_size(row['size'])}",
                f"{reduce['operations']} of {reduce['arrays']}",
                f"{reduce['bytes'] / 1e6:.1f}",
                f"{others / 1e6:.2f}",
                f"{row['memory_gb']:.1f}",
            )
        )
    header = (
        "chips",
        "configuration",
        "images a chip",
        "all-reduces, arrays",
        "MB",
        "MB of other operations",
        "GB a chip",
    )
    return table(header, rows)


def host_input(paper: Mapping[str, Any]) -> str:
    """Returns what a host must deliver at full efficiency."""
    most = {}
    for row in paper["rows"]:  # the largest batch is the last one
        most[row["system"]] = row
    rows = [
        (
            name,
            f"{row['host']['images_per_s']:.0f}",
            f"{row['host']['decode_cores']:.0f}",
            f"{row['host']['read_mb_per_s']:.0f}",
            f"{row['host']['to_chips_mb_per_s'] / 1e3:.1f}",
        )
        for name, row in most.items()
    ]
    cores = f"cores, at {paper['images_per_core']:g} images/s each"
    return table(("system", "images/s a host", cores, "JPEG MB/s", "to the chips GB/s"), rows)


def sent(emulated: Mapping[str, Any]) -> str:
    """Returns what the compiled step sends, by form and number of devices."""
    rows = []
    for form, title in (("cpu", "CPU's"), ("accelerator", "plain")):
        for devices, row in emulated[form].items():
            found = {c["kind"]: c for c in row["collectives"]}
            cells = [
                f"{c['operations']} of {c['arrays']}, {c['bytes'] / 1e6:.3g} MB"
                if (c := found.get(kind))
                else "0"
                for kind in KINDS
            ]
            rows.append((f"{title}, {devices}", *cells))
    return table(("convolutions' form, devices", *KINDS), rows)


def cost(emulated: Mapping[str, Any]) -> str:
    """Returns losses and CPU seconds by number of devices, at the same total work."""
    one = emulated["cpu"]["1"]
    rows = []
    for devices, row in emulated["cpu"].items():
        pairs = zip(row["losses"], one["losses"], strict=True)
        largest = max(abs(a - b) / abs(b) for a, b in pairs)
        cpu = row["cpu_seconds"]
        rows.append(
            (
                devices,
                f"{largest:.1e}",
                f"{cpu['median']:.3f} ({cpu['min']:.3f} to {cpu['max']:.3f})",
                f"{cpu['median'] / one['cpu_seconds']['median']:.2f}",
                f"{row['seconds']['median']:.3f}",
            )
        )
    header = (
        "devices",
        "largest relative difference of a loss",
        "CPU seconds a step",
        "of one device's",
        "seconds a step",
    )
    return table(header, rows)


def _shares(found: Mapping[str, float]) -> str:
    """Returns percent: nothing hidden / overlapped."""
    return f"{100 * found['efficiency']:.0f} / {100 * found['efficiency_overlapped']:.0f}"


def _size(size: list[int]) -> str:
    return " x ".join(map(str, size))
