"""Commands that are ended at random moments: nothing is lost, and nothing stays behind.

    pytest -m slow -s tests/test_kills.py

`SOLOV2_KILLS` and `SOLOV2_SEED` in the environment change how many kills there are, and
which moments they choose.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from PIL import Image
from test_faults import assert_same_run
from test_serve_command import picture, post

from solov2_jax.checkpoint import list_steps, restore_variables
from solov2_jax.tools.predict.output_folder import MANIFEST, PARTIAL

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("SOLOV2_KILLS", 20))
SEED = int(os.environ.get("SOLOV2_SEED", 0))
GONE_SECONDS = 20  # for every process of a killed command to end, on a busy machine
END_SECONDS = 60  # for a command to end in order after SIGTERM

pytestmark = [
    pytest.mark.slow,  # minutes each
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc"),
]


class Life:
    """A command in a session of its own, with its log in a file."""

    def __init__(self, log: Path, *arguments: str):
        self.log, self._begin = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "solov2_jax", *arguments],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        """Returns what this life has printed."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def wait_for(self, happened: Callable[[], bool], seconds: float = 300) -> bool:
        """Returns whether something happened before the command ended."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.printed()[-2000:]
            time.sleep(0.02)
        return True

    def end(self, number: int) -> None:
        """Sends a signal; every process of the session must be gone soon."""
        self.process.send_signal(number)
        self.process.wait(END_SECONDS)
        deadline = time.monotonic() + GONE_SECONDS
        while left := processes_of(self.process.pid):
            assert time.monotonic() < deadline, f"left after {GONE_SECONDS} s: {left}"
            time.sleep(0.05)

    def clean_up(self) -> None:
        """Ends what a failed test leaves."""
        for pid in [self.process.pid, *processes_of(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def processes_of(session: int) -> list[int]:
    """Returns the processes of a session that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def life(log: Path, *arguments: str) -> Iterator[Life]:
    command = Life(log, *arguments)
    try:
        yield command
    finally:
        command.clean_up()


def random_of(name: str) -> random.Random:
    print(f"\n{name}: {KILLS} kills, SOLOV2_SEED={SEED}")
    return random.Random(f"{name} {SEED}")


TRAINING = """
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.num_workers = 2
    config.data.generated.root = {root!r}
    config.data.generated.num_train, config.data.generated.num_val = 24, 4
    config.data.generated.image_size = (64, 64)
    config.model.fpn.channels = config.model.mask_head.channels = 32
    config.model.ins_head.num_convs = 1
    config.model.ins_head.channels = config.model.ins_head.num_kernels = 32
    config.model.ins_head.num_grids = (6, 5, 4, 3, 2)
    config.input.min_sizes_train, config.input.max_size_train = (48, 64), 64
    config.input.min_size_test = config.input.max_size_test = 64
    config.train.batch_size, config.train.steps = 2, {steps}
    config.train.checkpoint_every, config.train.eval_every, config.train.log_every = 3, 12, 1
    config.optim.ema_decay = 0.9
    config.optim.warmup_steps, config.optim.milestones = 4, (40,)
    config.eval.num_pictures = 0
    return config
"""


def test_kills_of_training_with_readers(tmp_path):
    rng = random_of("train")
    config = tmp_path / "config.py"
    config.write_text(TRAINING.format(root=str(tmp_path / "shapes"), steps=4 * KILLS))
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    command = ("train", f"--config={config}", "--cpu_devices=1")
    seconds: dict[str, list[float]] = {"SIGKILL": [], "SIGTERM": []}
    for number in range(KILLS):
        which = rng.choice((signal.SIGKILL, signal.SIGTERM))
        # From here on: starting, restoring; or, after some steps, a step, save, evaluation.
        steps, wait = rng.choice((0, 1, 2, 4, 6)), rng.uniform(0, 0.5)
        wait = rng.uniform(0, 12) if not steps else wait
        with life(log, *command, f"--workdir={killed}") as run:
            if steps:
                assert run.wait_for(lambda n=steps: run.printed().count(" loss ") >= n)
            time.sleep(wait)
            assert run.process.poll() is None, "it was done too early: make it longer"
            begin = time.monotonic()
            run.end(which)
            seconds[which.name].append(time.monotonic() - begin)
            saved = list_steps(killed) if killed.is_dir() else []
            if saved:
                assert restore_variables(killed, "last")[1] == saved[-1]
            if which == signal.SIGTERM and steps:
                assert run.process.returncode == 0, run.printed()
                assert saved, "it saves before it ends"
        print(f"{number + 1}: {which.name} after {steps} steps and {wait:.2f} s; saved {saved}")
    for workdir in (killed, tmp_path / "whole"):
        with life(workdir.with_suffix(".log"), *command, f"--workdir={workdir}") as run:
            assert run.process.wait(900) == 0, run.printed()[-2000:]
    assert_same_run(killed, tmp_path / "whole")
    assert not list(tmp_path.glob("**/.writing-*")) + list(tmp_path.glob("**/*-tmp*"))
    text = log.read_text()
    assert "Traceback" not in text
    worst = {name: f"{max(s, default=0):.1f} s" for name, s in seconds.items()}
    print(f"resumed {text.count('resumed')} times; the longest end: {worst}")


def test_kills_of_predict(tmp_path):
    rng = random_of("predict")
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    workdir = tiny_network.write_workdir(tmp_path / "run", config)
    photos = tmp_path / "photos"
    photos.mkdir()
    noise = np.random.default_rng(0)
    for number in range(150):
        pixels = noise.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(photos / f"{number:03}.png")
    frames = [Image.open(p).convert("P") for p in sorted(photos.iterdir())[:60]]
    frames[0].save(photos / "film.gif", save_all=True, append_images=frames[1:], duration=40)

    def arguments(out: Path) -> list[str]:
        flags = [f"--workdir={workdir}", "--cpu_devices=1", "--score=0", f"--input={photos}"]
        return ["predict", *flags, "--write=overlay,coco,masks,yolo,labelme", f"--output={out}"]

    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    (killed / "masks").mkdir(parents=True)
    for mine in ("notes.txt", "masks/by_hand.png"):
        (killed / mine).write_text("the user's")
    ended: Counter[str] = Counter()
    held: set[bytes] = set()  # what killed runs had predicted
    for number in range(KILLS):
        which = rng.choice((signal.SIGKILL, signal.SIGTERM))
        pictures, wait = rng.choice((-1, 0, 10, 50, 100)), rng.uniform(0, 0.3)
        wait = rng.uniform(0, 6) if pictures < 0 else wait
        with life(log, *arguments(killed)) as run:
            start = time.time()

            def fresh(start: float = start) -> int:
                return sum(p.stat().st_mtime > start for p in killed.glob("*.png"))

            if pictures >= 0:
                assert run.wait_for(lambda n=pictures: fresh() >= n), run.printed()
            time.sleep(wait)
            if run.process.poll() is None:
                ended[which.name] += 1
            run.end(which)
            if which == signal.SIGTERM and pictures > 0:
                assert run.process.returncode in (143, 0), run.printed()
            assert "not written by this command" not in run.printed()
        done = partial_results(killed)
        if done.get(PARTIAL):
            # The same again where the next life ended before it looked into the folder.
            held.add((killed / PARTIAL).read_bytes())
        print(f"{number + 1}: {which.name} after {pictures} pictures and {wait:.2f} s: {done}")
    for out in (killed, tmp_path / "whole"):
        with life(out.with_suffix(".log"), *arguments(out)) as run:
            assert run.process.wait(600) == 0, run.printed()[-2000:]
    assert "Traceback" not in log.read_text()
    for name in ("notes.txt", "masks/by_hand.png"):
        assert (killed / name).read_text() == "the user's"
        (killed / name).unlink()
    recovered = sorted(killed.glob("predictions.recovered*.json"))
    assert {p.read_bytes() for p in recovered} == held
    for path in recovered:
        path.unlink()
    contents = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (killed, tmp_path / "whole")
    ]
    for files in contents:
        listed = files.pop(Path(MANIFEST)).decode().splitlines()
        ours = {e[0] for e in map(json.loads, listed) if isinstance(e, list)}
        assert {str(p) for p in files} <= ours
        # Encoders write the hour and random numbers into a video.
        files.pop(next(p for p in files if p.stem == "film" and p.suffix == ".mp4"))
    assert contents[0].keys() == contents[1].keys()
    assert contents[0] == contents[1]
    print(f"ended before they were done: {dict(ended)}")


def partial_results(folder: Path) -> dict[str, int]:
    """Returns the number of results in each file of them, which is whole json."""
    paths = sorted(folder.glob("predictions.*"))
    return {path.name: len(json.loads(path.read_bytes())) for path in paths}


def test_kills_of_serve_under_load(tmp_path):
    pytest.importorskip("fastapi_offline")
    rng = random_of("serve")
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    workdir = tiny_network.write_workdir(tmp_path / "run", config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--workdir={workdir}", "--cpu_devices=1", f"--port={port}", "--score=0"]
    total: Counter[str] = Counter()
    for number in range(KILLS):
        which = rng.choice((signal.SIGKILL, signal.SIGTERM))
        early, wait = rng.random() < 0.25, rng.uniform(0, 1)
        with life(tmp_path / "serve.log", "serve", *flags) as run:
            if early:  # while it starts or compiles
                time.sleep(8 * wait)
                run.end(which)
                answers: Counter[str] = Counter()
            else:
                assert run.wait_for(lambda: "listening on" in run.printed()), run.printed()
                answers = load(port, wait, run, which)
                if which == signal.SIGTERM:
                    assert run.process.returncode == 0, run.printed()
                    # Refused from the moment of the signal; cut: closed before any request.
                    assert set(answers) <= {"200", "429", "refused"}, answers
                assert answers["200"]
        total += answers
        with socket.create_server(("127.0.0.1", port)):  # raises if it is taken
            print(f"{number + 1}: {which.name}, early {early}, {wait:.2f} s: {dict(answers)}")
    assert "Traceback" not in (tmp_path / "serve.log").read_text()
    print(f"answers: {dict(total)}")


def load(port: int, seconds: float, run: Life, which: signal.Signals) -> Counter[str]:
    """Returns how the requests of eight clients end while the service is ended."""
    answers: Counter[str] = Counter()
    body, lock = picture(64, 64)[1], threading.Lock()
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            try:
                status, _ = post(port, body)
                name = "refused" if status is None else str(status)
            except (OSError, http.client.HTTPException) as error:
                name = type(error).__name__
            with lock:
                answers[name] += 1
            if name not in ("200", "429"):
                return

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    run.wait_for(lambda: answers["200"] > 8)
    time.sleep(seconds)
    run.end(which)
    over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return answers


def test_the_processes_of_a_session_are_found(tmp_path):
    code = "import os, time; os.fork(); os.fork(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while len(processes_of(child.pid)) < 4:
            assert time.monotonic() < deadline
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    while processes_of(child.pid):
        assert time.monotonic() < deadline
