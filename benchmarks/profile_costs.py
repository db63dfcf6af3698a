"""Where a compiled program's time goes: a trace's operations, summed by module."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

# "%name = ... metadata={op_name="jit(step)/transpose(jvp(SOLOv2))/fpn/..." ...}"
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.M)


def profile(run: Callable[[], Any], text: str, top: int = 3) -> dict[str, Any]:
    """Returns the largest costs of run(), by module and by single operation.

    Args:
      text: of the compiled program, which knows the module of each operation.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        times = operation_times(data.planes)
    total = sum(times.values())
    if not total:
        raise ValueError("the trace holds no operation of a compiled program")
    modules = sum_by_module(times, dict(_NAMED.findall(text)))
    return {
        "traced_ms": total / 1e6,
        "modules": _largest(modules, total, top),
        "operations": _largest(times, total, top),
    }


def operation_times(planes: Iterable[Any]) -> dict[str, float]:
    """Returns {operation: nanoseconds} of all devices' events.

    A loop's or a branch's event spans those inside it and is not counted.
    """
    times: dict[str, float] = defaultdict(float)
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                stats = {key: value for key, value in event.stats}
                name = stats.get("hlo_op")
                if name is None or event.name.startswith("end: "):
                    continue
                if not re.match(r"(while|conditional|call)\b", str(name)):
                    times[str(name)] += event.duration_ns
    return dict(times)


def sum_by_module(times: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    """Returns {module: nanoseconds}; what the program's text does not name is "other".

    A module is, for example, "backward ins_head/cate_tower".
    """
    found: dict[str, float] = defaultdict(float)
    for operation, spent in times.items():
        found[module_of(names.get(operation, ""))] += spent
    return dict(found)


def module_of(op_name: str) -> str:
    """Returns direction and the first two levels of the network's module."""
    if not op_name:
        return "other"
    backward = "transpose(" in op_name
    parts = [p for p in op_name.split("/") if p and not p.startswith("jit(")]
    inside = [p for p in parts if "(" not in p]
    if not any("SOLOv2" in p for p in parts):
        return f"{'backward' if backward else 'forward'} outside of the network"
    return f"{'backward' if backward else 'forward'} {'/'.join(inside[:2])}"


def _largest(times: dict[str, float], total: float, top: int) -> list[dict[str, Any]]:
    order = sorted(times.items(), key=lambda item: -item[1])[:top]
    return [{"name": n, "ms": t / 1e6, "share": t / total} for n, t in order]
