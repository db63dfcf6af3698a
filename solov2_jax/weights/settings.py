"""The settings that weights imply, and the check of a config against them.

Settings are a flat dict from config key ("input.channel_order") to a plain JSON value,
besides "norm_eps" and "class_names", which no config key holds.
They come, later ones first, from: the file's own words, the shapes of the weights, the
conventions of the program that trained them.
"""

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.config import flatten
from solov2_jax.config_schema import set_below
from solov2_jax.weights.backbones import TABLES, backbone_of
from solov2_jax.weights.names import NORM_EPS
from solov2_jax.weights.state_dicts import OURS
from solov2_jax.weights.tables import has_avg_down

Settings = dict[str, Any]
_log = logging.getLogger(__name__)

_BGR: Settings = {
    "input.channel_order": "BGR",
    "input.mean": [103.53, 116.28, 123.675],
    "input.std": [1.0, 1.0, 1.0],
    "model.backbone.stride_in_1x1": True,
}
_RGB: Settings = {
    "input.channel_order": "RGB",
    "input.mean": [123.675, 116.28, 103.53],
    "input.std": [58.395, 57.12, 57.375],
    "model.backbone.stride_in_1x1": False,
}
_RGB_ONLY = {key: value for key, value in _RGB.items() if key.startswith("input.")}
CONVENTIONS: dict[str, Settings] = {
    **dict.fromkeys(TABLES, _RGB_ONLY),
    "adelaidet": _BGR,
    "detectron2": _BGR,
    "keras": {**_BGR, "input.mean": [103.939, 116.779, 123.68]},
    "mmdet": _RGB,
    "torchvision": _RGB,
    "timm": _RGB,
    "paddle": _RGB,
    OURS: {},
}
# Lineages give the same data set's mean with up to 0.5 grey levels of difference.
_TOLERANCE = {"input.mean": 1.0, "input.std": 0.5}
# What `train.py` takes over from the weights where nobody asked for another value.
ADOPTED = (*_BGR, "model.backbone.norm")
# Another number of classes means a fresh class layer, not a contradiction.
_FREE = ("model.num_classes",)
# What the network always is.
NETWORK: Settings = {"norm_eps": NORM_EPS}

# Every setting there is, with a value of its form.
_FORMS: Settings = {
    **_BGR,
    **NETWORK,
    "class_names": ["person"],
    "model.backbone.name": "resnet",
    "deformable": False,  # of files from before there were deformable convolutions
    "model.backbone.depth": 50,
    "model.backbone.groups": 1,
    "model.backbone.width_per_group": 64,
    "model.backbone.deep_stem": False,
    "model.backbone.avg_down": False,
    "model.dcn.stages": [3, 4, 5],
    "model.dcn.towers": "none",
    "model.dcn.mask_head": False,
    "model.dcn.version": 2,
    "model.dcn.groups": 1,
    "model.dcn.head_bias": False,
    "model.fpn.norm": "none",
    "model.ins_head.norm": "gn",
    "model.mask_head.norm": "gn",
    "model.backbone.norm": "frozen_bn",
    "model.fpn.channels": 256,
    "model.num_classes": 80,
    "model.ins_head.num_convs": 4,
    "model.ins_head.channels": 512,
    "model.ins_head.num_kernels": 256,
    "model.mask_head.channels": 128,
}

_ANY_LENGTH = ("class_names", "model.dcn.stages")

_BLOCKS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def depth_of(leaves: Mapping[str, Any]) -> int | None:
    """Returns the ResNet's depth by its blocks, None when there is no such ResNet."""
    blocks: dict[str, int] = {}  # stage -> number of blocks
    bottleneck = False
    for leaf in leaves:
        matched = re.match(r"params/backbone/res(\d)_(\d{1,4})/(\w+)/kernel", leaf)
        if matched:
            stage, block, layer = matched.groups()
            blocks[stage] = max(blocks.get(stage, 0), int(block) + 1)
            bottleneck |= layer == "conv3"
    counts = tuple(blocks.get(stage, 0) for stage in "2345")
    return _BLOCKS.get((bottleneck, counts))


def _settings_of_backbone(flat: Mapping[str, np.ndarray]) -> Settings:
    settings: Settings = {}
    depth = depth_of(flat)
    if depth is not None:
        settings["model.backbone.depth"] = depth
    elif name := backbone_of(flat):
        settings["model.backbone.name"] = name
    if "params/backbone/stem/conv2/kernel" in flat:
        settings["model.backbone.deep_stem"] = True
    middle = flat.get("params/backbone/res2_0/conv2/kernel")
    if depth not in (None, 18, 34) and middle is not None and middle.ndim == 4:
        groups = max(middle.shape[3] // max(middle.shape[2], 1), 1)
        if groups > 1:
            settings["model.backbone.groups"] = groups
            settings["model.backbone.width_per_group"] = middle.shape[2]
    return settings


def _settings_of_dcn(flat: Mapping[str, np.ndarray]) -> Settings:
    """Returns the settings of deformable convolutions, {} where there are none.

    18 or 27 channels of a 3x3's offsets are version 1 or 2 with one group. A multiple of
    both is taken for version 2, in which 3 groups of version 1 look like 2.
    """
    offsets = [leaf for leaf in flat if leaf.endswith("/offset/bias")]
    if not offsets:
        return {}
    settings: Settings = {"model.dcn.stages": []}
    for leaf in offsets:
        kernel = flat.get(leaf.replace("bias", "kernel"))
        if kernel is None or kernel.ndim != 4:
            continue
        taps, channels = kernel.shape[0] * kernel.shape[1], kernel.shape[3]
        version = 2 if channels % (3 * taps) == 0 else 1
        settings["model.dcn.version"] = version
        settings["model.dcn.groups"] = channels // ((version + 1) * taps)
    stages = {int(m[1]) for leaf in offsets if (m := re.match(r"params/backbone/res(\d)_", leaf))}
    settings["model.dcn.stages"] = sorted(stages)
    tower = "params/ins_head/cate_tower/conv"
    towers = {leaf for leaf in offsets if leaf.startswith(tower)}
    if any(leaf.startswith(tower) for leaf in flat):
        number = sum(1 for n in flat if re.match(rf"{tower}\d+/kernel", n))
        settings["model.dcn.towers"] = "none" if not towers else "last"
        if towers and len(towers) == number:
            settings["model.dcn.towers"] = "all"
        level = "params/mask_head/level0/conv0"
        settings["model.dcn.mask_head"] = f"{level}/offset/bias" in flat
        deformed = [leaf.replace("/offset/bias", "/bias") for leaf in towers]
        deformed += [f"{level}/bias"] * settings["model.dcn.mask_head"]
        settings["model.dcn.head_bias"] = any(leaf in flat for leaf in deformed)
    return settings


def settings_of_shapes(flat: Mapping[str, np.ndarray]) -> Settings:
    """Returns the settings that the leaves' names and shapes tell by themselves."""
    settings = {**_settings_of_backbone(flat), **_settings_of_dcn(flat)}
    if "params/fpn/lateral2/kernel" in flat:
        norm = "sync_bn" if "batch_stats/fpn/lateral2/norm/mean" in flat else "gn"
        has_norm = "params/fpn/lateral2/norm/scale" in flat
        settings["model.fpn.norm"] = norm if has_norm else "none"
    for head, first, norm in (
        ("ins_head", "cate_tower/conv0/kernel", "cate_tower/gn0/scale"),
        ("mask_head", "level0/conv0/kernel", "level0/gn0/scale"),
    ):
        if f"params/{head}/{first}" in flat:
            found = f"params/{head}/{norm}" in flat
            settings[f"model.{head}.norm"] = "gn" if found else "none"
    if "params/backbone/stem/conv1/norm/scale" in flat:
        frozen = "batch_stats/backbone/stem/conv1/norm/mean" in flat
        settings["model.backbone.norm"] = "frozen_bn" if frozen else "gn"
    tower = [n for n in flat if re.match(r"params/ins_head/cate_tower/conv\d+/kernel", n)]
    if tower:
        settings["model.ins_head.num_convs"] = len(tower)
    for key, leaf in {
        "model.fpn.channels": "params/fpn/output2/kernel",
        "model.num_classes": "params/ins_head/cate_pred/kernel",
        "model.ins_head.num_kernels": "params/ins_head/kernel_pred/kernel",
        "model.ins_head.channels": "params/ins_head/cate_tower/conv0/kernel",
        "model.mask_head.channels": "params/mask_head/level0/conv0/kernel",
    }.items():
        if leaf in flat and flat[leaf].ndim == 4:
            settings[key] = flat[leaf].shape[-1]
    return settings


def check_form(settings: Any) -> Settings:
    """Returns the settings when they are a dict of known keys and fitting values."""
    if not isinstance(settings, dict):
        raise ValueError("its settings are not a JSON object")
    for key, value in settings.items():
        if key not in _FORMS:
            raise ValueError(f"setting {key!r} is none of {', '.join(sorted(_FORMS))}")
        form = _FORMS[key]
        if isinstance(form, list):
            kinds = str if isinstance(form[0], str) else int | float
            fits = isinstance(value, list) and all(isinstance(v, kinds) for v in value)
            # Means and deviations are as many as the channels.
            any_number = key == "class_names" or key in _TOLERANCE and value
            fits = fits and (any_number or len(value) == len(form))
        else:
            fits = type(value) is type(form)
        if not fits:
            raise ValueError(f"setting {key} = {str(value)[:60]} should be like {form}")
    return settings


def _numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d*)?", text)]


def _mmdet_settings(metadata: Mapping[str, Any]) -> Settings:
    """Returns what an mmdetection checkpoint's `meta` says: classes, and of its config
    text the values that stand there once, or always alike."""
    meta = metadata.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    nested = meta.get("dataset_meta")
    groups = [meta, nested if isinstance(nested, dict) else {}]
    settings: Settings = {}
    for group in groups:
        classes = group.get("CLASSES", group.get("classes"))
        if isinstance(classes, list | tuple):
            settings["class_names"] = list(classes)
    text = meta.get("config", meta.get("cfg"))
    text = text if isinstance(text, str) else ""

    def only(pattern: str) -> str | None:
        values = set(re.findall(pattern, text))
        return values.pop() if len(values) == 1 else None

    triple = r"=\s*[\[(]([^\])]*)[\])]"
    for key, name in (("input.mean", "mean"), ("input.std", "std")):
        value = _numbers(only(rf"\b{name}{triple}") or "")
        if len(value) == 3:
            settings[key] = value
    order = only(r"\b(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)")
    if order is not None:
        settings["input.channel_order"] = "RGB" if order == "True" else "BGR"
    style = only(r"\bstyle\s*=\s*['\"](caffe|pytorch)['\"]")
    if style is not None:
        settings["model.backbone.stride_in_1x1"] = style == "caffe"
    return settings


def _file_settings(
    source: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> Settings:
    """Returns what the file says about itself."""
    own = metadata.get("solov2_jax")
    if own is not None:
        try:
            return check_form(json.loads(own))
        except (TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"its settings are not JSON ({error})") from error
    settings = _mmdet_settings(metadata) if source == "mmdet" else {}
    if metadata.get("__author__") == "torchvision":  # detectron2's converted weights
        settings.update(_RGB)
    for key, name in (("input.mean", "pixel_mean"), ("input.std", "pixel_std")):
        if name in tensors and tensors[name].size == 3:
            settings[key] = [round(float(n), 4) for n in tensors[name].ravel()]
    return check_form(settings)


def implied_settings(
    source: str,
    flat: Mapping[str, np.ndarray],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> Settings:
    """Returns what the source, the weights' shapes and the file itself imply.

    Args:
      flat: our leaves.
      tensors, metadata: what the file holds, under its own names.
    """
    settings = {
        **CONVENTIONS[source],
        **NETWORK,
        **_file_settings(source, tensors, metadata),
        **settings_of_shapes(flat),
    }
    if source != OURS and "params/backbone/res3_0/shortcut/kernel" in flat:
        settings.setdefault("model.backbone.avg_down", has_avg_down(tensors))
    drop_needless(settings)
    stem = flat.get("params/backbone/stem/conv1/kernel")
    channels = stem.shape[2] if stem is not None and stem.ndim == 4 else None
    for key in _TOLERANCE:
        number = len(settings.get(key, (0,)))
        if channels and number not in (1, 3, channels):
            raise ValueError(f"its {key} has {number} entries for {channels} channels")
    classes, names = settings.get("model.num_classes"), settings.get("class_names")
    if names is not None and classes is not None and len(names) != classes:
        raise ValueError(f"it names {len(names)} classes and has weights for {classes}")
    return settings


def drop_needless(settings: Settings) -> None:
    """Removes, in place, what means nothing for the network: basic blocks (ResNet-18
    and 34) and other backbones have no 1x1 convolution that could have the stride."""
    if settings.get("model.backbone.depth") in (18, 34) or "model.backbone.name" in settings:
        settings.pop("model.backbone.stride_in_1x1", None)


def settings_of_config(config: Any) -> Settings:
    """Returns the settings under which a config's weights were trained."""
    settings = dict(NETWORK)
    for key in (*_BGR, "model.backbone.avg_down"):
        value = _lookup(config, key)
        settings[key] = list(value) if isinstance(value, tuple) else value
    return settings


def parse_setting(text: str) -> tuple[str, Any]:
    """Returns (key, value) of "input.channel_order=RGB"; values are JSON or words."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"setting {text!r} is not of the form KEY=VALUE")
    value = value.strip()
    value = {"True": "true", "False": "false"}.get(value, value)
    if value.startswith("("):
        value = "[" + value.strip("()").rstrip(", ") + "]"
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _agree(key: str, configured: Any, implied: Any) -> bool:
    if isinstance(implied, list | tuple) and isinstance(configured, list | tuple):
        tolerance = _TOLERANCE.get(key, 0.0)
        if len(configured) != len(implied):  # other channels have statistics of their own
            return key in _TOLERANCE
        return bool(np.allclose(configured, implied, rtol=0.0, atol=tolerance))
    # Frozen or trained, a batch norm has the same weights.
    norms = ("frozen_bn", "sync_bn")
    return configured == implied or (configured in norms and implied in norms)


def adopt_settings(settings: Settings, config: Any, given: Collection[str], path: str) -> str:
    """Sets the config's keys that weights imply and nobody asked to have otherwise.

    Returns a line about what was set, "" if nothing was.

    Args:
      given: keys on the command line; they and those of `init_from_ignores` stay.
      path: of the weights.
    """
    known, kept = flatten(config), {*given, *config.init_from_ignores}
    free = [k for k in ADOPTED if k in settings and k not in kept]
    values = {k: settings[k] for k in free if not _agree(k, known[k], settings[k])}
    with config.unlocked():
        for key, value in values.items():
            set_below(config, key, tuple(value) if isinstance(value, list) else value)
    shown = ", ".join(f"{key} = {_lookup(config, key)}" for key in values)
    return f"set: {shown}: as the weights {path} were trained" if values else ""


def check_settings(settings: Settings, config: Any, path: str, ignored: Sequence[str] = ()) -> None:
    """Raises ValueError naming every config key that contradicts the settings.

    Args:
      ignored: keys that may; the log tells.
    """
    wrong = []
    for key, value in settings.items():
        if key in NETWORK and value != NETWORK[key]:
            wrong.append(f"{key} is {NETWORK[key]} in the network, {value} in the file")
        if "." not in key or key in _FREE:
            continue
        configured = _lookup(config, key)
        if not _agree(key, configured, value):
            value = tuple(value) if isinstance(value, list) else value
            difference = f"{key} is {configured} in the config, {value} in the file"
            if key in ignored:
                _log.warning("%s: contradicted on purpose: %s", path, difference)
            else:
                wrong.append(difference)
    if wrong:
        raise ValueError(
            f"{path}: the weights contradict the config: " + "; ".join(wrong) + ". "
            "Set the config's keys to the file's values, or, if the weights were "
            "trained otherwise than their format suggests, convert them with "
            "convert.py --setting KEY=VALUE. To contradict them on purpose, give the keys on "
            "train.py's command line, or name them in init_from_ignores"
        )
