"""The Hugging Face hub through its own library: files, licences, errors, progress.

huggingface_hub is imported on use. Its cache, tokens, mirrors and offline mode are those
of its environment variables.
"""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from solov2_jax.io import InputError, printable, reason
from solov2_jax.weights.sources import sha256_of

log = logging.getLogger(__name__)

CARD = "README.md"
_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class HubName:
    """A repository, a file in it ("": to be chosen), a branch, tag or commit ("": main)."""

    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        file, revision = (
            f"/{self.file}" * bool(self.file),
            f"@{self.revision}" * bool(self.revision),
        )
        return f"hf:{self.repo}{file}{revision}"


def hub_library() -> ModuleType:
    """Returns huggingface_hub."""
    if os.environ.get("HF_ENDPOINT"):
        # Mirrors speak HTTP and LFS, not the hub's own storage protocol.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def download(wanted: HubName, file: str, shown: str) -> Path:
    """Returns a file of a repository, as it lies in the cache."""
    return Path(
        hub_library().hf_hub_download(
            wanted.repo,
            file,
            revision=wanted.revision or None,
            tqdm_class=_progress_class(f"{shown}: {file}"),
        )
    )


def list_files(wanted: HubName) -> tuple[list[str], str]:
    """Returns (the files of a repository, its licence).

    Without the network, they are those of the cache; the log says so.
    """
    hub = hub_library()
    try:
        info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision or None)
    except hub.errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return _list_cache(wanted, error)
    except (hub.errors.HTTPError, hub.errors.OfflineModeIsEnabled) as error:
        return _list_cache(wanted, error)
    licence = licence_of_data(info.card_data.to_dict() if info.card_data else {})
    return [s.rfilename for s in info.siblings or ()], licence


def _list_cache(wanted: HubName, error: Exception) -> tuple[list[str], str]:
    folder = (
        Path(hub_library().constants.HF_HUB_CACHE) / f"models--{wanted.repo.replace('/', '--')}"
    )
    revision = wanted.revision or "main"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    files = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
    if not files:
        raise error
    log.info("%s: the hub is not asked; taking what the cache has of %s", wanted, commit[:12])
    return files, ""


def missing_file() -> tuple[type[Exception], ...]:
    return (hub_library().errors.EntryNotFoundError,)


def commit_of(path: Path, file: str) -> str:
    """Returns the commit whose snapshot in the cache a file lies in."""
    return path.parents[file.count("/")].name


def address_of(repo: str) -> str:
    return f"{hub_library().constants.ENDPOINT}/{repo}"


def check_sum(path: Path, name: str) -> None:
    """Raises unless a large file is what the hub says: its name in the cache is its sum."""
    blob = Path(os.path.realpath(path))
    if re.fullmatch("[0-9a-f]{64}", blob.name) and (digest := sha256_of(str(blob))) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise InputError(
            f"{name}: {path.name} is damaged: its sha256 is {digest}, the hub says {blob.name}; it "
            "is removed from the cache, try again"
        )


def read_licence(wanted: HubName) -> str:
    """Returns the licence that a repository's model card gives, "" if none."""
    try:
        card = download(wanted, CARD, str(wanted)).read_text("utf-8", "replace")
    except missing_file():
        return ""
    return licence_of_data(card_data(card))


def card_data(card: str) -> dict[str, Any]:
    """Returns what stands between the --- lines of a model card, {} if that is no mapping."""
    front = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.{0,65536}?)\r?\n---", card, re.S)
    try:
        data = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, RecursionError) as error:
        log.warning("the model card's head is no YAML: %s", reason(error))
        return {}
    return data if isinstance(data, dict) else {}


def licence_of_data(data: dict[str, Any]) -> str:
    named = [data.get(key) for key in ("license", "license_name", "license_link")]
    words = [printable(value)[:120] for value in named if isinstance(value, str) and value]
    return words[0] + (f" ({', '.join(words[1:])})" if words[1:] else "") if words else ""


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the hub's library raises into one sentence.

    Args:
      name: what was asked for, for the message.
    """
    hub = hub_library()
    errors, place = hub.errors, hub.constants.ENDPOINT
    shown = printable(name)
    try:
        yield
        return
    except InputError:
        raise
    except errors.HFValidationError as error:
        raise InputError(f"{shown}: is no name of a repository; write hf:USER/REPO") from error
    except (errors.EntryNotFoundError, errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        cause = error
    except OSError as error:
        raise InputError(
            f"{shown}: {reason(error)} (cache: {hub.constants.HF_HUB_CACHE})"
        ) from error
    if isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if hub.constants.HF_HUB_OFFLINE and status is None:
        why = (
            "is not in the cache, and HF_HUB_OFFLINE is set; unset it once, or give the file "
            f"itself (cache: {hub.constants.HF_HUB_CACHE})"
        )
    elif isinstance(cause, errors.GatedRepoError):
        why = f"is gated: accept its terms at {place}, and set HF_TOKEN to a token of that account"
    elif isinstance(cause, errors.RevisionNotFoundError):
        why = "there is no such revision; give a branch, tag or commit of the repository"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        why = f"{place} has no such repository, or a private one: check the name, or set HF_TOKEN"
    elif isinstance(cause, errors.EntryNotFoundError) and status == 404:
        why = f"the repository has no such file ({_last_words(cause)})"
    elif status in (401, 403):
        why = f"{place} refuses access ({status}): set HF_TOKEN to a token that may use it"
    elif status is not None:
        why = f"{place} answers {status}; try again later, or give the file itself"
    else:
        why = (
            f"{place} cannot be reached ({reason(cause)}); check the network, or give a file that "
            "is here"
        )
    raise InputError(f"{shown}: {why}") from cause


def _last_words(error: BaseException) -> str:
    found = re.search(r"url:?\s*(\S+?)\.?(\s|$)", str(error))
    return printable(found[1] if found else reason(error))[:200]


def _progress_class(shown: str) -> Any:
    """Returns the class by which the hub's library shows a download's progress.

    On a terminal its own; else one that logs a line now and then.
    """
    hub_library()
    from huggingface_hub.utils import tqdm

    if sys.stderr.isatty():
        return None

    class Lines(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})
            self._lines = LogProgress(shown)
            self._done, self._size = kwargs.get("initial") or 0, kwargs.get("total")

        def update(self, n: Any = 1) -> None:
            self._done += int(n or 0)
            self._lines(self._done, self._size)

    return Lines


class LogProgress:
    """Logs how far a download is: when it starts, every few seconds, when it ends."""

    def __init__(self, shown: str):
        self._shown, self._last, self._began = shown, 0.0, time.monotonic()

    def __call__(self, done: int, size: int | None) -> None:
        now, ended = time.monotonic(), done == size
        if now - self._last < _EVERY and not ended:
            return
        self._last = now
        of = f" of {size / 1e6:.1f}" if size else ""
        rate = done / 1e6 / max(now - self._began, 1e-3)
        log.info("fetching %s: %.1f%s MB, %.1f MB/s", self._shown, done / 1e6, of, rate)
