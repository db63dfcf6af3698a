r"""Prints where a traced step spends its time, by named scope.

    python -m solov2_jax.tools.trace runs/quickstart/profile 2

The folder is what `train.profile_steps` writes. A row is a scope that the sources name
with `jax.named_scope` or a flax module, forward and backward apart; its time is that of
its compiled operations, summed over devices and threads and divided by the steps. 2: two
names deep (the default is 1).
"""

import argparse
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from solov2_jax.data.records import proto_fields
from solov2_jax.io import InputError, reading

_STEP = "train"  # of the loop's `StepTraceAnnotation`
_CONTROL_FLOW = re.compile(r"cond|while|body|closed_call|branch_\d+_fun")


def _field(data: bytes, number: int) -> bytes:
    """Returns the bytes of one field, b"" without it."""
    found = [value for n, _, value in proto_fields(data) if n == number]
    return found[-1] if found and isinstance(found[-1], bytes) else b""


def _walk(data: bytes, path: tuple[int, ...]) -> Iterator[bytes]:
    """Yields the messages at a path of field numbers."""
    if not path:
        yield data
        return
    for number, _, value in proto_fields(data):
        if number == path[0] and isinstance(value, bytes):
            yield from _walk(value, path[1:])


def scopes_of_operations(xspace: bytes) -> dict[tuple[str, str], str]:
    """Returns {(program, compiled operation): its name in the sources} of a trace.

    Source: tsl/profiler/protobuf/xplane.proto, xla/service/hlo.proto.
    """
    names = {}
    # planes / event_metadata / value / stats / bytes / hlo_module
    for module in _walk(xspace, (1, 4, 2, 5, 6, 1)):
        program = _field(module, 1).decode()
        for instruction in _walk(module, (3, 2)):  # computations / instructions
            name, metadata = _field(instruction, 1).decode(), _field(instruction, 7)
            names[program, name] = _field(metadata, 2).decode()
    return names


def scope_of(op_name: str, depth: int) -> str:
    """Returns the first parts of an operation's name, without the transformations' names."""
    backward = "transpose(" in op_name
    parts = re.sub(r"\b(jit|jvp|transpose|vmap|remat|checkpoint)\(([^()]*)\)", r"\2", op_name)
    parts = re.sub(r"\b(jvp|transpose|vmap)\(([^()]*)\)", r"\2", parts).split("/")
    names = [p for p in parts[1:-1] if p and not _CONTROL_FLOW.fullmatch(p)]
    scope = "/".join(names[:depth]) or "(no scope)"
    return f"{scope} (backward)" if backward else scope


def read_trace(folder: pathlib.Path, depth: int = 1) -> tuple[Counter[str], int]:
    """Returns (nanoseconds by scope, number of steps) of the newest trace in a folder."""
    paths = sorted(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise InputError(f"{folder}: no trace (*.xplane.pb); set train.profile_steps")
    import jax  # slow

    spent: Counter[str] = Counter()
    steps = set()
    with reading(paths[-1], "a trace of jax.profiler"):
        data = paths[-1].read_bytes()
        names = scopes_of_operations(data)
        for plane in jax.profiler.ProfileData.from_serialized_xspace(data).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if event.name == _STEP and "step_num" in stats:
                        steps.add(stats["step_num"])
                    elif "hlo_op" in stats and not event.name.startswith("end:"):
                        operation = (str(stats.get("hlo_module")), str(stats["hlo_op"]))
                        spent[scope_of(names.get(operation, ""), depth)] += int(event.duration_ns)
    return spent, max(len(steps), 1)


def format_table(spent: Counter[str], steps: int) -> str:
    """Returns a Markdown table: scope, milliseconds per step, share; below 0.1 % together."""
    total = max(sum(spent.values()), 1)
    large = {name: time for name, time in spent.most_common() if time >= total / 1000}
    large["others"] = sum(spent.values()) - sum(large.values())
    rows = [f"| `{n}` | {t / steps / 1e6:.1f} | {t / total:.1%} |" for n, t in large.items()]
    return "\n".join(["| scope | ms per step | share |", "|---|---:|---:|", *rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of the folder that the command line names."""
    wide = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("solov2_jax.tools.trace", None, __doc__, formatter_class=wide)
    parser.add_argument("folder", type=pathlib.Path, help="what train.profile_steps writes")
    parser.add_argument("depth", type=int, nargs="?", default=1, help="names deep (1)")
    arguments = parser.parse_args(argv)
    try:
        print(format_table(*read_trace(arguments.folder, arguments.depth)))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
