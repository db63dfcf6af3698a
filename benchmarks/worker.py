"""A measured program's side of the protocol of `harness.py`; standard library only.

A worker loads, compiles and warms nothing up on its own: it says it is ready, runs once
for every line "run" and reports its memory at "end". Lines are json on the standard
output, one reply to one request; whatever libraries print there goes to standard error.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class Work:
    """What a worker measures.

    Attributes:
      run: does the work once, to the end; may return {stage: seconds}.
      about: versions, threads, seconds of the first call with its compilation.
      compiles: compilations so far. One after warm-up fails the benchmark.
      found: what the work was (detections, losses ...), to compare the programs by.
      prepare, finish: done before and after every run, not measured.
    """

    run: Callable[[], dict[str, float] | None]
    about: dict[str, Any]
    compiles: Callable[[], int] = lambda: 0
    found: Callable[[], dict[str, Any]] = field(default=dict)
    prepare: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


def serve(load: Callable[[], Work]) -> None:
    """Loads the work and does it as often as standard input asks for."""
    replies = _take_stdout()
    start = time.perf_counter()
    try:
        work = load()
    except Exception as error:
        _send(replies, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    _send(replies, ready={**work.about, "start_s": time.perf_counter() - start})
    for line in sys.stdin:  # ends too when the harness gives up
        if line.strip() == "end":
            figures = {"peak_memory_gb": peak_memory_gb(), "compiles": work.compiles()}
            _send(replies, **figures, found=work.found())
            return
        assert line.strip() == "run", f"unknown request {line!r}"
        _send(replies, **_measure(work))


def _measure(work: Work) -> dict[str, Any]:
    work.prepare()
    compiles = work.compiles()
    cpu, start = time.process_time(), time.perf_counter()
    stages = work.run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    compiles = work.compiles() - compiles
    work.finish()
    reply = {"seconds": seconds, "cpu_seconds": cpu}
    reply["compiles"] = compiles
    return {**reply, "stages": stages} if stages else reply


def _take_stdout() -> TextIO:
    """Returns the standard output for replies alone; prints go to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout.flush()
    return replies


def _send(replies: TextIO, **content: Any) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def peak_memory_gb(process: int | str | None = "self") -> float:
    """Returns the largest resident memory of a process so far, in GB (VmHWM)."""
    with open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    raise OSError(f"/proc/{process}/status has no VmHWM; the benchmarks need Linux")


class Stages:
    """Seconds by stage of one run.

    with stages("fpn"):
        ...
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a stage's time."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def first_call(run: Callable[[], Any]) -> float:
    """Returns the seconds of a first call, compilation included."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
