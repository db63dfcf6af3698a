"""The network as a table, `solov2 summary`: traced with shapes only, nothing is computed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from solov2_jax.data.buckets import round_up
from solov2_jax.models import SOLOv2, build_model
from solov2_jax.models.dense import Dense, DepthwiseConv, PatchConv
from solov2_jax.models.layers import ConvNorm, FrozenBatchNorm, GroupNorm, SharedConv
from solov2_jax.training.optim import trainable_mask

# Classes shown where the config leaves the count to the annotations: COCO's.
DEFAULT_NUM_CLASSES = 80
_NORMS = {"frozen_bn": ", frozen BN", "gn": "", "sync_bn": ", BN"}
_HEADER = ("module", "what", "output", "parameters", "trainable", "GFLOPs")


@dataclasses.dataclass
class Row:
    """One module with everything inside it.

    `parameters` counts as the reference does: a frozen batch norm's scale, bias, mean
    and variance are not parameters, but `frozen_norm`. `flops` are those of the
    convolutions and layers with weights, two for one multiply-add.
    """

    path: tuple[str, ...]
    what: str
    outputs: list[tuple[int, ...]]  # without the batch
    parameters: int = 0
    trainable: int = 0
    frozen_norm: int = 0
    flops: int = 0


def summarize(
    model: SOLOv2, height: int, width: int, freeze_at: int, channels: int = 3
) -> list[Row]:
    """Returns a row per module, outermost first, for one image of the padded size.

    Args:
      freeze_at: stages that are not trained, as `config.model.backbone.freeze_at`.
    """
    rows: dict[tuple[str, ...], Row] = {}

    def record(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or isinstance(module, FrozenBatchNorm):
            return next_fun(*args, **kwargs)
        row = rows.setdefault(module.path, Row(module.path, type(module).__name__, []))
        out = next_fun(*args, **kwargs)
        # A module that is called once per level adds an output per call.
        row.outputs += [x.shape[1:] for x in jax.tree.leaves(out)]
        row.what = _describe(module, jax.tree.leaves(args)[0].shape[-1])
        return out

    image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
    _count(rows, variables, freeze_at, model.backbone.stages())
    return list(rows.values())


def _describe(module: nn.Module, channels: int) -> str:
    """Returns e.g. "3x3 256->512, bias" for a module with that many input channels."""
    if isinstance(module, ConvNorm | SharedConv):
        k = module.kernel_size
        conv = f"{k}x{k} {channels}->{module.features}"
        deformed = f", deformable v{module.deform.version}" if module.deform else ""
        if isinstance(module, SharedConv):
            return conv + ", bias" * module.use_bias + deformed
        conv += f" / {module.stride}" * (module.stride > 1)
        conv += f" in {module.groups} groups" * (module.groups > 1)
        return conv + _NORMS[module.norm] + deformed
    if isinstance(module, Dense):
        return f"dense {channels}->{module.features}"
    if isinstance(module, PatchConv):
        return f"{module.size}x{module.size} {channels}->{module.features} / {module.size}"
    if isinstance(module, DepthwiseConv):
        return f"{module.kernel_size}x{module.kernel_size} depthwise"
    if isinstance(module, GroupNorm):
        return f"GroupNorm {module.groups}"
    return type(module).__name__


def _count(
    rows: dict[tuple[str, ...], Row], variables, freeze_at: int, stages: Sequence[Sequence[str]]
) -> None:
    """Adds each array of `variables` to the rows of all modules around it."""
    params: Any = flatten_dict(variables["params"])
    stats: Any = flatten_dict(variables.get("batch_stats", {}))
    frozen = {path[:-1] for path in stats}
    norm = "frozen_bn" if frozen else "gn"
    trainable: Any = flatten_dict(trainable_mask(variables["params"], freeze_at, norm, (), stages))
    for path, array in params.items():
        flops = 0
        if path[-1] == "kernel":
            values = sum(math.prod(shape) for shape in rows[path[:-1]].outputs)
            flops = 2 * math.prod(array.shape[:-1]) * values
        for depth in range(len(path)):
            row = rows.get(path[:depth])
            if row is None:  # the frozen batch norm's own level
                continue
            if path[:-1] in frozen:
                row.frozen_norm += array.size
                continue
            row.parameters += array.size
            row.trainable += array.size * trainable[path]
            row.flops += flops
    for path, array in stats.items():
        for depth in range(len(path) - 1):
            rows[path[:depth]].frozen_norm += array.size


def format_table(rows: Sequence[Row], depth: int = 0) -> str:
    """Returns the rows as lines of text with their total.

    Args:
      depth: deepest level shown, 1 the backbone, FPN and heads; 0: all.
    """
    lines: list[tuple[str, ...]] = [_HEADER]
    for row in rows:
        level = len(row.path)
        if depth and level > depth:
            continue
        name = "  " * (level - 1) + row.path[-1] if row.path else "(all)"
        flops = f"{row.flops / 1e9:,.3f}" if row.flops else ""
        numbers = (f"{row.parameters:,}", f"{row.trainable:,}", flops)
        lines.append((name, row.what, format_shapes(row.outputs), *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = []
    for line in lines:
        left = [cell.ljust(w) for cell, w in zip(line[:3], widths[:3], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(line[3:], widths[3:], strict=True)]
        text.append("  ".join([*left, *right]).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def format_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    """Returns e.g. "40x40 36x36 x512": sides, then the channels that they share.

    Beyond six arrays the module's parts say more than a list, and it is left out.
    """
    if len(shapes) > 6:
        return f"{len(shapes)} arrays"
    groups: list[tuple[int, list[str]]] = []
    for *sides, channels in shapes:
        if not groups or groups[-1][0] != channels:
            groups.append((channels, []))
        groups[-1][1].append("x".join(map(str, sides)))
    return ", ".join(f"{' '.join(sides)} x{c}" for c, sides in groups)


def padded_test_size(config: Any) -> tuple[int, int]:
    """Returns (height, width) of the largest padded test image that is not upright."""
    buckets = [tuple(size) for size in config.input.buckets_test]
    if buckets:
        lying = [size for size in buckets if size[0] <= size[1]]
        return max(lying or buckets, key=math.prod)
    return round_up(config.input.min_size_test, 32), round_up(config.input.max_size_test, 32)


def report(config: Any, size: tuple[int, int] | None = None, depth: int = 0) -> str:
    """Returns the table of a config's network, and its totals.

    Args:
      size: padded (height, width), multiples of 32; None: the test size.
      depth: as for `format_table`.
    """
    height, width = size or padded_test_size(config)
    num_classes = config.model.num_classes or DEFAULT_NUM_CLASSES
    model = build_model(config, num_classes)
    freeze_at = config.model.backbone.freeze_at
    rows = summarize(model, height, width, freeze_at, config.data.channels)
    total, lines = rows[0], [format_table(rows, depth), ""]
    lines += [
        f"image {height}x{width}, {num_classes} classes"
        + " (the config counts them from the annotations)" * (config.model.num_classes == 0),
        f"parameters {total.parameters:,}, of these trained {total.trainable:,}; "
        f"besides {total.frozen_norm:,} values of "
        + "frozen " * ("sync_bn" not in (config.model.backbone.norm, config.model.fpn.norm))
        + "batch norms",
        f"convolutions {total.flops / 1e9:,.1f} GFLOPs an image "
        "(2 per multiply-add; without post-processing)",
    ]
    return "\n".join(lines)
