"""A file at an address -> a file here, within limits."""

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request

MAX_BYTES = 1 << 30
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 20
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


def fetch(address: str, folder: str, max_bytes: int = MAX_BYTES) -> str:
    """Returns the path of the downloaded file, in `folder`.

    Args:
      max_bytes: more is refused, whatever the server announces.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "solov2_jax"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            path = os.path.join(folder, _name(address, answer.headers))
            _copy(answer, path, max_bytes, address)
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"--input {address}: the server answers {error.code} {error.reason}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"--input {address}: cannot be fetched ({reason}); check the address and "
            "the network, or fetch it yourself and give the file"
        ) from None
    return path


def _name(address: str, headers: http.client.HTTPMessage) -> str:
    path = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    name = re.sub(r"[^\w.\-]", "_", path.rsplit("/", 1)[-1]).lstrip(".")[-100:]
    stem, suffix = os.path.splitext(name or "download")
    return stem + (suffix or SUFFIXES.get(headers.get_content_type(), ""))


def _copy(answer: http.client.HTTPResponse, path: str, max_bytes: int, address: str) -> None:
    announced = answer.headers.get("Content-Length", "")
    total = 0
    with open(path, "wb") as file:
        while total <= max_bytes and (chunk := answer.read(CHUNK)):
            total += len(chunk)
            file.write(chunk)
    if total > max_bytes:
        os.unlink(path)
        raise ValueError(
            f"--input {address}: is larger than {max_bytes >> 20} MiB; fetch it "
            "yourself and give the file"
        )
    if announced.isdigit() and total < int(announced):
        raise ValueError(
            f"--input {address}: the connection ended after {total} of {announced} bytes; try again"
        )
