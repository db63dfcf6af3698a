"""Two or more programs measured side by side, run by run.

Each program is a process of its own, with its own interpreter and environment, that
speaks the protocol of `worker.py`. They are started and warmed up one after the other,
then take turns (A B C A B C ...), so that a change of the machine's mood meets all of
them; while one runs the others wait for input. A compilation after the warm-ups is an
error: it would be measured as work.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent

RESULTS = HERE / "results"
OURS = "ours"

# Given to all programs of a measurement or to none. "tuned": freed memory stays in the
# process (one heap, no mmap of large blocks, no trimming), which saves page faults.
# "hugepages": glibc asks for huge pages and gives memory back.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "hugepages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
_ALLOCATOR_KEYS = {key for env in ALLOCATORS.values() for key in env}


class BenchmarkError(RuntimeError):
    """A measurement that must not be reported."""


@dataclass(frozen=True)
class Program:
    """A worker to start.

    Attributes:
      optional: what keeps it from starting is recorded in the result, not raised.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False


class _Running:
    """A started worker, its samples, and the CPU time it used while others ran."""

    def __init__(self, program: Program, allocator: str):
        self.name = program.name
        env = {k: v for k, v in os.environ.items() if k not in _ALLOCATOR_KEYS}
        self.process = subprocess.Popen(
            list(program.command),
            env={**env, **ALLOCATORS[allocator], **program.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.samples: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise BenchmarkError(f"{self.name} ended early, with exit code {code}")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}")
        return reply

    def ask(self, request: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.read()

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all its threads, from the kernel."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(
    programs: Sequence[Program], runs: int, warmups: int = 2, allocator: str = "default"
) -> dict[str, Any]:
    """Returns {"programs": {name: figures}, "ratios": ..., "failed": {name: why}}.

    The first program is the one that the others are compared with.

    Raises:
      BenchmarkError: a program failed, or compiled something after its warm-ups.
    """
    running: list[_Running] = []
    failed: dict[str, str] = {}
    try:
        for program in programs:
            worker = _Running(program, allocator)
            running.append(worker)
            try:
                worker.ready = worker.read()["ready"]
                for _ in range(warmups):
                    worker.ask("run")
            except BenchmarkError as error:
                if not program.optional:
                    raise
                failed[program.name] = str(error)
                running.remove(worker)
                worker.stop()
        waited = _take_turns(running, runs)
        for worker in running:
            worker.end = worker.ask("end")
    finally:
        for worker in running:
            worker.stop()
    figures = {w.name: _figures(w, waited[w.name]) for w in running}
    ours, *peers = running
    ratios = {p.name: report.ratio(ours.samples, p.samples) for p in peers}
    return {"programs": figures, "ratios": ratios, "failed": failed}


def _take_turns(running: Sequence[_Running], runs: int) -> dict[str, float]:
    """Runs all in turn; returns the CPU seconds that each used while it waited."""
    waited = dict.fromkeys((w.name for w in running), 0.0)
    for number in range(runs):
        for worker in running:
            others = [w for w in running if w is not worker]
            before = [w.cpu_seconds() for w in others]
            sample = worker.ask("run")
            for other, cpu in zip(others, before, strict=True):
                waited[other.name] += other.cpu_seconds() - cpu
            if sample["compiles"]:
                raise BenchmarkError(
                    f"{worker.name} compiled {sample['compiles']} program(s) in run "
                    f"{number + 1}, after its warm-ups: no time of this is reported"
                )
            worker.samples.append(sample)
    return waited


def _figures(worker: _Running, waited: float) -> dict[str, Any]:
    samples = worker.samples
    figures = {
        "about": worker.ready,
        "seconds": report.summary([s["seconds"] for s in samples]),
        "cpu_seconds": report.summary([s["cpu_seconds"] for s in samples]),
        "peak_memory_gb": worker.end["peak_memory_gb"],
        "compiles": worker.end["compiles"],
        "cpu_seconds_while_waiting": waited,
        "found": worker.end["found"],
    }
    if "stages" in samples[0]:
        figures["stages"] = {
            name: report.summary([s["stages"][name] for s in samples])
            for name in samples[0]["stages"]
        }
    return figures


def add_arguments(parser: argparse.ArgumentParser, runs: int) -> None:
    """Adds the arguments of every benchmark."""
    parser.add_argument("--runs", type=int, default=runs, help="of each program")
    parser.add_argument("--warmups", type=int, default=2, help="of each program")
    parser.add_argument("--allocator", choices=sorted(ALLOCATORS), default="default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")


def measure(
    name: str,
    work: Mapping[str, Any],
    programs: Sequence[Program],
    args: Any,
    tolerances: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns what `alternate` does, printed and written to <results>/<name>.json.

    Args:
      work: what all programs do: config, size, batch ...
      tolerances: of what they found, see `report.differences`. Programs that did
        different work are not compared: the benchmark fails.
    """
    try:
        found = alternate(programs, args.runs, args.warmups, args.allocator)
        if wrong := report.differences(found["programs"], tolerances or {}):
            raise BenchmarkError(f"the programs' work differs: {'; '.join(wrong)}")
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    report.drop_classes(found["programs"])
    content = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "machine": report.describe_machine(),
        "work": dict(work),
        "allocator": args.allocator,
        "warmups": args.warmups,
        **found,
    }
    report.write(content, args.results)
    report.show(content)
    return content


def ours(kind: str, case: Path) -> Program:
    """Returns our worker for a kind of work."""
    command = [sys.executable, str(HERE / "ours.py"), kind, "--case", str(case)]
    return Program(OURS, command)
