"""A lock in object storage, where nothing is freed when a process is killed."""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from typing import Any

from solov2_jax.io import InputError, object_store, reaching

log = logging.getLogger("solov2_jax")

LEASE_SECONDS = 60.0  # a lock that nobody renewed for so long is of a run that was killed
_LOCK = ".lock"


class Lease:
    """A lock object that its holder renews; put only where there is none.

    Where a run was killed, the next one waits until the lock was not renewed for
    `LEASE_SECONDS`, or takes it over at once if the killed process was on this host.
    Object storage cannot take a lock away from its holder: of two starts that wait for
    the same dead run, one ends when it finds the other's lock. A server that ignores
    `If-None-Match: *` locks nothing.

    Attributes:
      lost: whether another run has taken the lock.
    """

    def __init__(self, address: str):
        self.lost = False
        self._address, self._path = address, f"{address}/{_LOCK}"
        self._store = object_store(address)
        self._content = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}

    def acquire(self) -> None:
        """Takes the lock, or raises an InputError if a run renews it."""
        with reaching(self._address):
            if self._create():
                return
            other = self._read()
            if other and not _is_dead_here(other):
                log.info("%s: waiting %d s to see whether it is used", self._path, LEASE_SECONDS)
                until = time.monotonic() + LEASE_SECONDS
                while time.monotonic() < until and self._read():
                    if self._read() != other:
                        break
                    time.sleep(LEASE_SECONDS / 30)
                if (now := self._read()) and now != other:
                    raise InputError(
                        f"--workdir {self._address}: another process is training in it (process "
                        f"{other.get('pid')} on {other.get('host')}); wait for it, stop it, or "
                        "give another folder"
                    )
            with contextlib.suppress(FileNotFoundError):
                self._store.rm_file(self._path)
            if not self._create():
                raise InputError(
                    f"--workdir {self._address}: another process started in it at this moment"
                )

    def renew(self) -> None:
        """Shows that the run is alive; raises an OSError if another one took over."""
        with contextlib.suppress(InputError), reaching(self._address):
            other = self._read()
            self.lost = bool(other) and other.get("id") != self._content["id"]
            if not self.lost:
                self._store.pipe_file(self._path, self._text())
        if self.lost:
            raise OSError(
                f"{self._address}: another process has taken the run over, because this one "
                f"did not renew {_LOCK}; it ends here"
            )

    def release(self) -> None:
        """Deletes the lock if it is still ours."""
        with contextlib.suppress(InputError, FileNotFoundError), reaching(self._address):
            if (self._read() or {}).get("id") == self._content["id"]:
                self._store.rm_file(self._path)

    def _create(self) -> bool:
        try:
            self._store.pipe_file(self._path, self._text(), mode="create")
        except FileExistsError:
            return False
        return True

    def _text(self) -> bytes:
        return json.dumps({**self._content, "renewed": time.time()}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._store.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Returns whether a lock's process was on this host and is gone."""
    if holder.get("host") != socket.gethostname() or type(holder.get("pid")) is not int:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return holder["pid"] == os.getpid()
