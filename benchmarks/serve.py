"""Loads `serve.py` on this machine, beside the same predictor in its own process.

    python benchmarks/serve.py --workdir runs/quickstart --images photos --seconds 15

Closed loops of 1, 2, 4, ... clients, each of which asks again when it is answered; then
requests at ten times the rate of the best of them, whatever the answers; then SIGTERM
in the middle of a closed loop. The clients run on the same cores and take their share.
Prints the table of docs/export_and_serving.md; --results FILE.json: what it holds.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import ROOT, describe_machine, status_kib
from markdown_tables import table

KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class Answer(NamedTuple):
    """One request: when it was sent, how long it took, and its end.

    The end is HTTP's status; "refused": no connection; "lost": sent, and never answered.
    """

    sent: float
    seconds: float
    end: int | str


async def ask(port: int, path: Path) -> Answer:
    """Returns how a request on a connection of its own ended."""
    start, end, writer = time.perf_counter(), "refused", None
    body = path.read_bytes()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {KINDS[path.suffix]}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        end = "lost"
        writer.write(head.encode() + body)
        await writer.drain()
        if line := await reader.readline():
            await reader.read()
            end = int(line.split()[1])
    except OSError:
        end = end if writer else "refused"
    if writer:
        writer.close()
    return Answer(start, time.perf_counter() - start, end)


async def closed_loop(port: int, paths: list[Path], clients: int, seconds: float) -> list[Answer]:
    """Returns the answers to clients that ask again and again."""
    until, answers = time.perf_counter() + seconds, []

    async def client(request: int) -> None:
        while time.perf_counter() < until:
            answers.append(await ask(port, paths[request % len(paths)]))
            if answers[-1].end == "refused":
                return
            request += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    return answers


async def open_loop(port: int, paths: list[Path], rate: float, seconds: float) -> list[Answer]:
    """Returns the answers to requests at a rate (per second) that waits for none."""
    begin, tasks = time.perf_counter(), []
    for request in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begin + request / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, paths[request % len(paths)])))
    return await asyncio.gather(*tasks)


def summarise(answers: list[Answer]) -> dict[str, Any]:
    """Returns throughput, times and ends of a phase."""
    good = [a.seconds for a in answers if a.end == 200]
    span = max(a.sent + a.seconds for a in answers) - min(a.sent for a in answers)
    times = {f"p{q}_ms": 1e3 * float(np.percentile(good, q)) if good else None for q in (50, 99)}
    ends = dict(sorted(Counter(str(a.end) for a in answers).items()))
    return {"answered_per_second": len(good) / span, **times, "ends": ends}


def in_process(args: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """Returns the times of the same predictor without a service, files decoded too."""
    from solov2_jax import Predictor
    from solov2_jax.inference.prediction import to_coco_results

    predictor = Predictor.from_workdir(args.workdir)
    for path in paths:  # compiles what these pictures need
        predictor(str(path))
    begin, answers = time.perf_counter(), []
    while time.perf_counter() < begin + args.seconds:
        start = time.perf_counter()
        prediction = predictor(str(paths[len(answers) % len(paths)])).above(args.score)
        json.dumps(to_coco_results(prediction, predictor.category_ids))
        answers.append(Answer(start, time.perf_counter() - start, 200))
    return summarise(answers)


async def measure(args: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """Returns the phases of the load on a `serve.py` process, each with its memory."""
    command = [sys.executable, str(ROOT / "serve.py"), "--port=0", f"--workdir={args.workdir}"]
    command += [f"--score={args.score}", *args.arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    listening = next((line for line in process.stdout if "listening on" in line), None)
    if listening is None:
        raise SystemExit("error: serve.py did not start; run it by hand to see why")
    port, phases = int(listening.rsplit(":", 1)[1]), {}

    def add(name: str, answers: list[Answer]) -> None:
        memory = {"resident_mib": status_kib(process.pid, "VmRSS") / 1024}
        phases[name] = summarise(answers) | memory

    try:
        await closed_loop(port, paths, 2, min(5, args.seconds))  # pasting compiles
        for clients in args.clients:
            add(f"{clients} clients", await closed_loop(port, paths, clients, args.seconds))
        rate = 10 * max(phase["answered_per_second"] for phase in phases.values())
        name = f"{rate:.0f} requests/s, 10 times the best rate"
        add(name, await open_loop(port, paths, rate, args.seconds))
        loop = asyncio.create_task(closed_loop(port, paths, 8, args.seconds))
        await asyncio.sleep(min(2.0, args.seconds / 2))
        process.send_signal(signal.SIGTERM)
        phases["8 clients, SIGTERM"] = summarise(await loop)
        code = await asyncio.to_thread(process.wait, 90)
        phases["8 clients, SIGTERM"]["exit_code"] = code
    finally:
        process.kill()
    return phases


def main() -> None:
    """Measures, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", required=True)
    add("--images", required=True, type=Path, help="folder of JPEGs or PNGs")
    add("--seconds", type=float, default=15.0, help="of each phase")
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--score", type=float, default=0.3)
    add("--results", type=Path, help="json to write")
    add("arguments", nargs="*", help="for serve.py, after --")
    args = parser.parse_args()
    paths = sorted(p for p in args.images.iterdir() if p.suffix in KINDS)[:32]
    if not paths:
        parser.error(f"--images {args.images}: no .jpg or .png in this folder")
    phases = {"in process, one after the other": in_process(args, paths)}
    phases |= asyncio.run(measure(args, paths))
    rows = []
    for name, phase in phases.items():
        times = ("-" if phase[k] is None else f"{phase[k]:.0f}" for k in ("p50_ms", "p99_ms"))
        ends = ", ".join(f"{count} x {end}" for end, count in phase["ends"].items())
        memory = f"{phase['resident_mib']:.0f}" if "resident_mib" in phase else "-"
        rows.append((name, f"{phase['answered_per_second']:.1f}", *times, ends, memory))
    print(table(("load", "answers/s", "p50 ms", "p99 ms", "ends", "resident MiB"), rows))
    if args.results:
        content = {"phases": phases, "machine": describe_machine()}
        args.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
