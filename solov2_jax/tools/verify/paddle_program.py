"""PaddleDetection's SOLOv2 on the folder that is given; see `original`.

With a number of classes in `case.json` it only writes `names.json`, its tensors' names and
shapes. Its classes are put together here: its own assembly wants configuration files, which its
package does not have.
"""

# pyright: reportMissingImports=false
import contextlib
import json
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
    from ppdet.modeling.backbones.resnet import ResNet
    from ppdet.modeling.heads.solov2_head import SOLOv2Head, SOLOv2MaskHead
    from ppdet.modeling.necks.fpn import FPN

    backbone, head, dcn, fpn = (model[k] for k in ("backbone", "ins_head", "dcn", "fpn"))
    channels = [256, 512, 1024, 2048] if backbone["depth"] >= 50 else [64, 128, 256, 512]
    convs = head["num_convs"]
    deformed = {"none": [], "last": [convs - 1], "all": list(range(convs))}[dcn["towers"]]
    return {
        "backbone": ResNet(
            depth=backbone["depth"],
            variant="d" if backbone["deep_stem"] else "b",
            return_idx=[0, 1, 2, 3],
            dcn_v2_stages=[stage - 2 for stage in dcn["stages"]] or [-1],
            groups=backbone["groups"],
            base_width=backbone["width_per_group"],
        ),
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


def fill(parts: dict[str, Any], state: dict[str, np.ndarray]) -> None:
    """Puts the tensors in; each must be used, and none be missing."""
    unused = set(state)
    for prefix, part in parts.items():
        part.eval()
        own = part.state_dict()
        lacking = [name for name in own if f"{prefix}.{name}" not in state]
        if lacking:
            raise ValueError(f"the file lacks {len(lacking)} of {prefix}'s ({lacking[:3]})")
        for name, tensor in own.items():
            array = state[f"{prefix}.{name}"]
            if tuple(tensor.shape) != array.shape:
                raise ValueError(f"{prefix}.{name} is {array.shape}, here {tuple(tensor.shape)}")
            tensor.set_value(array)
            unused.discard(f"{prefix}.{name}")
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
        post_nms_top_n=test["max_per_image"],
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
    some = (arrays[1] > 0) & arrays[2].reshape(len(arrays[1]), -1).any(1)  # one is no detection
    names = ("detected/labels", "detected/scores", "detected/masks")
    return {name: array[some] for name, array in zip(names, arrays, strict=True)}


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
        shapes = {name: list(value.shape) for name, value in own.items()}
        (folder / "names.json").write_text(json.dumps(shapes))
        return
    with np.load(folder / "state.npz") as file:
        state = {name: file[name] for name in file.files}
    num_classes = len(state["solov2_head.bbox_head.solo_cate.bias"])
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
