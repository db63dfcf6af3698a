"""Reading a weights file of any source: container, names, implied settings.

Nothing in a file is ever executed, see `formats/pickles.py`.
"""

import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from solov2_jax.weights import names
from solov2_jax.weights.formats import arrays, pickles, torch
from solov2_jax.weights.formats.npz import read_npz
from solov2_jax.weights.formats.safetensors import read_safetensors
from solov2_jax.weights.settings import Settings, check_form, implied_settings

OURS = "solov2_jax"
SOURCES = ("auto", *names.TABLES, OURS)
NO_RULE = "no rule for this name"
_log = logging.getLogger(__name__)

_STATES = ("model", "state_dict", "model_state_dict", "blobs")
_EXTRAS = (
    (OURS, "read as settings"),
    (r".*optim.*|adamw?|sgd", "optimiser state"),
    (r".*ema.*|.*average.*", "moving average (EMA) of the weights"),
    (r".*sched.*", "learning-rate schedule"),
    (r"iteration|epoch|step|message_hub|meta|args|scaler|amp.*|loops?", "run state"),
)
_DEFORMABLE = re.compile(r".*(conv\d?_offset|\.offset)(\.|_|$).*")


@dataclass(frozen=True)
class Contents:
    """What a file holds, under its own names."""

    container: str
    tensors: dict[str, np.ndarray]
    dropped: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """A weights file under our names.

    `flat`: float32 leaves ("params/...", "batch_stats/..."), kernels HWIO.
    `dropped`: (tensor or entry of the file, reason why it is not loaded).
    """

    path: str
    sha256: str
    source: str
    flat: names.Flat
    settings: Settings
    dropped: tuple[tuple[str, str], ...] = ()

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
    if has("mask_head.mask_feature_head.", "mask_feat_head.", "neck.", "backbone.l"):
        return "mmdet"
    if has("backbone.bottom_up.", "stem.conv1.", "res2_0_branch2a", "res2.0.conv1."):
        return "detectron2"
    if has("layer1.0.conv1."):
        # Nobody publishes torchvision's weights as .npz; the Keras/Caffe ones are.
        return "keras" if container == "npz" else "torchvision"
    raise ValueError(f"no known source has such tensor names: {names.shorten(tensors)}")


def _container(path: str) -> str:
    """Returns the kind of file by its first bytes and, of a zip, its members."""
    with open(path, "rb") as file:
        start = file.read(16)
    # Its first bytes are a length, which may look like any other format's first byte.
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= os.path.getsize(path):
        return "safetensors"
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        is_torch = any(name.endswith("data.pkl") for name in members)
        return "torch zip" if is_torch else "npz"
    if start.startswith(b"\x80"):
        magic = torch.MAGIC.to_bytes(10, "little")
        return "old torch" if magic in start else "pickle"
    if start[8:9] == b"{":
        raise ValueError(f"a header of {length} bytes: more than the file has")
    if start.startswith(b"\x89HDF"):
        raise ValueError("an HDF5 file; save the weights as .npz or .safetensors")
    raise ValueError(
        "not a weights file known here: neither a PyTorch checkpoint, a detectron2 "
        "pickle, .npz nor .safetensors (truncated, or a web page saved as weights?)"
    )


def _unwrap(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (state dict, the checkpoint's other entries)."""
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a dict of tensors")
    for key in _STATES:
        if isinstance(content.get(key), dict):
            return content[key], {k: v for k, v in content.items() if k != key}
    return content, {}


def _why_extra(key: str) -> str:
    for pattern, reason in _EXTRAS:
        if re.fullmatch(pattern, key, re.IGNORECASE):
            return reason
    return "not part of the weights"


def _from_pickle(container: str, content: Any, file: torch.TorchFile | None) -> Contents:
    """Returns the tensors of a checkpoint's object."""
    state, others = _unwrap(content)
    tensors: dict[str, np.ndarray] = {}
    dropped = [(str(key), _why_extra(str(key))) for key in others]
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"a tensor name of type {type(name).__name__}")
        if isinstance(value, torch.Tensor) and file is not None:
            tensors[name] = file.array(value)
        elif isinstance(value, arrays.Array) and value.value is not None:
            tensors[name] = value.value
        else:
            dropped.append((name, "not a tensor"))
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {n.removeprefix(prefix): a for n, a in tensors.items()}
    return Contents(container, tensors, tuple(dropped), others)


def read_contents(path: str) -> Contents:
    """Returns what the file holds; ValueError when it is no readable weights file."""
    container = _container(path)
    if container == "npz":
        return Contents(container, read_npz(path))
    if container == "safetensors":
        tensors, metadata = read_safetensors(path)
        return Contents(container, tensors, (), metadata)
    if container == "pickle":
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            content = pickles.Machine(arrays.SYMBOLS, budget=2 * size).load(stream, size)
        return _from_pickle(container, content, None)
    opener = torch.open_zip if container == "torch zip" else torch.open_legacy
    with opener(path) as file:
        return _from_pickle(container, file.content, file)


def _as_float32(flat: names.Flat) -> names.Flat:
    """Returns the leaves as float32; ValueError naming all that are no such numbers."""
    kinds = [leaf for leaf, value in flat.items() if value.dtype.kind != "f"]
    if kinds:
        raise ValueError(f"weights that are integers: {names.shorten(kinds)}")
    with np.errstate(over="ignore"):  # becomes infinity, refused below
        flat = {leaf: np.asarray(value, np.float32) for leaf, value in flat.items()}
    bad = [leaf for leaf, value in flat.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"NaN or infinity in {names.shorten(bad)}")
    return flat


def _named(contents: Contents, source: str) -> tuple[names.Flat, list[tuple[str, str]]]:
    """Returns (leaves, dropped tensors) of a foreign source's tensors."""
    deformable = [name for name in contents.tensors if _DEFORMABLE.fullmatch(name)]
    if deformable:
        raise ValueError(
            "these weights have deformable convolutions, which this network has not: "
            + names.shorten(deformable)
        )
    table = names.TABLES[source]
    flat, rest = names.from_names(table, contents.tensors)
    return flat, [(n, names.drop_reason(table, n) or NO_RULE) for n in rest]


def _read(path: str, source: str, digest: str, override: Settings) -> Weights:
    contents = read_contents(path)
    found = source
    if source == "auto":
        found = detect_source(contents.tensors, contents.container)
        _log.info("%s: %s file with %s names", path, contents.container, found)
    if found == OURS:
        flat, dropped = contents.tensors, []
    else:
        flat, dropped = _named(contents, found)
    if not flat:
        raise ValueError(
            f"none of its tensors has a name of source {found}: {names.shorten(contents.tensors)}"
        )
    flat = _as_float32(flat)
    settings = implied_settings(found, flat, contents.tensors, contents.metadata)
    settings.update(check_form(override))
    return Weights(path, digest, found, flat, settings, (*dropped, *contents.dropped))


def read_weights(
    path: str,
    source: str = "auto",
    *,
    sha256: str = "",
    settings: Settings | None = None,
) -> Weights:
    """Returns the file's weights under our names, nothing in it executed.

    Args:
      path: the file.
      source: one of `SOURCES`; "auto" tells by the tensors' names.
      sha256: the file must have this checksum, when given; its first 8 digits, which
        many file names end with, suffice.
      settings: replaces what the source's conventions imply.

    Raises ValueError naming the file and what is wrong with it.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is none of {', '.join(SOURCES)}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such weights file")
    try:
        digest = sha256_of(path)
        if sha256 and (len(sha256) < 8 or not digest.startswith(sha256.lower())):
            raise ValueError(f"its sha256 is {digest}, expected {sha256}")
        return _read(path, source, digest, settings or {})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error
