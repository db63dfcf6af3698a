"""The arithmetic of `scaling.py`: the time of a step and of an all-reduce, from published rates."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PADDED = (800, 1344)
System = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is not published and not measured here: change it, and see what changes."""

    link_share: float = 0.8  # of the published rate that a large all-reduce reaches
    host_latency: float = 25e-6  # seconds of an empty all-reduce inside a host
    network_latency: float = 100e-6  # more, between hosts
    hop_latency: float = 1e-6  # from chip to chip on a torus
    combine_bytes: int = 30 * 2**20  # XLA:GPU puts gradients together up to here


def image_seconds(
    system: System, flops: float, traffic: Mapping[str, Any], args: argparse.Namespace
) -> float:
    """Returns what an image adds to a step on one chip: arithmetic and passes over memory.

    XLA:GPU runs convolutions and the fusions between them one after the other, so that the
    fusions' bytes add to the arithmetic. A TPU computes while it moves: the longer one counts.
    """
    arithmetic = flops / (args.step_share * system["peak"])
    moving = traffic["bytes_per_image"] / (args.memory_share * system["bandwidth"])
    return arithmetic + moving if traffic["adds"] else max(arithmetic, moving)


def compiled_traffic(compiled: Mapping[str, Any], config: str) -> dict[str, Any]:
    """Returns the traffic of the bfloat16 step as `ahead.py` compiled it, by family of chips.

    Of those that were compiled at full size for one device, in one part.
    """
    found, whole = {}, ("step", config, list(PADDED), "bfloat16", 1, 1)
    for row in compiled.values():
        keys = ("what", "config", "size", "dtype", "devices", "accumulate")
        if tuple(row[key] for key in keys) != whole:
            continue
        program = f"the step compiled for {row['kind']}, bfloat16, {row['images']} images"
        if row["target"] == "h100":
            size, part = row["moved"]["other"] + row["moved"]["in_loops"], "what is no convolution"
        else:
            # Without its own count a row has XLA's, in which what stays on the chip moves too.
            size = sum(row["moved"].values()) if "moved" in row else row["bytes"]
            part = "all"
        source = f"{part} in {program}: {size / 1e9:.0f} GB"
        family, adds = ("gpu", True) if row["target"] == "h100" else ("tpu", False)
        found[family] = {"bytes_per_image": size / row["images"], "adds": adds, "source": source}
    return found


def load_systems() -> dict[str, Any]:
    """Returns `systems.json`: published rates, each with its source, and XLA's H100.

    Rates are bytes a second in one direction for each chip (NVIDIA states both
    directions together): "inside" a host, or over all links of a torus; "outside" to
    other hosts, 0 for a torus. "peak" is the dense bfloat16 FLOP/s of a chip; from
    "full_torus" chips on, every axis closes to a ring, and below it has half the rate;
    "pod" is the largest torus. "bandwidth" is of a chip's memory. "traffic" has the bytes
    that a step moves for each image, by the compilers of a "family" of chips.
    """
    return json.loads(Path(__file__).with_name("systems.json").read_text())


def all_reduce_seconds(size: int, chips: int, system: System, assumed: Assumptions) -> float:
    """Returns the time to sum `size` bytes over the chips, in combined messages.

    Each chip sends and receives 2 (n - 1) / n of the bytes (reduce-scatter and
    all-gather). Over several hosts: inside each host, then each chip's share of the
    bytes between the hosts, then inside again.
    """

    def sent(size: float, chips: int) -> float:
        return 2 * (chips - 1) / chips * size

    if chips == 1:
        return 0.0
    messages = max(1, -(-size // assumed.combine_bytes))
    inside = system["inside"] * assumed.link_share
    if axes := system["axes"]:
        ring = chips >= system["full_torus"]
        hops = 2 * axes * max(1.0, (chips ** (1 / axes) - 1) / (2 if ring else 1))
        rate = inside * (1.0 if ring else 0.5)
        return sent(size, chips) / rate + messages * hops * assumed.hop_latency
    group = min(chips, system["chips_per_host"])
    seconds, latency = sent(size, group) / inside, assumed.host_latency
    if (hosts := chips // group) > 1:
        seconds += sent(size / group, hosts) / (system["outside"] * assumed.link_share)
        latency += assumed.network_latency
    return seconds + messages * latency


def exposed_seconds(size: int, seconds: float, window: float, combine: int) -> float:
    """Returns what of an all-reduce is not hidden behind the backward pass.

    The last message can only start when the last gradient is there; the others hide
    behind at most `window` seconds of computation.
    """
    last = seconds / max(1, -(-size // combine))
    return last + max(0.0, seconds - last - window)


def efficiencies(
    system: System, chips: int, size: int, step: float, backward: float
) -> dict[str, float]:
    """Returns the all-reduce's seconds and shares of the ideal rate.

    "efficiency" is without any overlap, "efficiency_overlapped" with an all-reduce that
    starts as soon as its gradients are there.
    """
    assumed = Assumptions()
    spent = all_reduce_seconds(size, chips, system, assumed)
    exposed = exposed_seconds(size, spent, backward * step, assumed.combine_bytes)
    shares = {"efficiency": step / (step + spent), "efficiency_overlapped": step / (step + exposed)}
    return {"all_reduce_s": spent, **shares}
