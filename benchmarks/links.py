"""Published rates of accelerators and what connects them, each with its source.

Rates are bytes a second in one direction for each chip. NVIDIA states both directions
together: 900 GB/s of NVLink are 450 in each.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class System:
    """Chips that train together.

    Attributes:
      peak: published dense bfloat16 FLOP/s of a chip.
      chips_per_host: fed by one host's processors.
      inside: rate of a chip within the host, or over all links of a torus.
      outside: rate of a chip to other hosts; 0 for a torus, which has no other links.
      full_torus: least chips from which on every axis closes to a ring. Below, a line
        of chips has half of a ring's rate.
      axes: of the torus.
    """

    name: str
    peak: float
    chips_per_host: int
    inside: float
    outside: float = 0.0
    full_torus: int = 0
    axes: int = 0
    source: str = ""


SYSTEMS = (
    System(
        "8 x H100 SXM, NVLink; 400 Gb/s InfiniBand a GPU",
        989e12,
        8,
        450e9,
        50e9,
        source="NVIDIA H100 datasheet (NVLink 900 GB/s both ways, 989 TFLOP/s dense); "
        "NVIDIA DGX H100 datasheet (8 x ConnectX-7, 400 Gb/s)",
    ),
    System(
        "8 x A100 SXM, NVLink; 200 Gb/s InfiniBand a GPU",
        312e12,
        8,
        300e9,
        25e9,
        source="NVIDIA A100 datasheet (NVLink 600 GB/s both ways, 312 TFLOP/s dense); "
        "NVIDIA DGX A100 datasheet (8 x ConnectX-6, 200 Gb/s)",
    ),
    System(
        "8 x A100 PCIe, no NVLink; one 100 Gb/s network card a host",
        312e12,
        8,
        32e9,
        12.5e9 / 8,
        source="NVIDIA A100 datasheet (PCIe 4.0 x16, 64 GB/s both ways); "
        "network: 100 Gb/s shared by eight, our example of a cheap host",
    ),
    System(
        "TPU v4, 3D torus",
        275e12,
        4,
        1.1e15 / 4096,
        full_torus=64,
        axes=3,
        source="Google Cloud documentation, TPU v4 (275 TFLOP/s; all-reduce bandwidth "
        "1.1 PB/s over a pod's 4,096 chips; torus from 4x4x4)",
    ),
    System(
        "TPU v5e, 2D torus",
        197e12,
        8,
        200e9,
        full_torus=256,
        axes=2,
        source="Google Cloud documentation, TPU v5e (197 TFLOP/s; 400 GB/s both ways; "
        "all-reduce bandwidth 51.2 TB/s over a pod's 256 chips)",
    ),
    System(
        "TPU v5p, 3D torus",
        459e12,
        4,
        600e9,
        full_torus=64,
        axes=3,
        source="Google Cloud documentation, TPU v5p (459 TFLOP/s; 1,200 GB/s both "
        "ways; torus from 4x4x4)",
    ),
    System(
        "TPU v6e, 2D torus",
        918e12,
        8,
        400e9,
        full_torus=256,
        axes=2,
        source="Google Cloud documentation, TPU v6e (918 TFLOP/s; 800 GB/s both ways; "
        "all-reduce bandwidth 102.4 TB/s over a pod's 256 chips)",
    ),
)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is not published and not measured here: change it, and see what changes."""

    link_share: float = 0.8  # of the published rate that a large all-reduce reaches
    host_latency: float = 25e-6  # seconds of an empty all-reduce inside a host
    network_latency: float = 100e-6  # more, between hosts
    hop_latency: float = 1e-6  # from chip to chip on a torus
    combine_bytes: int = 30 * 2**20  # XLA:GPU puts gradients together up to here


def all_reduce_seconds(size: int, chips: int, system: System, given: Assumptions) -> float:
    """Returns the time to sum `size` bytes over the chips, in combined messages.

    Each chip sends and receives 2 (n - 1) / n of the bytes (reduce-scatter and
    all-gather). Over several hosts: inside each host, then each chip's share of the
    bytes between the hosts, then inside again.
    """
    if chips == 1:
        return 0.0
    messages = max(1, -(-size // given.combine_bytes))
    if system.axes:
        ring = chips >= system.full_torus
        rate = system.inside * given.link_share * (1.0 if ring else 0.5)
        side = chips ** (1 / system.axes)
        hops = 2 * system.axes * max(1.0, (side - 1) / (2 if ring else 1))
        return _sent(size, chips) / rate + messages * hops * given.hop_latency
    group = min(chips, system.chips_per_host)
    hosts = chips // group
    seconds = _sent(size, group) / (system.inside * given.link_share)
    latency = given.host_latency
    if hosts > 1:
        rate = system.outside * given.link_share
        seconds += _sent(size / group, hosts) / rate
        latency += given.network_latency
    return seconds + messages * latency


def _sent(size: float, chips: int) -> float:
    return 2 * (chips - 1) / chips * size


def exposed_seconds(size: int, seconds: float, window: float, combine: int) -> float:
    """Returns what of an all-reduce is not hidden behind the backward pass.

    The last message can only start when the last gradient is there; the others hide
    behind at most `window` seconds of computation.
    """
    messages = max(1, -(-size // combine))
    last = seconds / messages
    return last + max(0.0, seconds - last - window)
