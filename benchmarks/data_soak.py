"""Thousands of batches through two workers: does memory stay where it is?"""

import argparse
import datetime
import multiprocessing
import time
from pathlib import Path
from typing import Any

import report
from data_tables import halves

from solov2_jax.data import buckets, pipeline
from solov2_jax.data.coco import CocoDataset

SHORTS, LONGEST, BATCH, WORKERS = (96, 112, 128), 192, 2, 2
SAMPLES = 50
GROWTH = 0.05  # of the second half's largest over the first half's, at most


def run(args: argparse.Namespace, dataset: CocoDataset) -> None:
    """Measures, writes <results>/data_soak.json, and fails if memory grew."""
    batches = pipeline.train_batches(
        dataset,
        seed=0,
        num_steps=args.soak,
        batch_size=BATCH,
        resize=buckets.Resize(SHORTS, LONGEST),
        flip_prob=0.5,
        reading=pipeline.Reading(num_workers=WORKERS, num_threads=2, prefetch=2),
    )
    every = max(1, args.soak // SAMPLES)
    samples: list[list[float]] = []  # MB: reader, largest worker
    start = time.perf_counter()
    for number, _ in enumerate(batches, start=1):
        if number % every == 0 and number < args.soak - 20 * WORKERS:
            children = [p.pid for p in multiprocessing.active_children()]
            resident = [resident_mb(p) for p in ("self", *children)]
            samples.append([resident[0], max(resident[1:])])
    content: dict[str, Any] = {
        "name": "data_soak",
        "date": datetime.date.today().isoformat(),
        "machine": report.describe_machine(),
        "work": {"script": "data", "what": "soak", "label": "soak"},
        "batches": args.soak,
        "batch": BATCH,
        "workers": WORKERS,
        "sizes": [*SHORTS, LONGEST],
        "seconds": time.perf_counter() - start,
        "resident_mb": samples,
    }
    path = report.write(content, args.results)
    for name, first, second in halves(samples):
        print(f"{name}: {first:.0f} MB at most in the first half, then {second:.0f}")
        if second > first * (1 + GROWTH):
            raise SystemExit(f"error: the memory of the {name} grew; see {path}")


def resident_mb(pid: int | str) -> float:
    """Returns the resident memory of a process, shared memory included, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/{pid}/status has no VmRSS; the benchmarks need Linux")
