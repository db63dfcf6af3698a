"""Reading a weights file of any source: container, names, implied settings."""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from solov2_jax.weights import names
from solov2_jax.weights.npz import read_npz
from solov2_jax.weights.safetensors import read_safetensors
from solov2_jax.weights.settings import Settings, implied_settings

OURS = "solov2_jax"
SOURCES = ("auto", *names.TABLES, OURS)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A weights file under our names.

    `flat`: leaves ("params/...", "batch_stats/...") as the file's values, HWIO.
    `dropped`: (tensor or entry of the file, reason why it is not loaded).
    """

    path: str
    sha256: str
    source: str
    flat: names.Flat
    settings: Settings
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the class layer has, None without one."""
        return self.settings.get("model.num_classes")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes when the file has them."""
        found = self.settings.get("class_names")
        return None if found is None else tuple(found)


def sha256_of(path: str) -> str:
    """Returns the file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def detect_source(tensors: Mapping[str, np.ndarray], container: str) -> str:
    """Returns the source by the tensors' names; ValueError when no table knows them."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    if has("params/"):
        return OURS
    if has("ins_head.", "mask_head.convs_all_levels."):
        return "adelaidet"
    if has("mask_head.mask_feature_head.", "neck.", "backbone.layer1."):
        return "mmdet"
    if has("backbone.bottom_up.", "stem.conv1.", "res2_0_branch2a", "res2.0.conv1."):
        return "detectron2"
    if has("layer1.0.conv1."):
        # Nobody publishes torchvision's weights as .npz; the Keras/Caffe ones are.
        return "keras" if container == "npz" else "torchvision"
    raise ValueError(f"no known source has such tensor names: {names.shorten(tensors)}")


def _container(path: str) -> str:
    """Returns "npz" or "safetensors" by the file's first bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"PK"):
        return "npz"
    if start[8:9] == b"{":
        return "safetensors"
    raise ValueError("not a weights file that is known here (by its first bytes)")


def _read(path: str, source: str) -> Weights:
    container, metadata = _container(path), {}
    if container == "npz":
        tensors = read_npz(path)
    else:
        tensors, metadata = read_safetensors(path)
    found = detect_source(tensors, container) if source == "auto" else source
    _log.info("%s: %s names in a %s file", path, found, container)
    if found == OURS:
        settings = json.loads(metadata.get("settings", "{}"))
        return Weights(path, sha256_of(path), found, tensors, settings)
    table = names.TABLES[found]
    flat, rest = names.from_names(table, tensors)
    unknown = f"the {found} table has no rule for it"
    dropped = tuple((n, names.drop_reason(table, n) or unknown) for n in rest)
    settings = implied_settings(found, {n: a.shape for n, a in flat.items()})
    return Weights(path, sha256_of(path), found, flat, settings, dropped)


def read_weights(path: str, source: str = "auto") -> Weights:
    """Returns the file's weights under our names, nothing in it executed.

    Raises ValueError naming the file and what is wrong with it.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such weights file")
    try:
        return _read(path, source)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error
