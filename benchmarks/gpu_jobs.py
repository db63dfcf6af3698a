"""Jobs with a deadline: what both sides of gpu.py share; standard library only."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns a side's arguments."""
    parser.add_argument("jobs", nargs="+")
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="time.time()")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices")
    return parser.parse_args()


def work(do: Callable[[str], dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints a json line for each job: its figures, or why it has none.

    A job starts if the time that is left suffices for the longest of its kind so far.
    """
    longest: dict[str, float] = {}
    for job in args.jobs:
        kind, start = job.split(":")[0], time.time()
        left = args.deadline - start
        if left < longest.get(kind, 0.0) or left <= 0:
            found: dict[str, Any] = {"skipped": f"{left:.0f} s were left"}
        else:
            try:
                found = do(job)
            except Exception as error:  # out of memory, mostly: the others go on
                why = " ".join(str(error).split())[:300]
                found = {"failed": f"{type(error).__name__}: {why}"}
            found["job_s"] = time.time() - start
            longest[kind] = max(longest.get(kind, 0.0), found["job_s"])
        print(json.dumps({"job": job, **found}), flush=True)


def repeat(run: Callable[[], Any], seconds: float, least: int = 5) -> dict[str, float]:
    """Returns median and extremes of about so many seconds of runs, after two more."""
    for _ in range(2):
        run()
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < least:
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return {
        "median": statistics.median(spent),
        "min": min(spent),
        "max": max(spent),
        "n": len(spent),
    }


def once(run: Callable[[], Any]) -> float:
    """Returns the seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
