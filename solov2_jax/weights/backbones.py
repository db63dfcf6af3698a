"""Names of other backbones' tensors than ResNet's, and which backbone leaves are.

One table for each family: the programs that publish its weights name them so differently
that no name means two things in one family. See `names` for the form of the tables.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

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


def _units(units: Mapping[str, tuple[str, str]], eps: str) -> tuple[Rule, ...]:
    """Returns the rules of (convolution, batch norm) by our name; `eps`: of variances."""
    rules: list[Rule] = []
    for target, (conv, norm) in units.items():
        leaf = f"backbone/{target}"
        rules.append(Rule(f"{conv}.weight", f"params/{leaf}/kernel", "kernel"))
        rules += group_norm(norm, f"{leaf}/norm")
        rules.append(Rule(f"{norm}.running_mean", f"batch_stats/{leaf}/norm/mean"))
        rules.append(Rule(f"{norm}.running_var", f"batch_stats/{leaf}/norm/var", eps))
    return tuple(rules)


_MOBILE_DEPTHS = {2: 2, 3: 3, 4: 6, 5: 3}
# Blocks of MobileNetV3-large in the order of torchvision's, and of timm's stages.
MOBILE_BLOCKS = (
    "stem/block",
    *(f"res{s}_{i}" for s, n in _MOBILE_DEPTHS.items() for i in range(n)),
)
_MOBILE_TIMM = tuple((s, i) for s, n in enumerate((1, 2, 3, 4, 2, 3)) for i in range(n))
MOBILE_EXCITED = (3, 4, 5, 10, 11, 12, 13, 14)


def _mobilenet() -> tuple[Rule, ...]:
    """Source: torchvision/models/mobilenetv3.py; timm/models/mobilenetv3.py."""
    units = {"stem/conv1": ("features.0.0", "features.0.1")}
    timm = {"stem/conv1": ("conv_stem", "bn1")}
    rules: list[Rule] = []
    for n, target in enumerate(MOBILE_BLOCKS):
        names_here = ["expand", "dw", *["se"] * (n in MOBILE_EXCITED), "project"][n == 0 :]
        stage, block = _MOBILE_TIMM[n]
        of_timm = f"blocks.{stage}.{block}"
        layers = ("conv_dw", "conv_pw") if n == 0 else ("conv_pw", "conv_dw", "conv_pwl")
        for j, unit in enumerate(names_here):
            here = f"features.{n + 1}.block.{j}"
            if unit != "se":
                units[f"{target}/{unit}"] = (f"{here}.0", f"{here}.1")
                continue
            for mine, theirs in (("reduce", "fc1"), ("expand", "fc2")):
                rules += _excitation(f"{here}.{theirs}", f"{target}/se/{mine}")
                rules += _excitation(f"{of_timm}.se.conv_{mine}", f"{target}/se/{mine}")
        for j, unit in enumerate(unit for unit in names_here if unit != "se"):
            timm[f"{target}/{unit}"] = (f"{of_timm}.{layers[j]}", f"{of_timm}.bn{j + 1}")
    return (*rules, *_units(units, "eps_1e-3"), *_units(timm, "same"))


def _excitation(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a 1x1 convolution [D, C, 1, 1] that is a dense layer here."""
    return (
        Rule(f"{source}.weight", f"params/backbone/{target}/kernel", "pixel"),
        Rule(f"{source}.bias", f"params/backbone/{target}/bias"),
    )


def _thirds(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of queries, keys and values that the source has in one layer."""
    rules = []
    for i, name in enumerate("qkv"):
        for theirs, mine in (("weight", "kernel"), ("bias", "bias")):
            leaf = f"params/backbone/{target}/{name}/{mine}"
            rules.append(Rule(f"{source}.{theirs}", leaf, f"third{i}"))
    return tuple(rules)


def _swin_block(prefix: str, target: str, layers: tuple[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of a block; `layers`: its last two."""
    table = f"{prefix}.attn.relative_position_bias_table"
    return (
        *_norm(f"{prefix}.norm1", f"{target}/ln1"),
        *_thirds(f"{prefix}.attn.qkv", f"{target}/attn"),
        *_dense(f"{prefix}.attn.proj", f"{target}/attn/proj"),
        Rule(table, f"params/backbone/{target}/attn/table"),
        *_norm(f"{prefix}.norm2", f"{target}/ln2"),
        *_dense(f"{prefix}.{layers[0]}", f"{target}/fc1"),
        *_dense(f"{prefix}.{layers[1]}", f"{target}/fc2"),
    )


def _merging(prefix: str, target: str) -> tuple[Rule, ...]:
    kernel = Rule(f"{prefix}.reduction.weight", f"params/backbone/{target}/fc/kernel", "matrix")
    return (*_norm(f"{prefix}.norm", f"{target}/ln"), kernel)


def _swin(late: bool) -> NameTable:
    """Returns the names of Swin transformers.

    Source: torchvision/models/swin_transformer.py; timm's; microsoft/Swin-Transformer, where
    what merges patches ends a stage (`late`), while in timm it begins the next.
    """
    rules: list[Rule] = []
    for stem in (("features.0.0", "features.0.2"), ("patch_embed.proj", "patch_embed.norm")):
        rules += [*_conv(stem[0], "stem/conv1"), *_norm(stem[1], "stem/ln")]
    for s in _STAGES:
        target = f"res{s}_{{i}}"
        rules += _swin_block(f"features.{2 * s - 3}.{{i}}", target, ("mlp.0", "mlp.3"))
        rules += _swin_block(f"layers.{s - 2}.blocks.{{i}}", target, ("mlp.fc1", "mlp.fc2"))
    for s in _DOWN:
        rules += _merging(f"features.{2 * s - 4}", f"res{s}_down")
        rules += _merging(f"layers.{s - 2 - late}.downsample", f"res{s}_down")
    buffers = Drop(r".*\.(relative_position_index|attn_mask)", "made again, not learned")
    return NameTable(tuple(rules), (COUNTER, buffers, _CLASSIFIER))


SWIN, SWIN_LATE = _swin(late=False), _swin(late=True)


def _dinov2() -> tuple[Rule, ...]:
    """Source: facebookresearch/dinov2, vision_transformer.py, and timm, whose names are the
    same; transformers' Dinov2Model, the names of facebook/dinov2-small."""
    stem, block = "params/backbone/stem", "block_{i}"
    rules: list[Rule] = []
    for cls, position, patches in (
        ("cls_token", "pos_embed", "patch_embed.proj"),
        (
            "embeddings.cls_token",
            "embeddings.position_embeddings",
            "embeddings.patch_embeddings.projection",
        ),
    ):
        rules += [Rule(cls, f"{stem}/cls", "rows"), Rule(position, f"{stem}/position", "rows")]
        rules += _conv(patches, "stem/conv1")
    rules += [*_norm("norm", "ln"), *_norm("layernorm", "ln")]
    plain, hub = "blocks.{i}", "encoder.layer.{i}"
    rules += _thirds(f"{plain}.attn.qkv", block)
    for name, layer in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += _dense(f"{hub}.attention.attention.{layer}", f"{block}/{name}")
    rules += _dense(f"{plain}.attn.proj", f"{block}/proj")
    rules += _dense(f"{hub}.attention.output.dense", f"{block}/proj")
    for prefix in (plain, hub):
        for n in (1, 2):
            rules += _norm(f"{prefix}.norm{n}", f"{block}/ln{n}")
            rules += _dense(f"{prefix}.mlp.fc{n}", f"{block}/fc{n}")
    for n in (1, 2):
        gamma = f"params/backbone/{block}/gamma{n}"
        rules.append(Rule(f"{plain}.ls{n}.gamma", gamma))
        rules.append(Rule(f"{hub}.layer_scale{n}.lambda1", gamma))
    return tuple(rules)


_MASK_TOKEN = Drop(r"(embeddings\.)?mask_token", "of the pretraining, not used")
DINOV2 = NameTable(
    _dinov2(), (COUNTER, _MASK_TOKEN, Drop(r"(head|classifier)\..*", "classifier, not used"))
)

_LAST_CONV = Drop(
    r"(features\.16|blocks\.6|conv_head|classifier|norm_head)\..*",
    "ImageNet classifier and the 1x1 convolution before it, not used",
)
MOBILENET = NameTable(_mobilenet(), (COUNTER, _LAST_CONV))

TABLES: dict[str, NameTable] = {
    "convnext": CONVNEXT,
    "mobilenet": MOBILENET,
    "swin": SWIN,
    "dinov2": DINOV2,
}
# Names that tell a family, of the tensors of each program.
MARKS: dict[str, tuple[str, ...]] = {
    "convnext": ("stages.0.blocks.0.conv_dw.", "features.1.0.layer_scale", "stages.0.0.dwconv."),
    "mobilenet": ("features.1.block.0.0.weight", "blocks.0.0.conv_dw."),
    "swin": (
        "features.1.0.attn.relative_position_bias_table",
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ),
    "dinov2": ("blocks.0.ls1.gamma", "encoder.layer.0.layer_scale1."),
}

# Families' relatives that the networks here are not: tensors of theirs, and their name.
_RELATIVES = {
    "convnext": (r".*\.grn\..*", "a ConvNeXt of version 2 (response normalisation)"),
    "swin": (r".*\.(logit_scale|cpb_mlp\..*)", "a Swin of version 2 (cosine attention)"),
    "dinov2": (r"(.*\.)?reg(ister)?_tokens?", "a DINOv2 with registers; give the one without"),
}
# Same tensors as timm's other files, for convolutions that pad the right and the bottom more.
_TF = re.compile(r"(^|[^a-z])tf_(mobilenet|efficientnet)", re.I)


def check_relatives(source: str, tensors: Iterable[str], path: str) -> None:
    """Raises ValueError for weights of a network that looks like one of ours and is not.

    Args:
      path: of the file, with its folder's name.
    """
    pattern, words = _RELATIVES.get(source, ("", ""))
    if pattern and any(re.fullmatch(pattern, name) for name in tensors):
        raise ValueError(f"the weights are of {words}: no network here has its layers")
    if source == "mobilenet" and _TF.search(path):
        raise ValueError(
            "TensorFlow's weights (tf_...) are for convolutions that pad otherwise, and would "
            "give wrong features without a sign of it; take mobilenetv3_large_100.ra_in1k"
        )


# (family's leaf, blocks of each stage, channels of the stem) of the backbones by name.
_KNOWN: dict[tuple[str, tuple[int, ...], int], str] = {
    ("gamma", (3, 3, 9, 3), 96): "convnext_t",
    ("gamma", (3, 3, 27, 3), 96): "convnext_s",
    ("project", (2, 3, 6, 3), 16): "mobilenet_v3_large",
    ("out", (2, 3, 6, 3), 16): "mobilenet_v3_large_paddle",
    ("attn", (2, 2, 6, 2), 96): "swin_t",
    ("attn", (2, 2, 18, 2), 96): "swin_s",
    ("gamma1", (12, 0, 0, 0), 384): "dinov2_s",
}
# Weights of timm's on the Hugging Face hub by the backbone's name.
_PUBLISHED = {
    "convnext_t": "convnext_tiny.fb_in22k_ft_in1k",
    "convnext_s": "convnext_small.fb_in22k_ft_in1k",
    "mobilenet_v3_large": "mobilenetv3_large_100.ra_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in22k_ft_in1k",
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
}


def backbone_of(leaves: Mapping[str, Any]) -> str | None:
    """Returns the name of a backbone other than ResNet by its leaves, None if it is another."""
    blocks: dict[str, int] = {}
    kinds: set[str] = set()
    for leaf in leaves:
        matched = re.match(r"params/backbone/(res\d|block)_(\d{1,4})/(\w+)", leaf)
        if matched:
            name, block, kind = matched.groups()
            stage = "2" if name == "block" else name[3]  # no stages: all in the first
            blocks[stage] = max(blocks.get(stage, 0), int(block) + 1)
            kinds.add(kind)
        elif re.match(r"params/backbone/res\d_out/", leaf):  # PaddleDetection's MobileNetV3
            kinds.add("out")
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
