"""Programs measured side by side, run by run; standard library only.

Each program is a process with its own interpreter and environment. They are started and
warmed up one after the other, then take turns (A B C A B C ...), so that a change of the
machine's load meets all of them; while one runs the others wait for input. A compilation
after the warm-ups is an error: it would be measured as work.

A program calls `serve` with a function that returns its `Work`. Lines on its standard
input and output are the protocol: "run" and "end" are answered by a line of json each;
whatever libraries print goes to standard error.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results"
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

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


class BenchmarkError(RuntimeError):
    """A measurement that must not be reported."""


# --- In the measured process ---------------------------------------------------------


class Stages:
    """Seconds by stage of one run: `with stages("fpn"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a stage's time."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass
class Work:
    """What a program measures.

    Attributes:
      run: does the work once, to the end.
      describe: the last run's result -> what the work was (detections, losses ...), to
        compare the programs by.
      about: versions, threads.
      stages: what `run` adds its stages' seconds to.
      compiles: the number of compilations so far. One after the warm-ups is an error.
      prepare, finish: done before and after every run, not measured.
      first_call: whether the first call, with its compilation, is made and timed apart.
    """

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]] = lambda result: {}
    about: dict[str, Any] = field(default_factory=dict)
    stages: Stages | None = None
    compiles: Callable[[], int] = lambda: 0
    prepare: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None
    first_call: bool = True


def serve(load: Callable[[], Work]) -> None:
    """Loads the work and does it as often as standard input asks for."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")

    start, result = time.perf_counter(), None
    try:
        work = load()
        about = dict(work.about)
        if work.first_call:
            began = time.perf_counter()
            result = work.run()
            about["first_call_s"] = time.perf_counter() - began
    except Exception as error:
        reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    reply(ready={**about, "start_s": time.perf_counter() - start})
    for line in sys.stdin:  # ends too when the harness gives up
        if line.strip() == "end":
            memory = {"peak_memory_gb": peak_memory_gb(), "compiles": work.compiles()}
            reply(**memory, found=work.describe(result))
            return
        assert line.strip() == "run", f"unknown request {line!r}"
        work.prepare()
        result, compiles = None, work.compiles()  # one result at a time is held
        stages = work.stages.seconds if work.stages else {}
        stages.clear()
        cpu, start = time.process_time(), time.perf_counter()
        result = work.run()
        sample = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        compiles = work.compiles() - compiles
        work.finish()
        reply(**sample, compiles=compiles, **({"stages": stages} if stages else {}))


def peak_memory_gb(process: int | str = "self") -> float:
    """Returns the largest resident memory of a process so far, in GB (VmHWM)."""
    return status_kib(process, "VmHWM") * 1024 / 1e9


def status_kib(process: int | str, field_name: str) -> int:
    """Returns a figure of /proc/PROCESS/status, such as VmRSS, in KiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/{process}/status has no {field_name}; the benchmarks need Linux")


# --- In the harness ------------------------------------------------------------------


class Program(NamedTuple):
    """A process to start."""

    name: str
    command: Sequence[str]


class _Running:
    """A started program, its samples, and the CPU time it used while others ran."""

    def __init__(self, program: Program, allocator: str):
        self.name, self.waited = program.name, 0.0
        self.samples: list[dict[str, Any]] = []
        known = {key for env in ALLOCATORS.values() for key in env}
        env = {k: v for k, v in os.environ.items() if k not in known} | ALLOCATORS[allocator]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            list(program.command), env=env, stdin=pipe, stdout=pipe, text=True
        )

    def ask(self, request: str = "") -> dict[str, Any]:
        """Returns the reply to a request, or without one the next reply."""
        assert self.process.stdin and self.process.stdout
        if request:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended early, exit code {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}")
        return reply

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all its threads, from the kernel."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def figures(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a result holds of this program, with its last reply."""

        def of(values: Sequence[Mapping[str, float]], *keys: str) -> dict[str, Any]:
            return {key: summary([value[key] for value in values]) for key in keys}

        figures = {"about": self.about, **of(self.samples, "seconds", "cpu_seconds"), **end}
        figures["cpu_seconds_while_waiting"] = self.waited
        if stages := [s["stages"] for s in self.samples if "stages" in s]:
            figures["stages"] = of(stages, *stages[0])
        return figures

    def start(self, warmups: int) -> None:
        self.about: dict[str, Any] = self.ask()["ready"]
        for _ in range(warmups):
            self.ask("run")

    def take_turn(self, others: Sequence["_Running"]) -> None:
        """Runs once, and notes what the others used meanwhile."""
        before = [other.cpu_seconds() for other in others]
        sample = self.ask("run")
        for other, cpu in zip(others, before, strict=True):
            other.waited += other.cpu_seconds() - cpu
        if sample["compiles"]:
            raise BenchmarkError(
                f"{self.name} compiled {sample['compiles']} program(s) in run "
                f"{len(self.samples) + 1}, after its warm-ups: no time of this is reported"
            )
        self.samples.append(sample)


def alternate(
    programs: Sequence[Program], runs: int, warmups: int = 2, allocator: str = "default"
) -> dict[str, Any]:
    """Returns {"programs": {name: figures}, "ratios": {name: of the first to it}}.

    Raises:
      BenchmarkError: a program failed, or compiled something after its warm-ups.
    """
    running: list[_Running] = []
    try:
        for program in programs:
            running.append(_Running(program, allocator))
            running[-1].start(warmups)
        for _ in range(runs):
            for worker in running:
                worker.take_turn([other for other in running if other is not worker])
        figures = {worker.name: worker.figures(worker.ask("end")) for worker in running}
    finally:
        for worker in running:
            worker.stop()
    ours, *peers = running
    return {"programs": figures, "ratios": {p.name: ratio(ours.samples, p.samples) for p in peers}}


def add_arguments(parser: argparse.ArgumentParser, runs: int, warmups: int = 2) -> None:
    """Adds the arguments of every benchmark."""
    parser.add_argument("--runs", type=int, default=runs, help="of each program")
    parser.add_argument("--warmups", type=int, default=warmups, help="of each program")
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
      tolerances: see `differences`. If the programs' work differs, the benchmark fails.
    """
    try:
        measured = alternate(programs, args.runs, args.warmups, args.allocator)
        if wrong := differences(measured["programs"], tolerances or {}):
            raise BenchmarkError(f"the programs' work differs: {'; '.join(wrong)}")
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    for figures in measured["programs"].values():  # compared: their number is enough now
        if "classes" in figures["found"]:
            classes = figures["found"].pop("classes")
            figures["found"]["distinct_classes"] = [len(set(x)) for x in classes]
    about = {"work": dict(work), "allocator": args.allocator, "warmups": args.warmups}
    content = header(name) | about | measured
    write(content, args.results)
    for program, figures in measured["programs"].items():
        median, memory = figures["seconds"]["median"], figures["peak_memory_gb"]
        ours = measured["ratios"].get(program, {"of_medians": 1.0})["of_medians"]
        print(f"{program}: {median:.3f} s, {memory:.1f} GB, ours / it {ours:.2f}", figures["found"])
    return content


# --- Figures -------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns median, extremes, quartiles and number of the values."""
    q1, median, q3 = values[0], values[0], values[0]
    if len(values) > 1:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    extremes = {"min": min(values), "max": max(values)}
    return {"median": median, **extremes, "q1": q1, "q3": q3, "n": len(values)}


def ratio(ours: Sequence[Mapping], peer: Sequence[Mapping]) -> dict[str, Any]:
    """Returns our samples' time over the peer's: of the medians, and of neighbouring runs."""

    def of_medians(key: str) -> float:
        return statistics.median(s[key] for s in ours) / statistics.median(s[key] for s in peer)

    return {
        "of_medians": of_medians("seconds"),
        "of_pairs": summary([a["seconds"] / b["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "of_cpu_medians": of_medians("cpu_seconds"),
    }


def differences(programs: Mapping[str, Any], tolerances: Mapping[str, float]) -> list[str]:
    """Returns where a program found something else than the first one.

    Args:
      programs: {name: figures}; `figures["found"]` holds numbers, or lists of them.
      tolerances: {key of found: largest relative difference}; of "classes", lists of
        labels, the largest share that has no partner. Other keys may differ.
    """

    def distance(a: Any, b: Any) -> float:
        if isinstance(a, list):
            return 1 - (Counter(a) & Counter(b)).total() / max(len(a), len(b), 1)
        return abs(a - b) / max(abs(a), abs(b), 1e-30)

    (first, reference), *others = programs.items()
    wrong = []
    for name, figures in others:
        for key, tolerance in tolerances.items():
            values = [x["found"][key] for x in (reference, figures)]
            a, b = (value if isinstance(value, list) else [value] for value in values)
            same = len(a) == len(b)
            if not same or any(distance(x, y) > tolerance for x, y in zip(a, b, strict=True)):
                wrong.append(f"{key}: {a} of {first}, {b} of {name}")
    return wrong


def header(name: str) -> dict[str, Any]:
    """Returns what every result begins with."""
    today = datetime.date.today().isoformat()
    return {"name": name, "date": today, "machine": describe_machine()}


def describe_machine() -> dict[str, Any]:
    """Returns processor, cores, memory and system: nothing that names a machine."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = [line.split(":", 1) for line in info if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in pairs}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = {"avx2", "avx512f", "avx512_bf16", "amx_tile"}
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "vectors": sorted(known & set(cpu.get("flags", "").split())),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def read(folder: Path, name: str) -> dict[str, Any]:
    """Returns the result <folder>/<name>.json to add to, or a new one."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"name": name}


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
