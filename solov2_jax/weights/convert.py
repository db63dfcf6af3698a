"""Putting weights into the network's variables, and the report of what went where."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from solov2_jax.weights.names import Flat, shorten
from solov2_jax.weights.safetensors import write_safetensors
from solov2_jax.weights.settings import check_config
from solov2_jax.weights.sources import OURS, Weights, read_weights

_log = logging.getLogger(__name__)
_CLASS_LAYER = "params/ins_head/cate_pred/"


@dataclass(frozen=True)
class Report:
    """What was loaded: every leaf and every tensor of the file is in one list."""

    path: str
    sha256: str
    source: str
    settings: dict[str, Any]
    loaded: tuple[str, ...]
    new: tuple[str, ...]  # leaves newly initialised
    dropped: tuple[tuple[str, str], ...]  # (tensor, reason)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON data, for the workdir's metadata."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "source": self.source,
            "settings": self.settings,
            "loaded": len(self.loaded),
            "new": list(self.new),
            "dropped": [list(pair) for pair in self.dropped],
        }

    def summary(self) -> str:
        """Returns a few lines for the log."""
        lines = [
            f"{self.path} ({self.source}, sha256 {self.sha256[:12]}...): "
            f"{len(self.loaded)} leaves loaded, {len(self.new)} newly initialised, "
            f"{len(self.dropped)} tensors not used"
        ]
        if self.new:
            lines.append(f"  newly initialised: {shorten(_groups(self.new), 12)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped:
            reasons.setdefault(reason, []).append(name)
        for reason, dropped in reasons.items():
            lines.append(f"  not used ({reason}): {shorten(dropped, 4)}")
        return "\n".join(lines)


def _groups(leaves: tuple[str, ...]) -> list[str]:
    """Returns "ins_head/cate_pred (2)" for the leaves below it, in order."""
    counts: dict[str, int] = {}
    for leaf in leaves:
        group = "/".join(leaf.split("/")[1:3])
        counts[group] = counts.get(group, 0) + 1
    return [f"{group} ({count})" for group, count in counts.items()]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) of a nested dict, paths joined by "/"."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of flat paths, inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _mismatches(flat: Flat, targets: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf of the file that does not fit the network."""
    wrong = []
    for leaf, value in flat.items():
        if leaf not in targets:
            wrong.append(f"{leaf} {value.shape} is not in the network")
        elif value.shape != tuple(targets[leaf].shape):
            wrong.append(
                f"{leaf} is {value.shape}, the network's {tuple(targets[leaf].shape)}"
            )
    return wrong


def _other_classes(flat: Flat, targets: Mapping[str, Any]) -> bool:
    """Whether the file's class layer differs from the network's in its classes."""
    for leaf, value in flat.items():
        if leaf.startswith(_CLASS_LAYER) and leaf in targets:
            shape = tuple(targets[leaf].shape)
            if value.shape[:-1] == shape[:-1] and value.shape != shape:
                return True
    return False


def fit(
    weights: Weights,
    variables: Mapping[str, Any],
    *,
    strict: bool = False,
    init: Callable[[], Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], Report]:
    """Returns (variables with the weights put in, report).

    Args:
      weights: as `read_weights` returns them.
      variables: {"params", "batch_stats"}, nested dicts of arrays, or of
        ShapeDtypeStructs with `init` given. Leaves that are loaded come back as numpy
        arrays of the leaf's type, the others as they are.
      strict: refuse weights that leave a leaf unfilled or a tensor without a rule.
        Otherwise a class layer for another number of classes is left out.
      init: returns initialised variables; called once, when a leaf stays unfilled.

    Raises ValueError with all shape mismatches at once.
    """
    targets, flat, dropped = dict(flatten(variables)), dict(weights.flat), []
    if not strict and _other_classes(flat, targets):
        for leaf in [leaf for leaf in flat if leaf.startswith(_CLASS_LAYER)]:
            classes = flat.pop(leaf).shape[-1]
            dropped.append((leaf, f"class layer of {classes} classes"))
    wrong = _mismatches(flat, targets)
    if wrong:
        raise ValueError(
            f"{weights.path}: {len(wrong)} tensors do not fit the network "
            f"(another depth, head or number of classes?): {shorten(wrong, 20)}"
        )
    bad = [leaf for leaf, value in flat.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"{weights.path}: NaN or infinity in {shorten(bad)}")
    if not flat:
        raise ValueError(f"{weights.path}: no tensor of it fits the network")
    new = tuple(leaf for leaf in targets if leaf not in flat)
    if strict and new:
        raise ValueError(
            f"{weights.path}: strict loading, but the file lacks {shorten(new)}"
        )
    result = targets
    if new and not hasattr(targets[new[0]], "__array__"):
        if init is None:
            raise ValueError(f"{weights.path} lacks {shorten(new)}: pass `init`")
        result = dict(flatten(init()))
    loaded = {n: np.array(v, targets[n].dtype, order="C") for n, v in flat.items()}
    report = Report(
        weights.path,
        weights.sha256,
        weights.source,
        weights.settings,
        tuple(loaded),
        new,
        (*weights.dropped, *dropped),
    )
    _log.info("%s", report.summary())
    return unflatten({**result, **loaded}), report


def load_weights(
    path: str,
    variables: Mapping[str, Any],
    *,
    strict: bool = False,
    source: str = "auto",
    config: Any = None,
    init: Callable[[], Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], Report]:
    """Returns (variables with the file's weights put in, report), see `fit`.

    With a `config`, its keys are checked against the settings that the weights imply
    (channel order, mean, std, stride placement, depth, head sizes).
    """
    weights = read_weights(path, source)
    if config is not None:
        check_config(weights.settings, config, path)
    return fit(weights, variables, strict=strict, init=init)


def save_weights(
    path: str, variables: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Writes variables as .safetensors with the settings in its metadata."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten(variables)}
    metadata = {"format": OURS, "version": "1", "settings": json.dumps(dict(settings))}
    write_safetensors(path, flat, metadata)
