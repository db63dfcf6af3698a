"""A file at an address -> a file here, within limits of time and size."""

import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from concurrent.futures import Future
from dataclasses import dataclass

from solov2_jax.io import InputError, printable

TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 16
# Names of what has no usable one in its address.
SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/gif": ".gif",
    "image/webp": ".webp",
    "image/tiff": ".tif",
    "video/mp4": ".mp4",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
    "video/x-matroska": ".mkv",
    "video/x-msvideo": ".avi",
}


@dataclass(frozen=True)
class DownloadLimits:
    """What a download may take, whatever the server announces and however it drips."""

    max_bytes: int = 1 << 30
    seconds: float = 600.0  # from the first connection to the last byte


DEFAULT_LIMITS = DownloadLimits()


def without_secrets(address: str) -> str:
    """Returns an address without user, password and query, for messages and results."""
    if "://" not in address:
        return address
    scheme, _, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    path = re.split("[?#]", path)[0]
    return printable(f"{scheme}://{re.split('[?#]', place.rpartition('@')[2])[0]}{slash}{path}")


def fetch(address: str, folder: str, limits: DownloadLimits = DEFAULT_LIMITS) -> str:
    """Returns the path of the downloaded file, in `folder`.

    Raises:
      InputError: naming the address, without its password, and what is wrong.
    """
    shown = without_secrets(address)
    done: Future[str] = Future()
    deadline = time.monotonic() + limits.seconds

    def run() -> None:
        try:
            done.set_result(_fetch(address, folder, limits.max_bytes, deadline))
        except BaseException as error:
            done.set_exception(error)

    # A thread, because a server may also drip its headers, or a name server its answer.
    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(limits.seconds)
    except TimeoutError:
        if done.done():  # raised by the socket
            why = f"no answer for {TIMEOUT:g} s"
        else:
            why = f"took longer than {limits.seconds:g} s, see --download_seconds"
        raise InputError(f"--input {shown}: cannot be fetched ({why})") from None
    except urllib.error.HTTPError as error:
        raise InputError(
            f"--input {shown}: the server answers {error.code} {printable(str(error.reason))}"
        ) from None
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        # What a ValueError says may quote the address with its password.
        malformed = isinstance(error, ValueError)
        said = "malformed address" if malformed else printable(str(getattr(error, "reason", error)))
        reason = said or type(error).__name__
        raise InputError(
            f"--input {shown}: cannot be fetched ({reason}); check the address and "
            "the network, or fetch it yourself and give the file"
        ) from None


def _fetch(address: str, folder: str, max_bytes: int, deadline: float) -> str:
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
        answer = opener.open(_request(address), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    with answer:
        path = os.path.join(folder, _name(address, answer.headers))
        try:
            _copy(answer, path, max_bytes, deadline, without_secrets(address))
        except BaseException:
            if os.path.exists(path):
                os.unlink(path)
            raise
    return path


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
    return stem + (suffix or SUFFIXES.get(headers.get_content_type(), ""))


def _copy(
    answer: http.client.HTTPResponse, path: str, max_bytes: int, deadline: float, shown: str
) -> None:
    announced = answer.headers.get("Content-Length", "")
    total = 0
    with open(path, "wb") as file:
        while total <= max_bytes and (chunk := answer.read1(CHUNK)):
            total += len(chunk)
            file.write(chunk)
            if time.monotonic() > deadline:
                raise InputError(f"--input {shown}: too slow, see --download_seconds")
    if total > max_bytes:
        raise InputError(
            f"--input {shown}: is larger than {max_bytes / 1e6:g} MB (--download_mb); fetch "
            "it yourself and give the file"
        )
    if announced.isdigit() and total < int(announced):
        raise InputError(
            f"--input {shown}: the connection ended after {total} of {announced} bytes; try again"
        )
