"""Names of other backbones' tensors than ResNet's, and which backbone leaves are.

One table for each family: the programs that publish its weights name them so differently
that no name means two things in one family. See `names` for the form of the tables.
"""

import re
from collections.abc import Mapping
from typing import Any

from solov2_jax.weights import names
from solov2_jax.weights.names import COUNTER, Drop, NameTable, Rule, group_norm

_CLASSIFIER = Drop(r"(head|classifier|norm|pre_logits)\..*", "ImageNet classifier, not used")


def _conv(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/backbone/{target}/kernel", "kernel"),
        Rule(f"{source}.bias", f"params/backbone/{target}/bias"),
    )


def _dense(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/backbone/{target}/kernel", "matrix"),
        Rule(f"{source}.bias", f"params/backbone/{target}/bias"),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return group_norm(source, f"backbone/{target}")


def _convnext(
    *,
    stem: tuple[str, str],
    down: Mapping[int, str],
    block: Mapping[int, str],
    layers: tuple[str, str, str, str],
    gamma: str,
) -> tuple[Rule, ...]:
    """Returns the rules of one program's ConvNeXt.

    Args:
      stem: convolution and norm.
      down, block: prefixes of what is before a stage and in it, by the stage.
      layers: in a block: depthwise convolution, norm, the two layers.
      gamma: in a block.
    """
    rules = [*_conv(stem[0], "stem/conv1"), *_norm(stem[1], "stem/ln")]
    for stage, prefix in down.items():
        rules += _norm(f"{prefix}.0", f"res{stage}_down/ln")
        rules += _conv(f"{prefix}.1", f"res{stage}_down/conv")
    for stage, prefix in block.items():
        target = f"res{stage}_{{i}}"
        rules += _conv(f"{prefix}.{layers[0]}", f"{target}/dw")
        rules += _norm(f"{prefix}.{layers[1]}", f"{target}/ln")
        rules += _dense(f"{prefix}.{layers[2]}", f"{target}/fc1")
        rules += _dense(f"{prefix}.{layers[3]}", f"{target}/fc2")
        rules.append(Rule(f"{prefix}.{gamma}", f"params/backbone/{target}/gamma", "vector"))
    return tuple(rules)


_STAGES, _DOWN = (2, 3, 4, 5), (3, 4, 5)
CONVNEXT = NameTable(
    (
        *_convnext(  # timm/models/convnext.py
            stem=("stem.0", "stem.1"),
            down={s: f"stages.{s - 2}.downsample" for s in _DOWN},
            block={s: f"stages.{s - 2}.blocks.{{i}}" for s in _STAGES},
            layers=("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
            gamma="gamma",
        ),
        *_convnext(  # torchvision/models/convnext.py
            stem=("features.0.0", "features.0.1"),
            down={s: f"features.{2 * s - 4}" for s in _DOWN},
            block={s: f"features.{2 * s - 3}.{{i}}" for s in _STAGES},
            layers=("block.0", "block.2", "block.3", "block.5"),
            gamma="layer_scale",
        ),
        *_convnext(  # facebookresearch/ConvNeXt, models/convnext.py
            stem=("downsample_layers.0.0", "downsample_layers.0.1"),
            down={s: f"downsample_layers.{s - 2}" for s in _DOWN},
            block={s: f"stages.{s - 2}.{{i}}" for s in _STAGES},
            layers=("dwconv", "norm", "pwconv1", "pwconv2"),
            gamma="gamma",
        ),
    ),
    (COUNTER, _CLASSIFIER),
)

TABLES: dict[str, NameTable] = {"convnext": CONVNEXT}
# Names that tell a family, of the tensors of each program.
MARKS: dict[str, tuple[str, ...]] = {
    "convnext": ("stages.0.blocks.0.conv_dw.", "features.1.0.layer_scale", "stages.0.0.dwconv."),
}

# (family's leaf, blocks of each stage, channels of the stem) of the backbones by name.
_KNOWN: dict[tuple[str, tuple[int, ...], int], str] = {
    ("gamma", (3, 3, 9, 3), 96): "convnext_t",
    ("gamma", (3, 3, 27, 3), 96): "convnext_s",
}
# Weights of timm's on the Hugging Face hub by the backbone's name.
_PUBLISHED = {
    "convnext_t": "convnext_tiny.fb_in22k_ft_in1k",
    "convnext_s": "convnext_small.fb_in22k_ft_in1k",
}


def backbone_of(leaves: Mapping[str, Any]) -> str | None:
    """Returns the name of a backbone other than ResNet by its leaves, None if it is another."""
    blocks: dict[str, int] = {}
    kinds: set[str] = set()
    for leaf in leaves:
        matched = re.match(r"params/backbone/res(\d)_(\d{1,4})/(\w+)", leaf)
        if matched:
            stage, block, kind = matched.groups()
            blocks[stage] = max(blocks.get(stage, 0), int(block) + 1)
            kinds.add(kind)
    stem = leaves.get("params/backbone/stem/conv1/kernel")
    if stem is None or len(stem.shape) != 4:
        return None
    counts = tuple(blocks.get(stage, 0) for stage in "2345")
    found = (_KNOWN.get((kind, counts, stem.shape[-1])) for kind in sorted(kinds))
    return next(filter(None, found), None)


def suggest_weights(backbone: Any) -> str:
    """Returns the flag that starts from weights which fit `config.model.backbone`."""
    name = backbone.name
    weights = f"resnet{backbone.depth}.a1_in1k" if name == "resnet" else _PUBLISHED.get(name)
    return f"--config.init_from={f'timm/{weights}' if weights else 'FILE, weights of your own'}"


def is_known(name: str) -> bool:
    """Returns whether any table, or our own naming, has a rule for a tensor's name."""
    tables = (*names.TABLES.values(), *TABLES.values())
    known = any(names.targets_of(table, name) for table in tables)
    return known or name.startswith(("params/", "batch_stats/"))
