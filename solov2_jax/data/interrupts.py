"""Ctrl-C is for the process that reads: its workers go on until it closes them.

A terminal and a notebook's stop button signal the whole group of processes. The reader
decides what becomes of the run; a worker that died of it would print a traceback, and
could not give the batches that are still wanted.
"""

import contextlib
import signal
from collections.abc import Iterator


def ignore() -> None:
    """Lets SIGINT pass this process by."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def kept_from_children(wanted: bool) -> Iterator[None]:
    """Holds SIGINT back inside `with`, for what this thread starts: for good.

    Threads and processes inherit what is held back, so a worker is safe from its first
    instruction on. In the present thread the signal arrives when the block ends.

    Args:
      wanted: False: nothing is held back.
    """
    if not wanted or not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    # It would start with the first worker, and lets the signal through when it does.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
