"""Reading a weights file of any source: container, names, implied settings.

Nothing in a file is ever executed, see `pickles.py`.
"""

import contextlib
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from solov2_jax.io import InputError, reading
from solov2_jax.weights import backbones, names, paddle_static, tables, torch_files
from solov2_jax.weights.array_files import WeightsError, read_npz, read_safetensors
from solov2_jax.weights.paddle_vars import MAGIC, read_tar
from solov2_jax.weights.pickles import RestrictedUnpickler
from solov2_jax.weights.settings import Settings, check_form, implied_settings
from solov2_jax.weights.state_dicts import NO_RULE, OURS, find_network

SOURCES = ("auto", *tables.TABLES, OURS)
_log = logging.getLogger(__name__)


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
    `origin`: where the file came from, see `hub.Origin`; {} where that is not known.
    """

    path: str
    sha256: str
    source: str
    flat: names.Flat
    settings: Settings
    dropped: tuple[tuple[str, str], ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the class layer has, None without one."""
        return self.settings.get("model.num_classes")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes when the file has them."""
        class_names = self.settings.get("class_names")
        return None if class_names is None else tuple(class_names)


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
    if has("solov2_head.", "backbone.res2.res2a.", "res2.res2a.", *paddle_static.MARKS):
        return "paddle"
    if has("ins_head.", "mask_head.convs_all_levels."):
        return "adelaidet"
    if has("mask_head.mask_feature_head.", "mask_feat_head.", "neck.", "backbone.l"):
        return "mmdet"
    if has("backbone.bottom_up.", "stem.conv1.", "res2_0_branch2a", "res2.0.conv1."):
        return "detectron2"
    if has("layer1.0.conv1."):
        # Nobody publishes torchvision's weights as .npz; the Keras/Caffe ones are.
        return "keras" if container == "npz" else "torchvision"
    for source, marks in backbones.MARKS.items():
        if has(*marks):
            return source
    raise ValueError(f"no known source has such tensor names: {names.shorten(tensors)}")


# Kinds of files, as messages name them.
_KINDS = {
    "npz": "an .npz archive",
    "safetensors": "a .safetensors file",
    "pickle": "a pickle of arrays (detectron2's .pkl, Paddle's .pdparams)",
    "tar": "a tar of PaddlePaddle's variables",
    "torch zip": "a PyTorch checkpoint",
    "old torch": "a PyTorch checkpoint",
}
# First bytes of files that are taken for weights by mistake, and what to do.
_MISTAKEN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file; Keras's .h5 files are not read: its names have no table here"),
    (b"\x93NUMPY", "a single array; save all of them by name with np.savez"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
)


def _container(path: str) -> str:
    """Returns the kind of file by its first bytes and, of a zip, its members.

    Raises InputError when it is none of `_KINDS`.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    # Its first bytes are a length, which may look like any other format's first byte.
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= os.path.getsize(path):
        return "safetensors"
    if start.startswith(b"PK"):
        with reading(path, "a zip archive (.pth, .npz)", "Truncated? Fetch it again"):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        is_torch = any(name.endswith("data.pkl") for name in members)
        return "torch zip" if is_torch else "npz"
    if start.startswith(b"\x80"):
        magic = torch_files.MAGIC.to_bytes(10, "little")
        return "old torch" if magic in start[:16] else "pickle"
    if start[MAGIC[0] :].startswith(MAGIC[1]):
        return "tar"
    if start[8:9] == b"{" and start[:1] not in b"<{":
        why = f"a header of {length} bytes: more than the file has; truncated?"
    else:
        why = _what_it_is(start)
    raise InputError(
        f"{path}: cannot be read as weights ({why}). Known are PyTorch checkpoints, "
        "detectron2's and Paddle's pickles, Paddle's tars, .npz and .safetensors"
    )


def _what_it_is(start: bytes) -> str:
    """Returns what a file that holds no weights looks like."""
    if not start:
        return "not a weights file: it is empty"
    for magic, what in _MISTAKEN:
        if start.startswith(magic):
            return what
    if re.match(rb"\s*<(!doctype|html|\?xml|head)", start, re.IGNORECASE):
        return "not a weights file but a web page; fetch the file that it links to"
    if not any(byte < 9 for byte in start):
        return f"not a weights file but text: {start[:40].decode('utf-8', 'replace')!r}"
    return "not a weights file known here: truncated, or another format"


def _is_tensor(value: Any) -> bool:
    pickled = isinstance(value, torch_files.PickledArray) and value.value is not None
    return pickled or isinstance(value, torch_files.StoredTensor | np.ndarray)


def _without_names(content: Any) -> Any:
    """Returns a checkpoint with arrays where Paddle has (name, array)."""
    if not isinstance(content, dict):
        return content

    def plain(value: Any) -> Any:
        named = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
        return value[1] if named and isinstance(value[1], torch_files.PickledArray) else value

    return {key: plain(value) for key, value in content.items()}


def _read_container(path: str, container: str, prefix: str) -> Contents:
    metadata: Mapping[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if container == "npz":
            content = read_npz(path)
        elif container == "safetensors":
            content, metadata = read_safetensors(path)
        elif container == "tar":
            content = read_tar(path)
        elif container == "pickle":
            with open(path, "rb") as stream:
                unpickler = RestrictedUnpickler(torch_files.ARRAY_SYMBOLS)
                content = _without_names(unpickler.load(stream, os.path.getsize(path)))
        else:
            is_zip = container == "torch zip"
            opener = torch_files.open_zip if is_zip else torch_files.open_legacy
            file = stack.enter_context(opener(path))
            content = file.content
        network = find_network(content, _is_tensor, prefix)
        tensors: dict[str, np.ndarray] = {}
        for name, value in network.tensors.items():
            if isinstance(value, torch_files.StoredTensor):
                value = file.array(value)
            tensors[name] = getattr(value, "value", value)  # of a PickledArray
    return Contents(container, tensors, network.dropped, metadata or network.metadata)


def read_contents(path: str, prefix: str = "") -> Contents:
    """Returns the network's tensors that the file holds, under its own names.

    Args:
      prefix: chooses one of several networks, see `state_dicts`.

    Raises InputError when it is no readable weights file.
    """
    container = _container(path)
    kind = _KINDS[container]
    with reading(path, kind, "Truncated? Fetch it again"):
        try:
            return _read_container(path, container, prefix)
        except WeightsError as error:
            raise InputError(f"{path}: cannot be read as {kind} ({error})") from error


def _as_float32(flat: names.Flat) -> names.Flat:
    """Returns the leaves as float32; ValueError naming all that are no such numbers."""
    kinds = [leaf for leaf, value in flat.items() if value.dtype.kind != "f"]
    if kinds:
        raise ValueError(f"integer weights: {names.shorten(kinds)}")
    with np.errstate(over="ignore"):  # becomes infinity, refused below
        flat = {leaf: np.asarray(value, np.float32) for leaf, value in flat.items()}
    bad = [leaf for leaf, value in flat.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"NaN or infinity in {names.shorten(bad)}")
    return flat


def _named(contents: Contents, source: str) -> tuple[names.Flat, list[tuple[str, str]]]:
    """Returns (leaves, dropped tensors) of a foreign source's tensors."""
    table = tables.table_of(source, contents.tensors)
    flat, rest = names.from_names(table, contents.tensors)
    return flat, [(n, names.drop_reason(table, n) or NO_RULE) for n in rest]


def _name_weights(path: str, digest: str, contents: Contents, source: str) -> Weights:
    """Returns the file's tensors as leaves; their settings are what it implies."""
    backbones.check_relatives(source, contents.tensors, "/".join(path.split(os.sep)[-4:]))
    if source == OURS:
        flat, dropped = contents.tensors, []
    else:
        flat, dropped = _named(contents, source)
    if not flat:
        raise ValueError(
            f"none of its tensors has a name of source {source}: {names.shorten(contents.tensors)}"
        )
    flat = _as_float32(flat)
    settings = implied_settings(source, flat, contents.tensors, contents.metadata)
    return Weights(path, digest, source, flat, settings, (*dropped, *contents.dropped))


def read_weights(
    path: str,
    source: str = "auto",
    *,
    sha256: str = "",
    settings: Settings | None = None,
    prefix: str = "",
) -> Weights:
    """Returns the file's weights under our names, nothing in it executed.

    Args:
      path: the file.
      source: one of `SOURCES`; "auto" tells by the tensors' names.
      sha256: the file must have this checksum, when given; its first 8 digits, which
        many file names end with, suffice.
      settings: replaces what the source's conventions imply.
      prefix: the network to take from a file with several, such as "student".

    Raises InputError naming the file and what is wrong with it.
    """
    if source not in SOURCES:
        raise InputError(f"source {source!r} is none of {', '.join(SOURCES)}")
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder, not a weights file; give the file in it")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such weights file")
    with reading(path, "weights"):
        digest = sha256_of(path)
        if sha256 and (len(sha256) < 8 or not digest.startswith(sha256.lower())):
            raise InputError(f"{path}: its sha256 is {digest}, expected {sha256}")
        try:
            contents = read_contents(path, prefix)
            if source == "auto":
                source = detect_source(contents.tensors, contents.container)
                _log.info("%s: %s file with %s names", path, contents.container, source)
            weights = _name_weights(path, digest, contents, source)
            weights.settings.update(check_form(settings or {}))
            return weights
        except InputError:
            raise
        except ValueError as error:  # what its names, numbers or settings lack
            raise InputError(f"{path}: {error}") from error
