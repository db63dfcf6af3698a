"""Names of PaddleDetection's static graphs, the form of its files of 2020.

A parameter has its layer's name and its role: "conv1_weights", "conv1_bn_scale". They are
named in static/ppdet at release 2.3: modeling/backbones/resnet.py, name_adapter.py and
mobilenet_v3.py, fpn.py, ops.py, anchor_heads/solov2_head.py, mask_head/solo_mask_head.py.
"""

from solov2_jax.weights.backbones import MOBILE_BLOCKS, MOBILE_EXCITED
from solov2_jax.weights.names import Drop, NameTable, Rule


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}_scale", f"params/{target}/scale"),
        Rule(f"{source}_offset", f"params/{target}/bias"),
    )


def _unit(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a convolution and its batch norm."""
    return (
        Rule(f"{conv}_weights", f"params/{target}/kernel", "kernel"),
        *_norm(norm, f"{target}/norm"),
        Rule(f"{norm}_mean", f"batch_stats/{target}/norm/mean"),
        Rule(f"{norm}_variance", f"batch_stats/{target}/norm/var"),
    )


def _offsets(conv: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of the convolution that predicts a deformable one's offsets."""
    return (
        Rule(f"{conv}_conv_offset.w_0", f"params/{target}/offset/kernel", "kernel"),
        Rule(f"{conv}_conv_offset.b_0", f"params/{target}/offset/bias"),
    )


def _resnet() -> tuple[Rule, ...]:
    """Blocks have letters; the fourth stage's, where they are more than ten, numbers too.

    A norm has the convolution's name but for its first three letters.
    """
    rules = [*_unit("conv1", "bn_conv1", "backbone/stem/conv1")]
    for i in (1, 2, 3):
        rules += _unit(f"conv1_{i}", f"bnv1_{i}", f"backbone/stem/conv{i}")
    blocks = [("{s}b{i}", "{i}"), *((f"{{s}}{c}", str(n)) for n, c in enumerate("abcdefgh"))]
    branches = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
    for block, i in blocks:
        for branch, ours in branches.items():
            name, target = f"{block}_branch{branch}", f"backbone/res{{s}}_{i}/{ours}"
            rules += _unit(f"res{name}", f"bn{name}", target)
        rules += _offsets(f"res{block}_branch2b", f"backbone/res{{s}}_{i}/conv2")
    return tuple(rules)


def _mobilenet() -> tuple[Rule, ...]:
    """The expansion of a stage's first block is the end of the stage before, here."""
    rules = [*_unit("conv1", "conv1_bn", "backbone/stem/conv1")]
    units = {"conv_last": "res5_out"}
    for n, block in enumerate(MOBILE_BLOCKS):
        source = f"conv{n + 2}"
        first = block.endswith("_0") and block != "res2_0"
        units[f"{source}_expand"] = f"res{int(block[3]) - 1}_out" if first else f"{block}/expand"
        units[f"{source}_depthwise"] = f"{block}/dw"
        units[f"{source}_linear"] = f"{block}/project"
        for number, layer in (("1", "reduce"), ("2", "expand")) if n in MOBILE_EXCITED else ():
            target = f"params/backbone/{block}/se/{layer}"
            rules.append(Rule(f"{source}_se_{number}_weights", f"{target}/kernel", "pixel"))
            rules.append(Rule(f"{source}_se_{number}_offset", f"{target}/bias"))
    for source, target in units.items():
        rules += _unit(source, f"{source}_bn", f"backbone/{target}")
    return tuple(rules)


def _fpn() -> tuple[Rule, ...]:
    """A level is called by the backbone's feature: res2_sum to res5_sum, mv3_0 to mv3_3."""
    rules: list[Rule] = []
    for last, level in (("res5_sum", "res{l}_sum"), ("mv3_3", "mv3_{l-2}")):
        for source, target in (
            (f"fpn_inner_{last}", "fpn/lateral5"),
            (f"fpn_inner_{level}_lateral", "fpn/lateral{l}"),
            (f"fpn_{level}", "fpn/output{l}"),
        ):
            rules.append(Rule(f"{source}_w", f"params/{target}/kernel", "kernel"))
            rules.append(Rule(f"{source}_b", f"params/{target}/bias"))
    return tuple(rules)


def _heads() -> tuple[Rule, ...]:
    rules: list[Rule] = []

    def unit(source: str, target: str, norm: str) -> None:
        rules.append(Rule(f"{source}_weights", f"params/{target}/kernel", "kernel"))
        rules.extend(_offsets(source, target))
        rules.extend(_norm(f"{source}.gn", norm))

    for branch in ("cate", "kernel"):
        tower = f"ins_head/{branch}_tower"
        unit(f"bbox_head.{branch}_convs.{{i}}", f"{tower}/conv{{i}}", f"{tower}/gn{{i}}")
        source, target = f"bbox_head.solo_{branch}", f"params/ins_head/{branch}_pred"
        rules.append(Rule(f"{source}.weight", f"{target}/kernel", "kernel"))
        rules.append(Rule(f"{source}.bias", f"{target}/bias"))
    level = "mask_head/level{l}"
    unit("mask_feat_head.convs_all_levels.{l}.conv{j}", f"{level}/conv{{j}}", f"{level}/gn{{j}}")
    unit("mask_feat_head.conv_pred.0", "mask_head/conv_pred", "mask_head/gn_pred")
    return tuple(rules)


_CLASSIFIER = Drop(r"(fc|last_1x1_conv)[._].*", "ImageNet classifier, not used")
_RULES = dict.fromkeys((*_resnet(), *_mobilenet(), *_fpn(), *_heads()))  # conv1 is of both
PADDLE_STATIC = NameTable(tuple(_RULES), (_CLASSIFIER,))
# First tensors of each of its backbones.
MARKS = ("res2a_branch2a_weights", "conv2_expand_weights")
