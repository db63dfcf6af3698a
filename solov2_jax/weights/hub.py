"""Weights by name -> a file here, and what is known about where it came from.

    timm/resnet50.a1_in1k                 a repository of timm's on the Hugging Face hub
    torchvision/resnet50, ...resnet50.V1  torchvision's weights, from timm's copies there
    hf:USER/REPO[/FILE][@REVISION]        any repository of models
    https://HOST/FILE[#sha256=HEX]        an address
    FILE                                  a file that is here; it wins over a name

Repositories come through huggingface_hub: its cache (`HF_HOME`), its tokens (`HF_TOKEN`),
its mirrors (`HF_ENDPOINT`), its offline mode (`HF_HUB_OFFLINE`). It is imported on use.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from solov2_jax.download import DownloadLimits, fetch, without_secrets
from solov2_jax.io import InputError, make_folder, printable, reason
from solov2_jax.weights.hub_client import (
    DownloadProgress,
    HubName,
    address_of,
    check_sum,
    commit_of,
    download,
    hub_errors,
    hub_library,
    list_files,
    missing_file,
    read_licence,
)
from solov2_jax.weights.sources import Weights, read_weights, sha256_of

log = logging.getLogger(__name__)

# timm holds copies of torchvision's files; the last is what torchvision's DEFAULT means.
TORCHVISION = {
    "resnet18": ("V1",),
    "resnet34": ("V1",),
    "resnet50": ("V1", "V2"),
    "resnet101": ("V1", "V2"),
    "resnet152": ("V1", "V2"),
}
_COPIES = {"V1": "tv_in1k", "V2": "tv2_in1k"}
# Files that hold weights, most wanted first; of a kind, the named one before any other.
_KINDS = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".pkl", ".ckpt", ".pdparams")
_USUAL = ("model.safetensors", "pytorch_model.bin")
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
_SHORT = ("timm/", "torchvision/")
_WEB = ("https://", "http://")
# torch.hub's convention: NAME-<first digits of the sha256>.pth.
_SUM_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
_MOST_BYTES, _MOST_SECONDS = 20 << 30, 24 * 3600.0


@dataclass(frozen=True)
class Origin:
    """Where weights came from, as init_from.json and a model card say it.

    Attributes:
      name: what the user wrote, without passwords.
      path: of the file here.
      address: of the repository or file, "" of a file that was here.
      revision: the commit.
      licence: as the source's model card gives it; "": it gives none.
    """

    name: str
    path: str
    address: str = ""
    revision: str = ""
    licence: str = ""

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))

    def summary(self) -> str:
        """Returns one line for the log."""
        at = f", revision {self.revision[:12]}" if self.revision else ""
        return f"{self.address}{at}; licence: {self.licence or 'none is stated; ask its authors'}"


def is_remote(name: str) -> bool:
    """Returns whether a name leads elsewhere; what exists here is taken from here."""
    if name.lower().startswith(("hf:", *_WEB)):
        return True
    return name.startswith(_SHORT) and not os.path.exists(name)


def local_path(name: str) -> str:
    """Returns the path that a name means which does not lead elsewhere."""
    return name.removeprefix("file://").removeprefix("file:")


def open_weights(name: str, *, key: str = "init_from", **options: Any) -> Weights:
    """Returns the weights of a file here or of a name, with their origin.

    Args:
      key: what holds the name, for messages.
      options: of `read_weights`.

    Raises:
      InputError: naming what is wrong and the fix.
    """
    if not is_remote(name):
        return read_weights(local_path(name), **options)
    origin = fetch_weights(name, key=key)
    weights = read_weights(origin.path, **options)
    if name.startswith("timm/"):
        weights.settings.update(_timm_settings(parse_name(name, key), origin))
    return replace(weights, path=origin.name, origin=origin.to_dict())


@functools.lru_cache(16)
def fetch_weights(name: str, *, key: str = "init_from") -> Origin:
    """Returns where the weights of a name are now, after fetching them if need be.

    A process asks once for a name.

    Raises:
      InputError: for an unknown repository, a closed one, no network, a damaged file.
    """
    if name.lower().startswith(_WEB):
        return _fetch_address(name, key)
    wanted = parse_name(name, key)
    log.info("%s: asking %s", name, hub_library().constants.ENDPOINT)
    origin = _fetch_file(wanted, name, key)
    log.info("%s: %s", name, origin.summary())
    return origin


@functools.lru_cache(16)
def fetch_folder(name: str, files: tuple[str, ...], optional: tuple[str, ...] = ()) -> Origin:
    """Returns where the files of a repository are now; `path` is their folder.

    Args:
      name: USER/REPO, with or without "hf:", and [@REVISION].
      optional: what it may lack.

    Raises:
      InputError: as `fetch_weights`, and for a missing file.
    """
    wanted = parse_name(name if name.startswith("hf:") else f"hf:{name}", name)
    if wanted.file:
        raise InputError(f"{name}: names a file; give the repository, hf:USER/REPO[@REVISION]")
    log.info("%s: asking %s", wanted, hub_library().constants.ENDPOINT)
    with hub_errors(str(wanted)):
        first = download(wanted, files[0], str(wanted))
        commit = commit_of(first, files[0])
        for file in (*files[1:], *optional):
            with contextlib.suppress(*(missing_file() if file in optional else ())):
                download(replace(wanted, revision=commit), file, str(wanted))
        licence = read_licence(replace(wanted, revision=commit))
    folder = str(first)[: -len(files[0])]
    origin = Origin(str(wanted), folder, address_of(wanted.repo), commit, licence)
    log.info("%s: %s", wanted, origin.summary())
    return origin


# --- Names ---------------------------------------------------------------------------


def parse_name(name: str, key: str = "init_from") -> HubName:
    """Returns the repository that a name means.

    Raises:
      InputError: for a name of another form.
    """
    if name.startswith("torchvision/"):
        return _torchvision(name, key)
    rest, at, revision = name.removeprefix("hf:").partition("@")
    parts = rest.split("/", 2)
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    steps = file.split("/") if file else []
    bad = any(step in ("", ".", "..") for step in steps) or (at and not revision)
    if not _REPO.fullmatch(repo) or ".." in repo or bad or not name.isprintable():
        raise InputError(
            f"{key}: {printable(name)[:120]!r} is no name of a repository; write "
            "hf:USER/REPO[/FILE][@REVISION], such as hf:timm/resnet50.a1_in1k"
        )
    return HubName(repo, file, revision)


def _torchvision(name: str, key: str) -> HubName:
    model, _, version = name.removeprefix("torchvision/").partition(".")
    version = version.removeprefix("IMAGENET1K_")
    versions = TORCHVISION.get(model, ())
    if not versions or version not in ("", "DEFAULT", *versions):
        known = [f"{m}.{v}" for m, each in TORCHVISION.items() for v in each]
        raise InputError(
            f"{key}: {printable(name)[:80]} is not known; there are torchvision/"
            f"{', '.join(known)} (without .V1 or .V2: the newest)"
        )
    version = versions[-1] if version in ("", "DEFAULT") else version
    repo = f"timm/{model}.{_COPIES[version]}"
    log.info("%s: IMAGENET1K_%s, by timm's copy hf:%s", name, version, repo)
    return HubName(repo)


def choose_file(files: Iterable[str], name: str) -> str:
    """Returns the file of a repository that holds its weights; the log says of which.

    Raises:
      InputError: if there is none, or several of which none has the usual name.
    """
    found = sorted(f for f in files if f.endswith(_KINDS))
    usual = [f for f in _USUAL if f in found]
    chosen: list[str] = []
    if "model.safetensors" in usual:
        chosen = usual[:1]
    for kind in () if chosen else _KINDS:
        of_kind = [f for f in found if f.endswith(kind)]
        if of_kind:
            chosen = [f for f in usual if f in of_kind] or of_kind
            break
    if not chosen:
        raise InputError(
            f"{name}: holds no weights file ({', '.join(_KINDS)}), only "
            f"{', '.join(map(printable, sorted(files)[:8])) or 'nothing'}"
        )
    if len(chosen) > 1:
        raise InputError(
            f"{name}: holds several weights files: {', '.join(map(printable, found[:12]))}; name "
            "one as hf:USER/REPO/FILE"
        )
    if len(found) > 1:
        others = ", ".join(printable(f) for f in found if f != chosen[0])
        log.info("%s: takes %s; there are also %s (hf:USER/REPO/FILE)", name, chosen[0], others)
    return chosen[0]


def _fetch_file(wanted: HubName, name: str, key: str) -> Origin:
    licence = ""
    with hub_errors(f"{key}: {name}"):
        if not wanted.file:
            files, licence = list_files(wanted)
            wanted = replace(wanted, file=choose_file(files, f"{key}: {name}"))
        path = download(wanted, wanted.file, name)
        check_sum(path, f"{key}: {name}")
        commit = commit_of(path, wanted.file)
        licence = read_licence(replace(wanted, revision=commit)) or licence
    return Origin(name, str(path), address_of(wanted.repo), commit, licence)


def _timm_settings(wanted: HubName, origin: Origin) -> dict[str, Any]:
    """Returns mean and std by timm's own config, {} where a repository has none."""
    with hub_errors(origin.name):
        try:
            path = download(replace(wanted, revision=origin.revision), "config.json", origin.name)
            config = json.loads(path.read_bytes())["pretrained_cfg"]
            values = {n: [round(255 * float(v), 4) for v in config[n]] for n in ("mean", "std")}
        except (*missing_file(), ValueError, KeyError, TypeError) as error:
            log.info("%s: no mean and std in a config.json: timm's usual ones", origin.name)
            log.debug("%s", reason(error))
            return {}
    return {f"input.{n}": v for n, v in values.items() if len(v) == 3}


# --- Addresses -----------------------------------------------------------------------


def _fetch_address(name: str, key: str) -> Origin:
    """Returns a file at an address, kept in the cache; an address is fetched once."""
    address, _, fragment = name.partition("#")
    shown = without_secrets(address)
    host = re.sub(r"(?i)^http://([^/@]*@)?", "", address).partition("/")[0].partition(":")[0]
    expected = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else ""
    if fragment and not re.fullmatch("[0-9a-f]{8,64}", expected):
        raise InputError(f"{key}: {shown}: after # only sha256=HEX may stand")
    if address.lower().startswith("http://") and not expected:
        if host not in ("localhost", "127.0.0.1"):
            raise InputError(f"{key}: {shown}: give https://, or add #sha256=HEX to the address")
    if match := _SUM_IN_NAME.search(re.split("[?#]", address)[0]):
        expected = expected or match[1]
    digest = hashlib.sha256(address.encode()).hexdigest()[:20]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = make_folder(Path(cache).expanduser() / "solov2_jax" / "weights" / digest)
    there = [p for p in folder.iterdir() if not p.name.startswith(".writing-")]
    if there:
        path = str(there[0])
        log.info("%s: was fetched before; it is %s", shown, path)
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(f"{key}: {shown}: was not fetched before, and HF_HUB_OFFLINE is set")
    else:
        limits = DownloadLimits(_MOST_BYTES, _MOST_SECONDS, size_flag="", time_flag="")
        show = DownloadProgress(shown)
        with contextlib.closing(show):
            path = fetch(address, str(folder), limits, key=f"{key}: ", progress=show)
    if expected and not (actual := sha256_of(path)).startswith(expected):
        if not there:
            os.unlink(path)
        fix = f"delete {path}" if there else "it is removed"
        raise InputError(
            f"{key}: {shown}: its sha256 is {actual}, expected {expected}: damaged, or another "
            f"file; {fix}, and try again"
        )
    return Origin(shown, path, shown)
