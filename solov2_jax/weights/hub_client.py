"""The Hugging Face hub through its own library: files, licences, errors, progress.

huggingface_hub is imported on use. Its cache, tokens, mirrors and offline mode are those
of its environment variables.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from solov2_jax.io import InputError, printable, reason
from solov2_jax.progress import Progress
from solov2_jax.weights.sources import sha256_of

log = logging.getLogger(__name__)

CARD = "README.md"
_SMALL = 1 << 20  # bytes of a file whose download is not worth a line


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
    import huggingface_hub.utils.logging

    if not os.environ.get("HF_HUB_VERBOSITY"):  # what ends in an error is told in one
        huggingface_hub.utils.logging.set_verbosity_error()
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
    errors = hub.errors
    try:
        yield
        return
    except InputError:
        raise
    except errors.HFValidationError as error:
        cause, why = error, "is no name of a repository; write hf:USER/REPO"
    except (errors.EntryNotFoundError, errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        cause, why = error, _explain(error)
    except OSError as error:
        cause, why = error, f"{reason(error)} (cache: {hub.constants.HF_HUB_CACHE})"
    except (RuntimeError, ValueError) as error:  # of an upload; what happened is below it
        cause, why = error, reason(error.__cause__ or error)
    raise InputError(f"{printable(name)}: {why}") from cause


def _explain(cause: BaseException) -> str:
    """Returns what an error of the hub means, and the fix."""
    hub = hub_library()
    errors, place = hub.errors, hub.constants.ENDPOINT
    if isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if hub.constants.HF_HUB_OFFLINE and status is None:
        return (
            "is not in the cache, and HF_HUB_OFFLINE is set; unset it once, or give the file "
            f"itself (cache: {hub.constants.HF_HUB_CACHE})"
        )
    if isinstance(cause, errors.GatedRepoError):
        return f"is gated: accept its terms at {place}, and set HF_TOKEN to that account's token"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "there is no such revision; give a branch, tag or commit of the repository"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{place} has no such repository, or a private one: check the name, or set HF_TOKEN"
    if isinstance(cause, errors.EntryNotFoundError) and status == 404:
        return f"the repository has no such file ({_last_words(cause)})"
    if status in (401, 403):
        return f"{place} refuses access ({status}): set HF_TOKEN to a token that may use it"
    if status is not None:
        return f"{place} answers {status}; try again later, or give the file itself"
    return f"{place} cannot be reached ({reason(cause)}); check the network, or give a file"


def _last_words(error: BaseException) -> str:
    found = re.search(r"url:?\s*(\S+?)\.?(\s|$)", str(error))
    return printable(found[1] if found else reason(error))[:200]


def _progress_class(shown: str) -> Any:
    """Returns the class by which the hub's library tells how far a download is."""
    hub_library()
    from huggingface_hub.utils import tqdm

    class Shown(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})
            self._shown = DownloadProgress(shown)
            self._there, self._size = kwargs.get("initial") or 0, kwargs.get("total")

        def update(self, n: Any = 1) -> None:
            self._there += int(n or 0)
            self._shown(self._there, self._size)

        def close(self) -> None:
            if hasattr(self, "_shown"):
                self._shown.close()

    return Shown


class DownloadProgress:
    """Shows how far a download is: a bar in a terminal, else lines.

    Args:
      shown: what is fetched.
    """

    def __init__(self, shown: str):
        self._what = f"fetching {printable(shown)}"
        self._progress: Progress | None = None

    def __call__(self, there: int, size: int | None) -> None:
        if self._progress is None:
            total = size / 1e6 if size else None
            if size is None or size > _SMALL:
                log.info("%s%s", self._what, f", {total:.1f} MB" if total else "")
            self._progress = Progress(self._what, total, unit="MB").__enter__()
        self._progress.update(there / 1e6)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__()
            self._progress = None
