"""PaddleDetection's SOLOv2 on the folder that is given; see `original`.

With a number of classes in `case.json` it only writes `names.json`, its tensors' names and
shapes. Its classes are put together here: its own assembly wants configuration files, which its
package does not have.

Files of its static graphs, which want the `fluid` of PaddlePaddle 2.0, are run by the same
classes, whose layers are those of the graphs: `static_name` has the names.
"""

# pyright: reportMissingImports=false
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


def fail(missing: str) -> None:
    print(json.dumps({"missing": missing}), flush=True)
    sys.exit(3)


def build(model: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Returns its parts by the prefixes of their tensors."""
    from ppdet.modeling.backbones.mobilenet_v3 import MobileNetV3
    from ppdet.modeling.backbones.resnet import ResNet
    from ppdet.modeling.heads.solov2_head import SOLOv2Head, SOLOv2MaskHead
    from ppdet.modeling.necks.fpn import FPN

    backbone, head, dcn, fpn = (model[k] for k in ("backbone", "ins_head", "dcn", "fpn"))
    channels = [256, 512, 1024, 2048] if backbone["depth"] >= 50 else [64, 128, 256, 512]
    convs = head["num_convs"]
    deformed = {"none": [], "last": [convs - 1], "all": list(range(convs))}[dcn["towers"]]
    if backbone["name"] == "mobilenet_v3_large_paddle":
        channels = [72, 240, 672, 960]
        # Of these blocks what is expanded, and the convolution after the last.
        features = MobileNetV3(
            feature_maps=[5, 8, 14, 17], with_extra_blocks=True, extra_block_filters=[]
        )
    else:
        features = ResNet(
            depth=backbone["depth"],
            variant="d" if backbone["deep_stem"] else "b",
            return_idx=[0, 1, 2, 3],
            dcn_v2_stages=[stage - 2 for stage in dcn["stages"]] or [-1],
            groups=backbone["groups"],
            base_width=backbone["width_per_group"],
        )
    return {
        "backbone": features,
        "neck": FPN(channels, fpn["channels"]),
        "solov2_head": SOLOv2Head(
            num_classes=num_classes,
            in_channels=fpn["channels"],
            seg_feat_channels=head["channels"],
            stacked_convs=convs,
            num_grids=list(head["num_grids"]),
            kernel_out_channels=head["num_kernels"],
            dcn_v2_stages=deformed,
        ),
        "mask_head": SOLOv2MaskHead(
            in_channels=fpn["channels"],
            mid_channels=model["mask_head"]["channels"],
            out_channels=head["num_kernels"],
            use_dcn_in_tower=dcn["mask_head"],
        ),
    }


# Of the classes' names, in this order, and what the static graphs have instead.
STATIC = (
    (r"solov2_head\.(bbox_head\.)?solo_", r"bbox_head.solo_"),
    (r"solov2_head\.", ""),
    (r"mask_head\.(conv_pred\.|mask_feat_head\.conv_pred\.0\.)", "mask_feat_head.conv_pred.0."),
    (r"mask_head\.conv_pre_feat\d\.", ""),
    # FPN
    (r"neck\.(.*?)(\.conv)?\.weight", r"\1_w"),
    (r"neck\.(.*?)(\.conv)?\.bias", r"\1_b"),
    # MobileNetV3
    (r"backbone\.conv17\b", "backbone.conv_last"),
    (r"\.expand_conv\b", "_expand"),
    (r"\.bottleneck_conv\b", "_depthwise"),
    (r"\.linear_conv\b", "_linear"),
    (r"\.mid_se\.conv([12])\.bias", r"_se_\1_offset"),
    (r"\.mid_se\.conv([12])\.weight", r"_se_\1_weights"),
    (r"\.bn\.", "_bn."),
    # ResNet
    (r"backbone\.res\d\.(res\d\w+)\.branch", r"backbone.\1_branch"),
    (r"backbone\.res\d\.(res\d\w+)\.short(\.conv(?=\.[cn]))?", r"backbone.\1_branch1"),
    (r"backbone\.conv1\.(conv1(_\d)?)\b", r"backbone.\1"),
    (r"backbone\.conv1\.norm", "backbone.bn_conv1"),
    (r"backbone\.\w{3}(\w+)\.norm", r"backbone.bn\1"),
    # layers
    (r"(\.conv)?\.conv_offset\.weight", "_conv_offset.w_0"),
    (r"(\.conv)?\.conv_offset\.bias", "_conv_offset.b_0"),
    (r"(\.conv)?\.conv(_dcn)?\.weight", "_weights"),
    (r"(_feat_head|_convs)(.*)\.norm\.weight", r"\1\2.gn_scale"),
    (r"(_feat_head|_convs)(.*)\.norm\.bias", r"\1\2.gn_offset"),
    (r"backbone\.(\w+)\.weight", r"\1_scale"),
    (r"backbone\.(\w+)\.bias", r"\1_offset"),
    (r"\._(mean|variance)", r"_\1"),
    (r"backbone\.", ""),
    (r".*\.conv_dcn\.bias", ""),  # they have none
)


def static_name(name: str) -> str:
    """Returns what the static graphs call a parameter that its classes call `name`.

    "" for one that they do not have.

    Source: PaddleDetection at release 2.3, static/ppdet/modeling: the names of the layers.
    """
    for pattern, text in STATIC:
        name = re.sub(pattern, text, name)
    return name


def is_static(names: Any) -> bool:
    """Returns whether a file's names are those of a static graph."""
    return any(name.endswith("_weights") for name in names)


def fill(parts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
    """Puts the tensors in; each must be used, and none be missing."""
    unused = set(state)
    own_name = static_name if is_static(state) else str
    for prefix, part in parts.items():
        part.eval()
        own = part.state_dict()
        names = {name: own_name(f"{prefix}.{name}") for name in own}
        lacking = [name for name in own if names[name] and names[name] not in state]
        if lacking:
            raise ValueError(f"the file lacks {len(lacking)} of {prefix}'s ({lacking[:3]})")
        for name, tensor in own.items():
            array = state[names[name]] if names[name] else np.zeros(tensor.shape, np.float32)
            if tuple(tensor.shape) != array.shape:
                raise ValueError(f"{prefix}.{name} is {array.shape}, here {tuple(tensor.shape)}")
            tensor.set_value(array)
            unused.discard(names[name])
    if unused:
        raise ValueError(f"its network lacks {len(unused)} of the tensors ({sorted(unused)[:3]})")


def detect(parts: dict[str, Any], test: dict[str, Any], outputs: Any, size: Any) -> dict[str, Any]:
    """Returns what its post-processing makes of class scores, kernels and mask features.

    It is of PaddlePaddle 2, where a number taken from a tensor has one axis, and floats are
    compared with integers.
    """
    import paddle
    from ppdet.modeling.layers import MaskMatrixNMS

    head, concat, cast = parts["solov2_head"], paddle.concat, paddle.cast

    def with_axis(tensor):
        return tensor if tensor.ndim else tensor.reshape([1])

    def concat_numbers(tensors, axis=0):
        return concat([with_axis(tensor) for tensor in tensors], axis)

    def cast_number(tensor, dtype):
        return cast(with_axis(tensor), dtype)

    def in_floats(make):
        def made(*args, dtype, **options):
            return make(*args, dtype="float32" if dtype == "int32" else dtype, **options)

        return made

    head.score_threshold, head.mask_threshold = test["score_threshold"], test["mask_threshold"]
    head.mask_nms = MaskMatrixNMS(
        update_threshold=test["update_threshold"],
        pre_nms_top_n=test["nms_pre"],
        post_nms_top_n=test["max_per_image"] + 1,
        kernel=test["nms_kernel"],
        sigma=test["nms_sigma"],
    )
    changed = {"concat": concat_numbers, "cast": cast_number}
    changed |= {n: in_floats(getattr(paddle, n)) for n in ("full", "zeros")}
    with contextlib.ExitStack() as stack:
        for name, function in changed.items():
            stack.enter_context(mock.patch.object(paddle, name, function))
        shape = paddle.to_tensor(np.array([size], np.float32))
        masks, labels, scores, _ = head.get_prediction(
            *outputs, shape, paddle.to_tensor(np.ones((1, 2), np.float32))
        )
    arrays = [x.numpy() for x in (labels, scores, masks)]
    some = (arrays[1] > 0) & arrays[2].reshape(len(arrays[1]), -1).any(1)
    # The last that enters NMS comes once more, so that there is always one.
    for i in range(1, len(some)):
        some[i] &= not all(np.array_equal(array[i], array[i - 1]) for array in arrays)
    names = ("detected/labels", "detected/scores", "detected/masks")
    kept = np.flatnonzero(some)[: test["max_per_image"]]
    return {name: array[kept] for name, array in zip(names, arrays, strict=True)}


def main(folder: Path) -> None:
    try:
        import paddle
        import ppdet.modeling  # noqa: F401
    except ImportError as error:
        fail(f"{error.name} is not installed")
    case = json.loads((folder / "case.json").read_text())
    if case["model"]["num_classes"]:
        parts = build(case["model"], case["model"]["num_classes"])
        own = {f"{p}.{n}": v for p, part in parts.items() for n, v in part.state_dict().items()}
        own_name = static_name if case.get("static") else str
        shapes = {own_name(n): list(v.shape) for n, v in own.items() if own_name(n)}
        (folder / "names.json").write_text(json.dumps(shapes))
        return
    with np.load(folder / "state.npz") as file:
        state = {name: file[name] for name in file.files}
    prefix = "" if is_static(state) else "solov2_head."
    num_classes = len(state[f"{prefix}bbox_head.solo_cate.bias"])
    parts = build(case["model"], num_classes)
    fill(parts, state)
    image = paddle.to_tensor(np.load(folder / "image.npy").transpose(0, 3, 1, 2).copy())
    head = parts["solov2_head"]

    def last(x):
        return x.transpose([0, 2, 3, 1]).numpy()

    def cells(levels):
        flat = [last(x) for x in levels]
        return np.concatenate([x.reshape(1, -1, x.shape[-1]) for x in flat], 1)

    with paddle.no_grad():
        stages = parts["backbone"]({"image": image})
        levels = parts["neck"](stages)
        head.training = True  # it then gives logits, not scores; nothing else of it changes
        classes, kernels = head(levels)
        features = parts["mask_head"](levels)
        head.training = False
        scores, _ = head(levels)
        found = detect(parts, case["test"], (scores, kernels, features), image.shape[2:])
    arrays = {f"backbone/res{i}": last(x) for i, x in enumerate(stages, start=2)}
    arrays |= {f"fpn/p{i}": last(x) for i, x in enumerate(levels, start=2)}
    arrays |= {"cate": cells(classes), "kernel": cells(kernels), "mask_feat": last(features)}
    found["detected/masks"] = found["detected/masks"].astype(bool)
    np.savez(folder / "original.npz", **arrays, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
