"""Worker processes live and die with the process that reads from them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import train
from tiny_coco import load

from solov2_jax.data import pipeline, shared_memory
from solov2_jax.io import InputError

ROOT = Path(__file__).resolve().parent.parent


def start(tmp_path: Path, body: str) -> subprocess.Popen:
    """Starts a program of its own, in a session of its own."""
    head = f"""
        import os, pathlib, multiprocessing, signal, sys, threading, time
        from test_pipeline import load, pipeline, train
        folder = pathlib.Path({str(tmp_path)!r})
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return subprocess.Popen(
        [sys.executable, str(program)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "TMPDIR": str(temporary),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_signals_reach_the_reader_and_no_worker(tmp_path):
    """Neither while they start nor later; a terminal sends them to the whole group."""
    program = start(
        tmp_path,
        """
        if __name__ == "__main__":
            seen = []
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda n, _: seen.append(n))
            interrupt = lambda: [os.killpg(0, n) for n in (signal.SIGINT, signal.SIGTERM)]
            threading.Timer(0.3, interrupt).start()  # Python itself takes longer
            data = load(folder)
            reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
            for step, batch in enumerate(train(data, reading=reading)):
                if step == 3:
                    assert len(seen) == 2, "it was not lost"
                    interrupt()
            assert step == 11 and len(seen) == 4
            print("all batches")
        """,
    )
    out, err = program.communicate(timeout=900)
    assert out == "all batches\n" and err == "", err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_an_error_of_the_reader(tmp_path, victim):
    reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
    batches = iter(train(load(tmp_path), num_steps=5000, reading=reading))
    for _ in range(4):  # both have started
        next(batches)
    workers = sorted(multiprocessing.active_children(), key=lambda p: p.pid or 0)
    os.kill(workers[victim].pid or 0, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"ended unexpectedly \(exit code -9; .* data.num_workers"):
        for _ in batches:
            pass
    assert time.monotonic() - begin < 60, "seconds, on a busy machine"
    assert not [p for p in workers if p.is_alive()]


def test_no_message_is_longer_than_a_pipe_writes_at_once(tmp_path):
    """So none is half written when a worker is killed, and no reader waits for the rest."""
    import cloudpickle

    maker = train(load(tmp_path), batch_size=16, max_instances=500).maker
    pool = shared_memory.SharedMemoryPool(2, maker.batch_bytes(64, 64) + (1 << 20))
    sent = shared_memory.PoolSender(maker, pool)(0)
    assert all(isinstance(v, shared_memory.PoolBlock) for v in sent.values())
    assert len(cloudpickle.dumps(sent)) < 3000  # PIPE_BUF is 4096
    arrays = shared_memory.receive(sent, pool)
    for key, value in maker(0).items():
        np.testing.assert_array_equal(arrays[key], value, err_msg=key)
        assert arrays[key].dtype == value.dtype


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
def test_a_killed_reader_leaves_nothing_behind(tmp_path):
    program = start(
        tmp_path,
        """
        from solov2_jax.data import shared_memory

        if __name__ == "__main__":
            shared_memory._SMALL = 0  # the data set goes through a file
            reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
            batches = iter(train(load(folder), num_steps=5000, reading=reading))
            for _ in range(4):
                next(batches)
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)
            for _ in batches:
                time.sleep(0.05)
        """,
    )
    assert program.stdout is not None
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    program.kill()
    program.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    assert list((tmp_path / "temporary").iterdir()) == []
