"""Files on disk: one way to write them whole, one way to say that one cannot be read.

Every file that must survive a kill or a full disk goes through `atomic_path`; every file
that somebody else made is read inside `reading`, so that whatever a library raises
becomes one sentence that names the file.

Images and jsons may also be objects, `s3://BUCKET/...` and `gs://BUCKET/...`: what reads
bytes, lists a folder or asks whether something is there takes such an address too.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import filelock

Path = str | os.PathLike[str]


class InputError(ValueError):
    """A user's file, setting or argument is wrong; the message is complete by itself.

    It names the place, the field and the fix, so nobody wraps it again.
    """


# What reads the addresses of each scheme, with fsspec: an extra of the same name.
_OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs"}


def is_object(path: Path) -> bool:
    """Returns whether a path is an address in object storage: s3://BUCKET/... or gs://..."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _OBJECT_STORES))


def object_store(address: Path) -> Any:
    """Returns fsspec's file system of an address; credentials come from the environment.

    Raises:
      InputError: if the address has no bucket, or the package is missing.
    """
    scheme, _, rest = os.fspath(address).partition("://")
    if not rest.strip("/"):
        raise InputError(f"{address}: names no bucket; write {scheme}://BUCKET/PATH")
    try:
        import fsspec

        # Listings are not kept: another process may have written since.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        extra = "gcs" if scheme == "gs" else scheme
        raise InputError(
            f"{address}: needs the package {_OBJECT_STORES[scheme]}: "
            f"pip install 'solov2_jax[{extra}]'"
        ) from error


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file or object."""
    if is_object(path):
        return object_store(path).cat_file(os.fspath(path))
    return pathlib.Path(path).read_bytes()


def exists(path: Path) -> bool:
    """Returns whether there is such a file, folder or object."""
    if is_object(path):
        with reaching(path):
            return object_store(path).exists(os.fspath(path))
    return os.path.exists(path)


def list_folder(path: Path) -> list[str] | None:
    """Returns the names in a folder; None without one (an empty prefix is none)."""
    if not is_object(path):
        return os.listdir(path) if os.path.isdir(path) else None
    with reaching(path):
        try:
            found = object_store(path).ls(os.fspath(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return [name for p in found if (name := p.rstrip("/").rpartition("/")[2])] or None


@contextlib.contextmanager
def reaching(address: Path) -> Iterator[None]:
    """Turns whatever keeps object storage from answering into one `InputError`."""
    try:
        yield
    except (InputError, FileNotFoundError, FileExistsError, NotADirectoryError):
        raise
    # botocore, aiohttp and google-auth raise all kinds, and OSError of every number.
    except Exception as error:
        raise InputError(
            f"{address}: object storage refuses or does not answer ({reason(error)}). Check the "
            "bucket's name, the credentials in the environment and AWS_ENDPOINT_URL"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder, which replaces `path` at the end.

    A kill or an error leaves the old file as it was. The contents reach the disk before
    the name does.

    Args:
      sync: wait for the disk; without, a power cut (not a kill) may lose the contents.

    Raises:
      OSError: naming `path`, where the folder cannot be written to.
    """
    target = pathlib.Path(path)
    try:
        # Short and random: the target's own name may be as long as a name can be.
        descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    os.close(descriptor)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        if sync:
            with open(temporary, "r+b") as file:  # Windows syncs no file that is only read
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp keeps others out
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            text = f"cannot be written: {error.strerror}"
            raise OSError(error.errno, text, str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def lock_file(path: Path, message: str) -> Iterator[None]:
    """Holds a lock inside `with`; a kill frees it too, and leaves an empty file.

    Args:
      message: of the error if somebody else holds it.

    Raises:
      InputError: if somebody else does, in this process or another.
    """
    lock = filelock.FileLock(path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(message) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows: filelock deletes it afterwards
            os.unlink(path)
        lock.release()


def make_folder(path: Path) -> pathlib.Path:
    """Returns a folder, made with its parents if need be.

    Raises:
      InputError: naming it, where that cannot be.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: this folder cannot be made ({error.strerror}); give another one"
        ) from error
    return folder


@contextlib.contextmanager
def unmade_if_empty(folder: Path) -> Iterator[None]:
    """When an error ends `with`, removes the folders down to this one that it made, if empty."""
    folder = pathlib.Path(folder).absolute()
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in new:
            with contextlib.suppress(OSError):  # somebody has put a file there
                each.rmdir()
        raise


def write_bytes(data: bytes, path: Path) -> None:
    """Writes a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(text: str, path: Path) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    write_bytes(text.encode(), path)


def write_json(values: Any, path: Path) -> None:
    """Writes JSON, whole or not at all."""
    write_text(json.dumps(values, indent=2) + "\n", path)


@contextlib.contextmanager
def reading(path: Path, kind: str, fix: str = "") -> Iterator[None]:
    """Turns whatever a library raises while it reads `path` into one `InputError`.

    An `InputError` raised inside passes: it says more than this could. MemoryError does
    not: a file may ask for too much.

    Args:
      kind: what the file should be, such as "a COCO instances json".
      fix: what the user can do, as a sentence.
    """
    advice = f". {fix}" if fix else ""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{advice}") from error
    # zlib, lzma, struct, Pillow, PyAV and json raise classes of their own, and bare
    # RecursionError, OverflowError, KeyError, ...: all mean that the file is unreadable.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as {kind} ({reason(error)}){advice}") from error


def reason(error: BaseException) -> str:
    """Returns an error's class and its message on one line, at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_json(path: Path, kind: str, fix: str = "") -> Any:
    """Returns the value of a json file in UTF-8 or UTF-16, byte order mark or not.

    Raises:
      InputError: naming the file, if it is missing or no json.
    """
    with reading(path, kind, fix):
        if not is_object(path) and pathlib.Path(path).is_char_device():
            raise InputError(f"{path}: is a device, not a file")
        return json.loads(read_bytes(path))


def printable(text: str) -> str:
    """Returns text on one line without what a terminal would obey: control characters.

    For whatever others wrote (names of files, answers of servers) before it is printed.
    """
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def without_controls(text: str) -> str:
    """Returns text of several lines without what a terminal would obey, as `printable`."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
