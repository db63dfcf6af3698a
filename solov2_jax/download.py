"""A file at an address -> a file here, within limits of time and size."""

import http.client
import mimetypes
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import BinaryIO

from solov2_jax.io import InputError, atomic_path, printable

TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 16


@dataclass(frozen=True)
class DownloadLimits:
    """What a download may take, whatever the server says, and what raises the limits."""

    max_bytes: int = 1 << 30
    seconds: float = 600.0  # from the first connection to the last byte
    size_flag: str = " (--download_mb)"
    time_flag: str = ", see --download_seconds"


DEFAULT_LIMITS = DownloadLimits()
# Bytes that are there, bytes in all (None: not announced).
Progress = Callable[[int, int | None], None]


def without_secrets(address: str) -> str:
    """Returns an address without user, password and query, for messages and results."""
    if "://" not in address:
        return address
    scheme, _, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    host = place.rpartition("@")[2]
    return printable(f"{scheme}://" + re.split("[?#]", f"{host}{slash}{path}")[0])


def fetch(
    address: str,
    folder: str,
    limits: DownloadLimits = DEFAULT_LIMITS,
    *,
    key: str = "--input ",
    progress: Progress | None = None,
) -> str:
    """Returns the path of the downloaded file, in `folder`.

    Args:
      key: the flag or config key that named the address, for messages.
      progress: called with each part that arrives.

    Raises:
      InputError: naming the address, without its password, and what is wrong.
    """
    done: Future[str] = Future()
    deadline = time.monotonic() + limits.seconds
    shown = f"{key}{without_secrets(address)}"

    def run() -> None:
        try:
            answer = _open(address)
            path = os.path.join(folder, _name(address, answer.headers))
            with answer, atomic_path(path, sync=False) as temporary, temporary.open("wb") as file:
                _copy(
                    answer, file, limits=limits, deadline=deadline, shown=shown, progress=progress
                )
            done.set_result(path)
        except BaseException as error:
            done.set_exception(error)

    # A thread, because a server may also drip its headers, or a name server its answer.
    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(limits.seconds)
    except urllib.error.HTTPError as error:
        why = f"the server answers {error.code} {error.reason}"
    except TimeoutError:
        late = f"took longer than {limits.seconds:g} s{limits.time_flag}"
        silent = f"no answer for {TIMEOUT:g} s"
        why = f"cannot be fetched ({silent if done.done() else late})"
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        # What a ValueError says may quote the address with its password.
        malformed = isinstance(error, ValueError)
        reason = "malformed address" if malformed else str(getattr(error, "reason", error))
        why = (
            f"cannot be fetched ({reason or type(error).__name__}); check the address and the "
            "network, or fetch it yourself and give the file"
        )
    raise InputError(f"{shown}: {printable(why)}")


def _open(address: str) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()  # http and https alone, also after a redirect
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        return opener.open(_request(address), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _request(address: str) -> urllib.request.Request:
    """Returns the request of an address as people write it: any letters, user:password@."""
    scheme, place, path, query, _ = urllib.parse.urlsplit(address.strip())
    login, _, host = place.rpartition("@")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    keep = "/%:@!$&'()*+,;=~"
    parts = (scheme, host, urllib.parse.quote(path, keep), urllib.parse.quote(query, keep + "?"))
    request = urllib.request.Request(urllib.parse.urlunsplit((*parts, "")))
    request.add_header("User-Agent", "solov2_jax")
    if login:
        token = b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _name(address: str, headers: http.client.HTTPMessage) -> str:
    path = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    name = re.sub(r"[^\w.\-]", "_", path.rsplit("/", 1)[-1]).lstrip(".")[-50:]
    stem, suffix = os.path.splitext(name or "download")
    kind = headers.get_content_type()
    guess = ".mkv" if kind == "video/x-matroska" else mimetypes.guess_extension(kind)
    return stem + (suffix or guess or "")


def _copy(
    answer: http.client.HTTPResponse,
    file: BinaryIO,
    *,
    limits: DownloadLimits,
    deadline: float,
    shown: str,
    progress: Progress | None,
) -> None:
    announced = answer.headers.get("Content-Length", "")
    size = int(announced) if announced.isdigit() else None
    total = 0
    while total <= limits.max_bytes and (chunk := answer.read1(CHUNK)):
        total += len(chunk)
        file.write(chunk)
        if progress:
            progress(total, size)
        if time.monotonic() > deadline:
            raise InputError(f"{shown}: too slow{limits.time_flag}")
    if total > limits.max_bytes:
        raise InputError(
            f"{shown}: is larger than {limits.max_bytes / 1e6:g} MB{limits.size_flag}; fetch it "
            "yourself and give the file"
        )
    if size is not None and total < size:
        raise InputError(
            f"{shown}: the connection ended after {total} of {announced} bytes; try again"
        )
