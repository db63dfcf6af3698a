"""A run's folder in object storage: worked on in a folder here, and kept equal there.

Object storage (`s3://BUCKET/...`, `gs://BUCKET/...`) has single objects that appear whole
and no folders, locks, renames or appending. So whatever reads or writes the folder of a
run works on a copy on the local disk, as if there were no other: `local_folder` makes it,
of the small files first and of a checkpoint's arrays when they are read. `Mirror.put`
puts what changed back, in an order that a kill at any moment leaves whole:

1. files, each in one piece, so that the metrics of a checkpoint's step are there first;
2. new checkpoints; `position/metadata`, without which nothing counts as a checkpoint,
   comes last;
3. `best.json` and the like, which name a checkpoint;
4. what is gone here is deleted, of a checkpoint `position/metadata` first.
"""

import atexit
import contextlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator

import filelock

from solov2_jax.io import InputError, is_object, object_store, reaching, reason
from solov2_jax.lease import Lease

log = logging.getLogger("solov2_jax")

PUT_SECONDS = 10.0  # between two looks for what changed
ATTEMPTS = 6  # to put something, until the run ends
_COMMITTED = re.compile(r"checkpoints/(\d+)/position/metadata")
# Written anew by every start, or large and never read back.
_NOT_FETCHED = re.compile(r"(tensorboard|profile|wandb|eval\w*|checkpoints_unreadable)/|\.lock$")
_NOT_PUT = re.compile(r"(.*/)?(\.writing-[^/]*|\.lock|[^/]*\.orbax-checkpoint-tmp[^/]*)(/.*)?$")
_NAME_CHECKPOINTS = ("best.json", ".last_checkpoint")
_PREFIX = "solov2_jax-"

_mirrors: dict[str, "Mirror"] = {}  # by address, and by the folder here


def local_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder here that stands for an address; any other path as it is.

    Raises:
      InputError: if object storage does not answer.
    """
    text = os.fspath(path)
    if not is_object(text):
        return pathlib.Path(text)
    object_store(text)  # names a bucket
    address = text.rstrip("/")
    if address not in _mirrors:
        mirror = Mirror(address)
        mirror.fetch()
        _mirrors[address] = _mirrors[str(mirror.folder)] = mirror
        log.info("%s: worked on in %s", address, mirror.folder)
    return _mirrors[address].folder


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns as `local_folder` does; of a single object a file here with its content."""
    text = os.fspath(path)
    if is_object(text):
        with reaching(text):
            store = object_store(text)
            if store.isfile(text):
                file = _new_folder() / text.rpartition("/")[2]
                store.get_file(text, str(file))
                return file
    return local_folder(text)


def with_addresses(text: str) -> str:
    """Returns a message with the addresses that folders here stand for."""
    for address, mirror in _mirrors.items():
        if is_object(address):
            text = text.replace(str(mirror.folder), address)
    return text


def mirror_of(folder: str | os.PathLike[str]) -> "Mirror | None":
    """Returns what keeps a folder equal to an address, None where nothing does."""
    return _mirrors.get(str(pathlib.Path(folder).absolute()))


def complete(path: pathlib.Path) -> None:
    """Fetches what is missing below a path inside of a mirrored folder."""
    for parent in path.absolute().parents:
        if mirror := _mirrors.get(str(parent)):
            mirror.fetch_below(path.absolute().relative_to(parent).as_posix())


def put_all() -> None:
    """Puts whatever changed in the mirrored folders.

    Raises:
      OSError: naming the address, if it cannot be.
    """
    for address, mirror in _mirrors.items():
        if is_object(address):
            mirror.put()


class Mirror:
    """A folder here and the objects below an address.

    Attributes:
      address: without a slash at its end.
      folder: here, deleted at exit; kept if something in it could not be put.
    """

    def __init__(self, address: str):
        self.address = address
        self._store = object_store(address)
        self.folder = _new_folder() / (address.rpartition("/")[2] or "run")
        self.folder.mkdir()
        self._stored: dict[str, tuple[int, int] | None] = {}  # by name: (mtime ns, bytes) here
        self._objects: dict[str, str] = {}  # by name: what tells the object's versions apart
        self._steps: set[str] = set()  # of checkpoints that are whole there
        self._busy = threading.RLock()
        self._error, self._failures = "", 0

    def fetch(self) -> None:
        """Copies the small files here, and of each checkpoint what says that it is one."""
        with self._busy:
            found = self._list()
            steps = {m[1] for name in found if (m := _COMMITTED.fullmatch(name))}
            for name, version in found.items():
                folder, _, rest = name.partition("/")
                if folder == "checkpoints":
                    step, _, rest = rest.partition("/")
                    light = "/" not in rest or rest.startswith("position/")
                    wanted = step in steps and light
                else:
                    wanted = not _NOT_FETCHED.match(name)
                if wanted and self._objects.get(name) != version:
                    self._get(name)
                    self._objects[name] = version
            self._steps = steps

    def fetch_below(self, prefix: str) -> None:
        """Copies every object below a prefix here that is not here yet."""
        with self._busy:
            for name, version in self._list(prefix).items():
                if not (self.folder / name).exists():
                    self._get(name)
                    self._objects[name] = version

    def put(self) -> None:
        """Puts what changed since the last call; see the order above.

        Raises:
          OSError: naming the address and the folder here, which is then kept.
        """
        with self._busy:
            try:
                with reaching(self.address):
                    self._put()
                self._failures = 0
            except (InputError, OSError) as error:
                self._failures += 1
                text = str(error) if isinstance(error, InputError) else reason(error)
                (self.folder.parent / ".keep").touch()
                raise OSError(
                    f"{self.address}: cannot be written ({text}); what is missing there is in "
                    f"{self.folder}"
                ) from error
            (self.folder.parent / ".keep").unlink(missing_ok=True)

    def check(self) -> None:
        """Raises an OSError if nothing could be put in the background for a while."""
        if self._error:
            raise OSError(self._error)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out, and puts what changes every few seconds, until the end.

        Raises:
          InputError: if another run is at work there.
          OSError: at the end, if something could not be put.
        """
        lease = Lease(self.address)
        lease.acquire()
        stop = threading.Event()
        thread = threading.Thread(target=self._keep_putting, args=(stop, lease), daemon=True)
        try:
            self.fetch()  # what another run wrote before the lock was ours
            self._sweep()
            thread.start()
            yield
        finally:
            stop.set()
            if thread.is_alive():
                thread.join()
            try:
                if not lease.lost:
                    self.put()
            finally:
                lease.release()

    def _keep_putting(self, stop: threading.Event, lease: Lease) -> None:
        while not stop.wait(PUT_SECONDS):
            try:
                lease.renew()
                self.put()
            except OSError as error:
                if lease.lost or self._failures >= ATTEMPTS:
                    self._error = str(error)
                    return
                log.warning("%s; trying again", error)

    def _list(self, prefix: str = "") -> dict[str, str]:
        """Returns the objects below the address by name, with what tells versions apart."""
        top = self.address.partition("://")[2] + "/"
        with reaching(self.address):
            try:
                found = self._store.find(f"{self.address}/{prefix}", detail=True)
            except FileNotFoundError as error:
                bucket = top.partition("/")[0]
                if self._store.exists(bucket):
                    return {}
                raise InputError(f"{self.address}: there is no bucket {bucket}") from error
        named = {
            path[len(top) :]: str(info.get("ETag") or info.get("etag") or info.get("mtime"))
            for path, info in found.items()
            if path.startswith(top) and info.get("type") == "file"
        }
        # A key is free text: nothing may lead out of the folder here.
        return {n: v for n, v in named.items() if n and not {"", ".", ".."} & {*n.split("/")}}

    def _get(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with reaching(f"{self.address}/{name}"):
            self._store.get_file(f"{self.address}/{name}", str(path))
        self._stored[name] = _stamp(path)

    def _put(self) -> None:
        checkpoints = self.folder / "checkpoints"
        steps = {p.name for p in _entries(checkpoints) if p.name.isdigit()}
        files = [n for n in self._changed() if not n.startswith("checkpoints/")]
        for name in [n for n in files if n not in _NAME_CHECKPOINTS]:
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment
                self._put_file(name)
        for step in sorted(steps - self._steps, key=int):
            self._put_checkpoint(step)
        for name in [n for n in files if n in _NAME_CHECKPOINTS]:
            self._put_file(name)
        for step in self._steps - {p.name for p in _entries(checkpoints)}:
            self._delete_checkpoint(step)
        for name in [n for n in self._stored if not n.startswith("checkpoints/")]:
            if not (self.folder / name).exists():
                self._delete(name)

    def _changed(self) -> list[str]:
        names = []
        for folder, folders, files in os.walk(self.folder):
            if pathlib.Path(folder) == self.folder:
                folders[:] = [name for name in folders if name != "checkpoints"]
            for name in (_inside(pathlib.Path(folder) / file, self.folder) for file in files):
                if not _NOT_PUT.match(name) and not os.path.islink(self.folder / name):
                    names.append(name)
        return sorted(n for n in names if self._stored.get(n) != _stamp(self.folder / n))

    def _put_checkpoint(self, step: str) -> None:
        top = self.folder / "checkpoints" / step
        commit, done = f"checkpoints/{step}/position/metadata", set()
        try:
            # Again until nothing is new: Orbax marks a folder that it has just named.
            while names := {_inside(p, self.folder) for p in top.rglob("*")} - done - {commit}:
                for name in sorted(names):
                    self._put_file(name)
                done |= names
            self._put_file(commit)
        except FileNotFoundError:
            if top.exists():
                raise
            self._delete_checkpoint(step)  # newer ones have replaced it meanwhile
            return
        self._steps.add(step)

    def _put_file(self, name: str) -> None:
        if (self.folder / name).is_dir():
            return
        stamp = _stamp(self.folder / name)
        self._store.put_file(str(self.folder / name), f"{self.address}/{name}")
        self._stored[name] = stamp

    def _delete_checkpoint(self, step: str) -> None:
        prefix = f"checkpoints/{step}/"
        commit = f"{prefix}position/metadata"
        for name in sorted(self._list(prefix), key=lambda name: (name != commit, name)):
            self._delete(name)
        self._steps.discard(step)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(f"{self.address}/{name}")
        self._stored.pop(name, None)

    def _sweep(self) -> None:
        """Deletes what a killed run left of checkpoints that it had not put in whole."""
        for name in self._list("checkpoints/"):
            if name.split("/")[1] not in self._steps:
                self._delete(name)


def _inside(path: pathlib.Path, folder: pathlib.Path) -> str:
    return path.relative_to(folder).as_posix()


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def _new_folder() -> pathlib.Path:
    """Returns a new folder for temporary files; deletes those that killed processes left."""
    for old in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if (old / ".keep").exists() or not (old / ".alive").exists():
            continue
        lock = filelock.FileLock(old / ".alive", blocking=False)
        with contextlib.suppress(OSError, filelock.Timeout), lock:
            shutil.rmtree(old, ignore_errors=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
    alive = filelock.FileLock(folder / ".alive")
    alive.acquire()

    def clean() -> None:
        alive.release()
        if not (folder / ".keep").exists():
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    return folder
