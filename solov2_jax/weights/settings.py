"""The settings that weights imply, and the check of a config against them.

Settings are a flat dict from config key ("input.channel_order") to a plain value,
plus "norm_eps" and "class_names", which no config key holds.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from solov2_jax.weights.names import NORM_EPS

Settings = dict[str, Any]

# Caffe lineage: the reference's own means.
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
CONVENTIONS: dict[str, Settings] = {
    "adelaidet": _BGR,
    "detectron2": _BGR,
    "keras": {**_BGR, "input.mean": [103.939, 116.779, 123.68]},
    "mmdet": _RGB,
    "torchvision": _RGB,
    "timm": _RGB,
}
# Lineages disagree by up to 0.5 grey levels on the same data set's mean.
_TOLERANCE = {"input.mean": 1.0, "input.std": 0.5}
# Another number of classes is a fresh class layer, not a contradiction.
_FREE = ("model.num_classes",)
_ELSEWHERE = ("norm_eps", "norm", "class_names")

_BLOCKS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def depth_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Returns the ResNet's depth by its blocks, None when there is no such ResNet."""
    blocks: dict[str, int] = {}  # stage -> number of blocks
    bottleneck = False
    for leaf in shapes:
        found = re.match(r"params/backbone/res(\d)_(\d+)/(\w+)/kernel", leaf)
        if found:
            blocks[found[1]] = max(blocks.get(found[1], 0), int(found[2]) + 1)
            bottleneck |= found[3] == "conv3"
    counts = tuple(blocks.get(stage, 0) for stage in "2345")
    return _BLOCKS.get((bottleneck, counts))


def settings_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Settings:
    """Returns the settings that the leaves' names and shapes tell by themselves."""
    settings: Settings = {}
    depth = depth_of(shapes)
    if depth is not None:
        settings["model.backbone.depth"] = depth
    tower = [n for n in shapes if re.match(r"params/ins_head/cate_tower/conv\d", n)]
    if tower:
        settings["model.ins_head.num_convs"] = len(tower)
    for key, leaf in {
        "model.fpn.channels": "params/fpn/output2/kernel",
        "model.num_classes": "params/ins_head/cate_pred/kernel",
        "model.ins_head.num_kernels": "params/ins_head/kernel_pred/kernel",
        "model.ins_head.channels": "params/ins_head/cate_tower/conv0/kernel",
        "model.mask_head.channels": "params/mask_head/level0/conv0/kernel",
    }.items():
        if len(shapes.get(leaf, ())) == 4:
            settings[key] = shapes[leaf][-1]
    return settings


def implied_settings(source: str, shapes: Mapping[str, tuple[int, ...]]) -> Settings:
    """Returns what the source's conventions and the leaves' shapes imply."""
    settings = {**CONVENTIONS[source], **settings_of_shapes(shapes)}
    if settings.get("model.backbone.depth") in (18, 34):
        del settings["model.backbone.stride_in_1x1"]  # basic blocks have no 1x1
    return {**settings, "norm": "frozen batch norm", "norm_eps": NORM_EPS}


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _agree(key: str, ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return False
        tolerance = _TOLERANCE.get(key, 0.0)
        return bool(np.allclose(ours, theirs, rtol=0.0, atol=tolerance))
    return ours == theirs


def check_config(settings: Settings, config: Any, path: str) -> None:
    """Raises ValueError naming every config key that contradicts the settings."""
    wrong = []
    for key, value in settings.items():
        if key in _ELSEWHERE or key in _FREE:
            continue
        ours = _lookup(config, key)
        if not _agree(key, ours, value):
            value = tuple(value) if isinstance(value, list) else value
            wrong.append(f"{key} is {ours} in the config, {value} in the file")
    if wrong:
        raise ValueError(
            f"{path}: the weights contradict the config: " + "; ".join(wrong) + ". "
            "Set the config's keys to the file's values, or, if the weights were "
            "trained otherwise than their format suggests, convert them with "
            "convert.py --setting KEY=VALUE"
        )
