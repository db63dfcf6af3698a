"""Loads `serve.py` on this machine, beside the same predictor in its own process.

    python benchmarks/serve.py --workdir runs/quickstart --images photos \
        --seconds 15 --results serve.json

Closed loops of 1, 2, 4, ... clients, each of which asks again when it is answered; then
requests at ten times the rate of the best of them, whatever the answers; then SIGTERM
in the middle of a closed loop. Prints a table and writes what it holds as json. The
clients run on the same cores and take their share.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 1024


@dataclasses.dataclass
class Answer:
    """One request: when it was sent, how long it took, and its end."""

    sent: float
    seconds: float
    # HTTP's status; "refused": no connection; "lost": sent, and never answered.
    end: int | str


async def ask(port: int, body: bytes, kind: str) -> Answer:
    """Returns how a request on a connection of its own ended."""
    start = time.perf_counter()
    end: int | str = "refused"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Answer(start, time.perf_counter() - start, end)
    try:
        head = (
            f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        end = "lost"
        writer.write(head.encode() + body)
        await writer.drain()
        line = await reader.readline()
        if line:
            await reader.read()
            end = int(line.split()[1])
    except OSError:
        pass
    finally:
        writer.close()
    return Answer(start, time.perf_counter() - start, end)


async def closed_loop(
    port: int, bodies: list[tuple[bytes, str]], clients: int, seconds: float
) -> list[Answer]:
    """Returns the answers to clients that ask again and again."""
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    async def client(first: int) -> None:
        number = first
        while time.perf_counter() < until:
            answer = await ask(port, *bodies[number % len(bodies)])
            answers.append(answer)
            if answer.end == "refused":
                return
            number += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    return answers


async def open_loop(
    port: int, bodies: list[tuple[bytes, str]], rate: float, seconds: float
) -> list[Answer]:
    """Returns the answers to requests at a rate (per second) that waits for none."""
    begin, tasks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        delay = begin + number / rate - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(ask(port, *bodies[number % len(bodies)])))
    return await asyncio.gather(*tasks)


def summarise(answers: list[Answer]) -> dict:
    """Returns throughput, times and ends of a phase."""
    good = [a.seconds for a in answers if a.end == 200]
    begin = min(a.sent for a in answers)
    span = max(a.sent + a.seconds for a in answers) - begin
    ends = Counter(str(a.end) for a in answers)
    found = {
        "requests": len(answers),
        "seconds": span,
        "ends": dict(sorted(ends.items())),
    }
    found["answered_per_second"] = len(good) / span
    for name, share in (("p50", 50), ("p99", 99)):
        found[f"{name}_ms"] = 1000 * float(np.percentile(good, share)) if good else None
    refused = [a.seconds for a in answers if a.end == 429]
    if refused:
        found["p99_of_429_ms"] = 1000 * float(np.percentile(refused, 99))
    return found


class Service:
    """A `serve.py` process and its memory."""

    def __init__(self, arguments: list[str]):
        command = [sys.executable, str(ROOT / "serve.py"), "--port=0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "listening on" in line:
                self.port = int(line.rsplit(":", 1)[1])
                return
        raise RuntimeError("serve.py did not start; run it by hand to see why")

    def memory(self) -> float:
        """Returns the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / MEBIBYTE


def in_process(arguments: argparse.Namespace, paths: list[Path]) -> dict:
    """Returns the times of the same predictor without a service, files decoded too."""
    import logging

    import jax

    from solov2_jax import Predictor
    from solov2_jax.inference.prediction import to_coco_results
    from solov2_jax.tools.export.metadata import default_buckets

    logging.disable(logging.INFO)
    predictor = Predictor.from_workdir(arguments.workdir)
    shapes = default_buckets(predictor.input)
    predictor.input = dataclasses.replace(predictor.input, buckets=shapes)
    predictor.compile(shapes)
    times = []
    until = time.perf_counter() + arguments.seconds
    for number in range(1_000_000):
        start = time.perf_counter()
        found = predictor(str(paths[number % len(paths)])).above(arguments.score)
        json.dumps(to_coco_results(found, predictor.category_ids))
        times.append(time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    times = times[len(paths) :] or times  # the first round compiles the pasting
    device = jax.devices()[0]
    return {
        "answered_per_second": 1 / float(np.mean(times)),
        "p50_ms": 1000 * float(np.percentile(times, 50)),
        "p99_ms": 1000 * float(np.percentile(times, 99)),
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
    }


async def measure(arguments: argparse.Namespace, bodies: list, service: Service) -> dict:
    """Returns the phases of the load and the memory after each second."""
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(round(service.memory(), 1))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    port, seconds = service.port, arguments.seconds
    await closed_loop(port, bodies, 2, min(5, seconds))  # pasting compiles
    marks = {"warm": len(memory)}
    phases = {}
    for clients in arguments.clients:
        answers = await closed_loop(port, bodies, clients, seconds)
        phases[f"{clients} clients"] = summarise(answers)
        marks[f"{clients} clients"] = len(memory)
    best = max(p["answered_per_second"] for p in phases.values())
    answers = await open_loop(port, bodies, 10 * best, seconds)
    phases["10 x the rate"] = {"offered_per_second": 10 * best, **summarise(answers)}
    marks["10 x the rate"] = len(memory)
    await asyncio.sleep(1)
    watching.cancel()
    loop = asyncio.create_task(closed_loop(port, bodies, 8, seconds))
    await asyncio.sleep(min(2.0, seconds / 2))
    service.process.send_signal(signal.SIGTERM)
    phases["SIGTERM, 8 clients"] = summarise(await loop)
    code = await asyncio.to_thread(service.process.wait, 90)
    phases["SIGTERM, 8 clients"]["exit_code"] = code
    return {"phases": phases, "memory_mib": memory, "memory_marks": marks}


def table(results: dict) -> str:
    """Returns the results as markdown."""
    lines = [
        "| load | answers/s | p50 ms | p99 ms | ends |",
        "|---|---:|---:|---:|---|",
    ]
    rows = {
        "in process, one after the other": results["in_process"],
        **results["phases"],
    }
    for name, row in rows.items():
        ends = ", ".join(f"{n} x {end}" for end, n in row.get("ends", {}).items())
        times = (row["p50_ms"], row["p99_ms"])
        shown = " | ".join("-" if t is None else f"{t:.0f}" for t in times)
        lines.append(f"| {name} | {row['answered_per_second']:.1f} | {shown} | {ends} |")
    memory, marks = results["memory_mib"], results["memory_marks"]
    after = {name: memory[min(at, len(memory) - 1)] for name, at in marks.items()}
    text = ", ".join(f"{name} {value:.0f}" for name, value in after.items())
    return "\n".join(lines) + f"\n\nresident MiB after: {text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", required=True, help="folder of JPEGs or PNGs")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--score", type=float, default=0.3)
    parser.add_argument("--results", help="json to write")
    parser.add_argument("arguments", nargs="*", help="for serve.py, after --")
    arguments = parser.parse_args()
    kinds = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
    paths = sorted(p for p in Path(arguments.images).iterdir() if p.suffix in kinds)[:32]
    if not paths:
        parser.error(f"--images {arguments.images}: no .jpg or .png in this folder")
    bodies = [(path.read_bytes(), kinds[path.suffix]) for path in paths]
    given = [f"--workdir={arguments.workdir}", f"--score={arguments.score}"]
    service = Service([*given, *arguments.arguments])
    try:
        results = asyncio.run(measure(arguments, bodies, service))
    finally:
        service.process.kill()
    results["in_process"] = in_process(arguments, paths)
    results["machine"] = {"cores": os.cpu_count(), "platform": platform.platform()}
    print(table(results))
    if arguments.results:
        Path(arguments.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
