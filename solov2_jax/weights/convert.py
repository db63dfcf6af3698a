"""Putting weights into the network's variables, and the report of what went where.

Weights against a whole config: the network it describes, and its settings."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from solov2_jax.models import build_model
from solov2_jax.stored import variable_shapes
from solov2_jax.weights.array_files import write_safetensors, write_torch
from solov2_jax.weights.backbones import backbone_of
from solov2_jax.weights.names import Flat, shorten
from solov2_jax.weights.settings import check_settings, depth_of
from solov2_jax.weights.sources import Weights
from solov2_jax.weights.state_dicts import NO_RULE, OURS
from solov2_jax.weights.tables import to_adelaidet, to_mmdet

_log = logging.getLogger(__name__)
_STEM = "params/backbone/stem/conv1/kernel"
_CLASS_LAYER = "params/ins_head/cate_pred/"
# Heads that a config may leave out, which then need no weights; others' last layers.
_OPTIONAL = ("params/semantic_head/", "params/keypoint_head/", "params/ins_head/keypoint_pred/")
_SEMANTIC_LAYER = "params/semantic_head/logits/"
# What ends a backbone's results: no ImageNet classifier has it.
_OUT = tuple(f"params/backbone/{name}" for name in ("out_ln", "pyramid", "ln_pyramid"))


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
    origin: Mapping[str, Any] = field(default_factory=dict)  # see `hub.Origin`

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON data, for the workdir's metadata."""
        dropped = [list(pair) for pair in self.dropped]
        return {**vars(self), "loaded": len(self.loaded), "new": list(self.new), "dropped": dropped}

    def summary(self) -> str:
        """Returns a few lines for the log."""
        lines = [
            f"{self.path} ({self.source}, sha256 {self.sha256[:12] or 'none'}): "
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


def report_of(weights: Weights) -> Report:
    """Returns the report of weights that no network was given for."""
    return Report(
        path=weights.path,
        sha256=weights.sha256,
        source=weights.source,
        settings=weights.settings,
        loaded=tuple(weights.flat),
        new=(),
        dropped=weights.dropped,
        origin=dict(weights.origin),
    )


def _groups(leaves: tuple[str, ...]) -> list[str]:
    """Returns "ins_head/cate_pred (2)" for the leaves below it, in order."""
    counts = Counter("/".join(leaf.split("/")[1:3]) for leaf in leaves)
    return [f"{group} ({count})" for group, count in counts.items()]


def _partly_new(report: Report) -> Counter[str]:
    """Returns the parts of the network that were loaded with holes, and how many."""
    parts = {leaf.split("/")[1] for leaf in report.loaded}
    holes = (leaf for leaf in report.new if not leaf.startswith((_CLASS_LAYER, *_OUT)))
    return Counter(part for leaf in holes if (part := leaf.split("/")[1]) in parts)


def _mismatches(flat: Flat, targets: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf of the file that does not fit the network."""
    wrong = []
    for leaf, value in flat.items():
        if leaf not in targets:
            wrong.append(f"{leaf} {value.shape} is not in the network")
        elif value.shape != tuple(targets[leaf].shape):
            wrong.append(f"{leaf} is {value.shape}, the network's {tuple(targets[leaf].shape)}")
    return wrong


def _other_classes(flat: Flat, targets: Mapping[str, Any]) -> bool:
    """Whether the file's class layer differs from the network's in its classes."""
    shapes = [
        (value.shape, tuple(targets[leaf].shape))
        for leaf, value in flat.items()
        if leaf.startswith(_CLASS_LAYER) and leaf in targets
    ]
    return any(a[:-1] == b[:-1] and a != b for a, b in shapes)


def adapt_stem(weights: Weights, flat: Flat, targets: Mapping[str, Any]) -> None:
    """Makes the first convolution of RGB weights one of the network's channels, in `flat`.

    One channel gets the sum of the three: a grey picture gives what it gives as RGB. With C
    channels, channel i gets the weights of red, green, blue in turn, times 3 / C.
    Source: timm's `adapt_input_conv`.
    """
    kernel = flat.get(_STEM)
    if kernel is None or _STEM not in targets or kernel.ndim != 4 or kernel.shape[2] != 3:
        return
    channels = targets[_STEM].shape[2]
    if channels == 3:
        return
    if weights.settings.get("input.channel_order") == "BGR":
        kernel = kernel[:, :, ::-1]
    if channels == 1:
        flat[_STEM], how = kernel.sum(axis=2, keepdims=True), "their sum"
    else:
        repeated = kernel[:, :, np.arange(channels) % 3]
        flat[_STEM] = repeated * np.float32(3 / channels)
        how = f"red, green, blue in turn, times 3 / {channels}"
    _log.info(
        "%s: the stem's RGB weights become those of %d channel(s): %s", weights.path, channels, how
    )


def _refuse_misfits(weights: Weights, flat: Flat, targets: Mapping[str, Any]) -> None:
    """Raises ValueError naming all that keeps the leaves from being put in."""
    kinds = backbone_of(flat), backbone_of(targets)
    if kinds[0] and kinds[0] != kinds[1]:
        raise ValueError(
            f"{weights.path} holds a backbone {kinds[0]}, the network has another: set "
            f"model.backbone.name={kinds[0]}, and none of its options"
        )
    depths = depth_of(flat), depth_of(targets)
    if depths[0] and kinds[1]:
        raise ValueError(
            f"{weights.path} holds a ResNet-{depths[0]}, the network's backbone is {kinds[1]}: set "
            "model.backbone.name=resnet, or give weights of its own"
        )
    if None not in depths and depths[0] != depths[1]:
        raise ValueError(
            f"{weights.path} holds a ResNet-{depths[0]}, the network is a "
            f"ResNet-{depths[1]}: set model.backbone.depth"
        )
    if _STEM in flat and _STEM in targets and flat[_STEM].shape[2:3] != targets[_STEM].shape[2:3]:
        raise ValueError(
            f"{weights.path} is for pictures of {flat[_STEM].shape[2]} channels, the network "
            f"for {targets[_STEM].shape[2]}: set data.channels"
        )
    wrong = _mismatches(flat, targets)
    if wrong:
        raise ValueError(
            f"{weights.path}: {len(wrong)} tensors do not fit the network (see "
            f"model.ins_head, model.mask_head, model.num_classes): {shorten(wrong, 20)}"
        )
    if not flat:
        raise ValueError(f"{weights.path}: none of its tensors fits the network")


def match(
    weights: Weights, variables: Mapping[str, Any], *, strict: bool = False
) -> tuple[Flat, Report]:
    """Returns (leaves of the file that fit the network, report), see `fit`."""
    targets: dict[str, Any] = {**flatten_dict(variables, sep="/")}
    flat, dropped = dict(weights.flat), []
    if not strict and _other_classes(flat, targets):
        for leaf in [leaf for leaf in flat if leaf.startswith(_CLASS_LAYER)]:
            classes = flat.pop(leaf).shape[-1]
            dropped.append((leaf, f"class layer of {classes} classes"))
    for leaf in [leaf for leaf in flat if leaf.startswith(_OPTIONAL)]:
        fits = leaf in targets and flat[leaf].shape == tuple(targets[leaf].shape)
        if leaf not in targets or (not strict and not fits and leaf.startswith(_SEMANTIC_LAYER)):
            del flat[leaf]
            dropped.append((leaf, "the network has no such head or another number of classes"))
    if not strict:
        adapt_stem(weights, flat, targets)
    _refuse_misfits(weights, flat, targets)
    new = tuple(leaf for leaf in targets if leaf not in flat)
    dropped = (*weights.dropped, *dropped)
    unknown = [name for name, reason in dropped if reason == NO_RULE]
    if strict and (new or unknown):
        raise ValueError(
            f"{weights.path}: strict loading, but the file lacks "
            f"[{shorten(new)}] and has unknown tensors [{shorten(unknown)}]"
        )
    report = replace(report_of(weights), loaded=tuple(flat), new=new, dropped=dropped)
    return flat, report


def fit(
    weights: Weights,
    variables: Mapping[str, Any],
    *,
    strict: bool = False,
    init: Callable[[Sequence[str]], Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], Report]:
    """Returns (variables with the weights put in, report).

    Args:
      weights: as `read_weights` returns them.
      variables: {"params", "batch_stats"}, nested dicts of arrays, or of
        ShapeDtypeStructs with `init` given. Leaves that are loaded come back as numpy
        arrays of the leaf's type, the others as they are.
      strict: refuse weights that leave a leaf unfilled or a tensor without a rule.
        Otherwise a class layer for another number of classes is left out.
      init: leaves that stay unfilled -> {leaf: initialised array}; called once, if
        there are any.

    Raises ValueError with all shape mismatches at once.
    """
    flat, report = match(weights, variables, strict=strict)
    _log.info("%s", report.summary())
    for group, count in _partly_new(report).items():
        _log.warning("%s: %d leaves of %s are missing", weights.path, count, group)
    targets: dict[str, Any] = {**flatten_dict(variables, sep="/")}
    loaded = {n: np.array(v, targets[n].dtype, order="C") for n, v in flat.items()}
    if report.new and not hasattr(targets[report.new[0]], "__array__"):
        if init is None:
            raise ValueError(f"{weights.path} lacks {shorten(report.new)}: pass `init`")
        targets.update(init(report.new))
    return unflatten_dict({**targets, **loaded}, sep="/"), report


def save_weights(path: str, flat: Flat, settings: Mapping[str, Any], program: str = "") -> None:
    """Writes leaves as .safetensors, or as another program's .pth, with their settings.

    Args:
      program: "mmdet": whose names a .pth has; else AdelaiDet's.
    """
    text = {OURS: json.dumps(dict(settings))}
    if path.endswith(".safetensors"):
        leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
        write_safetensors(path, leaves, text)
    elif path.endswith(".pth") and program == "mmdet":
        state = to_mmdet(flat, bool(settings.get("model.backbone.avg_down")))
        write_torch(path, state, text, key="state_dict")
    elif path.endswith(".pth"):
        write_torch(path, to_adelaidet(flat), text)
    else:
        raise ValueError(f"{path}: write to a .safetensors file (another program's: .pth)")


def network_shapes(config: Any, num_classes: int) -> dict[str, Any]:
    """Returns the variables' shapes of the network that the config describes."""
    return variable_shapes(build_model(config, num_classes), config.data.channels)


def check_network(config: Any, weights: Weights, strict: bool = False) -> tuple[Flat, Report]:
    """Returns (leaves that fit the config's network, report); nothing is computed.

    With `model.num_classes` 0 the network has the weights' classes.
    """
    check_settings(weights.settings, config, weights.path)
    classes = config.model.num_classes or weights.num_classes or 1
    return match(weights, network_shapes(config, classes), strict=strict)
