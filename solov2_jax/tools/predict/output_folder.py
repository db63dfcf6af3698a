"""The folder that predictions are written to: whose files are whose, and what survives.

`.solov2_files.jsonl` in it lists each file that a run wrote, with its size and time. A
file that is not listed, or has changed since, is the user's: it is never replaced or
deleted without `--overwrite`. The list grows line by line, and a file beside it is locked
while a run lasts, so a killed run is noticed, its temporary files are deleted and its results kept.

Of several processes that write one folder, each has a list and growing results of its own,
named after its number. The first one holds the lock, cleans up before the others begin, and
takes over theirs at the end.
"""

import contextlib
import errno
import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from solov2_jax.io import InputError, atomic_path, lock_file, make_folder, printable
from solov2_jax.tools.predict.label_files import CVAT, LABEL_STUDIO

log = logging.getLogger(__name__)

MANIFEST, LOCK = ".solov2_files.jsonl", ".solov2_files.lock"


def during(name: str, state: str) -> str:
    """Returns what a file is called in a state: name.partial.json, name.recovered.json."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{state}{suffix}"


def of_process(name: str, process: int) -> str:
    """Returns what one of several processes calls its file: name, name.process_1.json, ..."""
    return during(name, f"process_{process}") if process else name


def of_others(folder: str, name: str) -> list[str]:
    """Returns the names of the files that processes but the first have called so."""
    stem, suffix = os.path.splitext(name)
    pattern = re.compile(rf"{re.escape(stem)}\.process_\d+{re.escape(suffix)}")
    return sorted(n for n in names_in(folder) if pattern.fullmatch(n))


RESULTS = "predictions.json"
PARTIAL = during(RESULTS, "partial")  # of a run that goes on, or was killed
RECOVERED = during(RESULTS, "recovered")
GROWING_FILES = (RESULTS, CVAT, LABEL_STUDIO)
SUBFOLDERS = ("masks", "cutouts", "yolo", "labelme", "frames")
NAMED_CONFLICTS = 3  # in an error
_TAIL = b"\n]\n"
Part = tuple[int, int, int, int]  # image id, process, begin and end in its file
_GROWING = -1, -1  # listed for results that grow while a run lasts


class OutputFolder:
    """Writes files into a folder without touching those of others.

    Args:
      overwrite: replace and delete files of others too.
      rank: (number, count) of this process among those that write.
    """

    def __init__(
        self, path: str | os.PathLike[str], overwrite: bool = False, rank: tuple[int, int] = (0, 1)
    ):
        self.path, self.overwrite = os.fspath(path), overwrite
        self.process, self.num_processes = rank
        self._lock = threading.Lock()
        self._manifest: Any = None
        # Relative path -> each (size, mtime in ns) that was listed: a kill between a file's
        # listing and its renaming leaves the older one.
        self._written: dict[str, set[tuple[int, int]]] = {}
        self._unfinished = False  # the last run was killed
        self._cut = False  # so was the manifest's last line

    def check(self, paths: Iterable[str]) -> None:
        """Raises if a path cannot be written to, or holds a file of the user's."""
        self._read_manifest()
        self._check_free(paths)

    def _check_free(self, paths: Iterable[str]) -> None:
        conflicts = []
        for path in paths:
            if os.path.isdir(path) and not os.path.islink(path):
                raise InputError(f"{path}: is a folder, and a file must go there; remove it")
            if not self.overwrite and not self.is_ours(path):
                conflicts.append(path)
        if conflicts:
            names = ", ".join(sorted(conflicts)[:NAMED_CONFLICTS])
            more = len(conflicts) - NAMED_CONFLICTS
            others = f" and {more} more" if more > 0 else ""
            raise InputError(
                f"--output {self.path}: {names}{others}: not written by this command, or changed "
                "since; move these files, choose another folder, or give --overwrite to replace "
                "them"
            )

    def is_ours(self, path: str) -> bool:
        """Returns whether a path is free, or holds a file as a run of ours left it."""
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        written = self._written.get(os.path.relpath(path, self.path), set())
        return (status.st_size, status.st_mtime_ns) in written or _GROWING in written

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the folder for one run; cleans up after a run that was killed.

        Raises:
          InputError: if another run writes to it, or it cannot be made.
        """
        if self.process:
            with self._listing():
                yield
            return
        make_folder(self.path)
        message = (
            f"--output {self.path}: another prediction is writing there; wait for it, or "
            "choose another folder (each of several runs needs its own)"
        )
        with lock_file(os.path.join(self.path, LOCK), message), self._listing():
            yield

    @contextlib.contextmanager
    def _listing(self) -> Iterator[None]:
        """Keeps the list open, between its marks of a run's begin and end."""
        self._read_manifest()
        name = of_process(MANIFEST, self.process)
        self._manifest = open(os.path.join(self.path, name), "ab", buffering=0)
        try:
            if self._cut:
                self._manifest.write(b"\n")
            if self._unfinished and not self.process:
                self._clean_up()
            if not self.process:
                self.take_over_lists()
            self._append("begin")
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # a full disk; the next run looks again
                    self._append("end")
        finally:
            self._manifest.close()
            self._manifest = None

    @contextlib.contextmanager
    def replacing(self, path: str) -> Iterator[Path]:
        """Yields a temporary file that replaces `path` at the end, whole or not at all.

        Raises:
          InputError: if there is a file of the user's.
        """
        self._check_free([path])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_path(path, sync=False) as temporary:
            yield temporary
            # Listed before it gets its name, so no kill leaves a file that is not.
            self.record(path, temporary)

    def record(self, path: str, file: str | os.PathLike[str] | None = None) -> None:
        """Lists a file as ours, as it is now. None: as ours, whatever it holds."""
        values = _GROWING
        if file is not None:
            status = os.stat(file)
            values = status.st_size, status.st_mtime_ns
        relative = os.path.relpath(path, self.path)
        with self._lock:
            self._written.setdefault(relative, set()).add(values)
            if self._manifest is not None:
                self._append([relative, *values])

    def listed(self, subfolder: str) -> list[str]:
        """Returns the paths below a subfolder that runs of ours wrote, there or not."""
        inside = os.path.join(subfolder, "")
        names = sorted(name for name in self._written if name.startswith(inside))
        return [os.path.join(self.path, name) for name in names]

    def remove_ours(self, paths: Iterable[str]) -> None:
        """Deletes the files that are ours; with `overwrite`, the others too."""
        for path in paths:
            if self.overwrite or self.is_ours(path):
                os.unlink(path)

    def _append(self, entry: Any) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if self._manifest.write(line) < len(line):  # unbuffered: a part of it, without an error
            path = os.path.join(self.path, MANIFEST)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def take_over_lists(self) -> None:
        """Adds the other processes' lists, which have ended, to the first one's."""
        for path in self._lists()[1:]:
            for entry in _entries(path.read_bytes()):
                if not isinstance(entry, str):
                    self._append(entry)
            path.unlink()

    def _lists(self) -> list[Path]:
        """Returns the paths of the first process's list and, where there are, of the others'."""
        return [Path(self.path, n) for n in (MANIFEST, *of_others(self.path, MANIFEST))]

    def _read_manifest(self) -> None:
        self._written, self._unfinished, self._cut = {}, False, False
        for path in self._lists():
            try:
                text = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            if path.name == of_process(MANIFEST, self.process):
                self._cut = bool(text) and not text.endswith(b"\n")
            mark = "end"
            for entry in _entries(text):
                if isinstance(entry, str):
                    mark = entry
                else:
                    self._written.setdefault(str(entry[0]), set()).add((entry[1], entry[2]))
            self._unfinished |= mark == "begin"

    def _clean_up(self) -> None:
        """Deletes a killed run's temporary files and keeps its results."""
        folders = [Path(self.path)]
        for name in SUBFOLDERS:
            folders += [Path(p) for p, _, _ in os.walk(Path(self.path, name))]
        for folder in folders:
            for leftover in folder.glob(".writing-*"):
                leftover.unlink(missing_ok=True)
        log.warning("%s: an earlier run was killed; its temporary files are deleted", self.path)
        for name in GROWING_FILES:
            partial = during(name, "partial")
            for each in (partial, *of_others(self.path, partial)):
                self._recover(name, os.path.join(self.path, each))

    def _recover(self, name: str, partial: str) -> None:
        if os.path.lexists(partial) and self.is_ours(partial):
            if os.path.getsize(partial) <= len(b"[" + _TAIL):  # nothing was predicted
                os.unlink(partial)
                return
            recovered = self._free_path(during(name, "recovered"))
            self.record(recovered, partial)
            os.replace(partial, recovered)
            log.warning("%s: holds what it had predicted", recovered)

    def _free_path(self, name: str) -> str:
        """Returns the path of a name, or of name_2, name_3, ... where that is taken."""
        stem, suffix = os.path.splitext(name)
        path, number = os.path.join(self.path, name), 1
        while os.path.lexists(path):
            number += 1
            path = os.path.join(self.path, f"{stem}_{number}{suffix}")
        return path


def _entries(text: bytes) -> Iterator[Any]:
    """Yields the marks, str, and the files, [path, size, time], of a list."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill or a full disk
            continue
        if isinstance(entry, str) or (isinstance(entry, list) and len(entry) == 3):
            yield entry


def names_in(folder: str) -> list[str]:
    """Returns what is in a folder, nothing where there is none."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


class ResultsFile:
    """A file about all pictures, added picture by picture: by default COCO results.

    After every addition the file is whole, so that a kill, a full disk or an error loses
    nothing that was added. `finish` puts it in order and in place.

    Args:
      name: of the file.
      head, tail: what stands before and after what is added.
      separator: between two additions.
    """

    def __init__(
        self,
        folder: OutputFolder,
        name: str = RESULTS,
        *,
        head: bytes = b"[",
        tail: bytes = _TAIL,
        separator: bytes = b",\n",
    ):
        self._folder = folder
        self._name, self._path = name, os.path.join(folder.path, name)
        self._partial = self._partial_of(folder.process)
        self._head, self._tail, self._separator = head, tail, separator
        self._file: Any = None
        self.parts: list[Part] = []
        self._others: dict[int, Any] = {}  # the files of other processes, by their numbers
        self._end = 0

    def _partial_of(self, process: int) -> str:
        return os.path.join(self._folder.path, of_process(during(self._name, "partial"), process))

    def add(self, image_id: int, results: Sequence[dict[str, Any] | str]) -> None:
        """Adds what is about a picture: records, or texts as they are."""
        self._open()
        if not results:
            return
        text = self._separator.join(
            (r if isinstance(r, str) else json.dumps(r)).encode() for r in results
        )
        separator = self._separator if self.parts else b"\n"
        begin = self._end + len(separator)
        self._write(self._end, separator + text + self._tail)
        self._end = begin + len(text)
        self.parts.append((image_id, self._folder.process, begin, self._end))

    def take_over(self, process: int, parts: Sequence[Sequence[int]]) -> None:
        """Makes what another process has added a part of the first one's file.

        Args:
          parts: its `parts`; its file is closed.
        """
        self._open()
        self._others[process] = open(self._partial_of(process), "rb")
        self.parts += [(a, b, c, d) for a, b, c, d in parts]

    def _open(self) -> None:
        if self._file is None:
            self._folder.record(self._partial)
            file = open(self._partial, "w+b", buffering=0)
            file.write(self._head + self._tail)
            self._file, self._end = file, len(self._head)

    def _write(self, begin: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            self._file.seek(begin)
            while view:  # an unbuffered write may be short
                view = view[self._file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):  # as it was: these bytes were there before
                self._file.seek(begin)
                self._file.write(self._tail)
                self._file.truncate()
            raise

    @property
    def is_open(self) -> bool:
        """Whether something was added, be it nothing about a picture."""
        return self._file is not None

    def close(self) -> None:
        """Closes the file under its name of a run that goes on, for `take_over`."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> None:
        """Closes the file under its name, ordered by image id; if there is one."""
        if self._file is None or self._folder.process:
            self.close()
            return
        ids = [part[0] for part in self.parts]
        in_order = ids == sorted(ids) and not self._others
        if not in_order:
            try:
                self._write_ordered()
            except OSError as error:  # a full disk: out of order is better than lost
                if self._others:
                    self._file = None  # what all have added stays, for the next run to recover
                    raise
                log.warning("%s: not in the images' order (%s)", self._path, printable(str(error)))
                in_order = True
        self._file.close()
        self._file = None
        if in_order:
            with contextlib.suppress(OSError):  # a full disk: the next run asks
                self._folder.record(self._path, self._partial)
            os.replace(self._partial, self._path)
        else:
            os.unlink(self._partial)
        for other in self._others.values():
            other.close()
            os.unlink(other.name)

    def _write_ordered(self) -> None:
        files = {self._folder.process: self._file, **self._others}
        with self._folder.replacing(self._path) as temporary, temporary.open("wb") as file:
            file.write(self._head)
            for i, (_, process, begin, end) in enumerate(sorted(self.parts)):
                files[process].seek(begin)
                separator = self._separator if i else b"\n"
                file.write(separator + files[process].read(end - begin))
            file.write(self._tail)
            file.flush()
