"""Bars in a terminal, lines elsewhere; the log is whole in both."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solov2_jax import progress
from solov2_jax.progress import Progress, track, working

ROOT = Path(__file__).resolve().parent.parent
# Two bars, lines of the log in between, and one line longer than the terminal is wide.
WORK = """
import logging, time
from solov2_jax import logging as session, progress
from solov2_jax.progress import Progress, track, working
progress.SHOWN_AFTER, progress.STILL_EVERY = 0.0, 0.1
session.show_log()
log = logging.getLogger("solov2_jax")
with Progress("training", 20, unit="steps", every=0.1) as bar:
    for step in range(20):
        time.sleep(0.03)
        bar.update(step + 1, f"epoch {step / 10:.1f} of 2")
        if step % 5 == 4:
            log.info("line %d " + "x" * 150 + " [bold] end", step)
            for item in track(range(3), "evaluating"):
                time.sleep(0.02)
    with working("compiling"):
        time.sleep(0.25)
log.info("the end")
"""


def in_terminal(code, **environment):
    """Returns what a program writes to a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=slave,
        stderr=slave,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
        | environment,
    )
    os.close(slave)
    pieces = []
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(master)
    assert process.wait(30) == 0, b"".join(pieces).decode()
    return b"".join(pieces).decode()


def in_pipe(code, **environment):
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | environment,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0 and not found.stderr, found.stderr
    return found.stdout


def test_a_terminal_has_bars_and_whole_lines_above_them():
    text = in_terminal(WORK)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", text)
    for step in (4, 9, 14, 19):
        # At the begin of a line, in one piece, as it was logged.
        assert re.search(rf"[\r\n]\d\d:\d\d:\d\d line {step} x{{150}} \[bold\] end\r", plain)
    assert "training" in text and "evaluating" in text and "compiling" in text
    assert "epoch 1.9 of 2" in text and "100%" in text
    # Nothing of the bars stays, and the cursor is back.
    assert text.rstrip().endswith("the end") and text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
def test_a_pipe_has_lines_alone(environment):
    text = in_pipe(WORK, **environment)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    counts = [line for line in lines if "training: " in line]
    assert 3 <= len(counts) <= 9
    assert re.search(r"training: \d+ of 20 steps, about \d+ s left, epoch [\d.]+ of 2", counts[0])
    assert any("compiling: still at it after 0 s" in line for line in lines)


def test_a_terminal_that_cannot_move_its_cursor_has_lines():
    assert "\x1b" not in in_terminal(WORK, TERM="dumb")


def test_an_error_takes_the_bar_away():
    code = WORK.replace("time.sleep(0.25)", "raise SystemExit(0)")
    assert re.search(r"\x1b\[\?25h[^\x1b]*(\x1b\[[0-9;]*[A-Z][^\x1b]*)*$", in_terminal(code))


def test_what_is_tracked_comes_through_in_order(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level(logging.INFO, "solov2_jax")
    assert list(track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert list(track([], "nothing")) == []
    with Progress("counting", None, unit="things", every=0.0) as bar:
        bar.advance()
        bar.advance(2, "so far")
    assert caplog.messages[-1] == "counting: 3 things, so far"
    with pytest.raises(KeyError), working("failing"):
        raise KeyError


def test_a_closed_output_has_no_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    stream.close()
    assert not progress.is_terminal()
    monkeypatch.setattr(sys, "stdout", None)
    assert not progress.is_terminal()


def test_counting_costs_little():
    start = time.perf_counter()
    for _ in track(range(200_000), "numbers"):
        pass
    assert time.perf_counter() - start < 2  # seconds; 0.05 on a free core
