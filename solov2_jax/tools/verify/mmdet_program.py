"""mmdetection's SOLOv2 on the folder that is given; see `original`.

With a number of classes in `case.json` it only writes `names.json`, its tensors' names and
shapes. Deformable convolutions are mmcv's own where its operators are built, else
torchvision's.
"""

# pyright: reportMissingImports=false
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def fail(missing: str) -> None:
    print(json.dumps({"missing": missing}), flush=True)
    sys.exit(3)


class Absent(types.ModuleType):
    """In place of mmcv's operators, which mmdetection imports and SOLOv2 does not call."""

    __file__ = "<no operators>"
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **options: Any) -> Any:
            raise RuntimeError(f"mmcv has no operator {name} here")

        return missing


def deform_by_torchvision() -> None:
    """Registers deformable convolutions that compute by torchvision's operator."""
    import torch
    from mmengine.registry import MODELS
    from torch import nn

    try:
        from torchvision.ops import deform_conv2d
    except ImportError:
        fail("torchvision, for deformable convolutions, is not installed")

    class Modulated(nn.Module):
        parts = 3  # offsets of both axes and a factor, for each tap

        def __init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride=1,
            padding=0,
            dilation=1,
            groups=1,
            deform_groups=1,
            bias=True,
            **others,
        ):
            super().__init__()

            def pair(n):
                return n if isinstance(n, tuple) else (n, n)

            self.options = {"stride": stride, "padding": padding, "dilation": dilation}
            # ConvModule reads these of any convolution.
            self.in_channels, self.out_channels = in_channels, out_channels
            self.kernel_size, self.stride = pair(kernel_size), pair(stride)
            self.padding, self.dilation, self.groups = pair(padding), pair(dilation), groups
            self.transposed, self.output_padding = False, (0, 0)
            shape = (out_channels, in_channels // groups, *self.kernel_size)
            self.weight = nn.Parameter(torch.zeros(shape))
            self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
            taps = self.kernel_size[0] * self.kernel_size[1]
            channels = self.parts * deform_groups * taps
            self.conv_offset = nn.Conv2d(in_channels, channels, kernel_size, **self.options)

        def forward(self, x):
            offset, mask = self.conv_offset(x), None
            if self.parts == 3:
                taps = offset.shape[1] // 3
                offset, mask = offset[:, : 2 * taps], torch.sigmoid(offset[:, 2 * taps :])
            return deform_conv2d(x, offset, self.weight, self.bias, mask=mask, **self.options)

    class Plain(Modulated):
        parts = 2

    for name, module in (("DCN", Plain), ("DCNv2", Modulated)):
        MODELS.register_module(name=name, module=module, force=True)


GROUP_NORM = {"type": "GN", "num_groups": 32, "requires_grad": True}


def trunk(model: dict[str, Any], deform: dict[str, Any]) -> dict[str, Any]:
    """Returns mmdetection's settings of the backbone."""
    backbone, stages = model["backbone"], model["dcn"]["stages"]
    deep = backbone["depth"] >= 50
    options = {
        "type": "ResNeXt" if backbone["groups"] > 1 else "ResNet",
        "depth": backbone["depth"],
        "style": "caffe" if deep and backbone["stride_in_1x1"] else "pytorch",
        "deep_stem": backbone["deep_stem"],
        "avg_down": backbone["avg_down"],
        "norm_cfg": {"type": "BN", "requires_grad": False},
        "norm_eval": True,
    }
    if backbone["groups"] > 1:
        options |= {"groups": backbone["groups"], "base_width": backbone["width_per_group"]}
    if stages:
        options["dcn"] = {**deform, "fallback_on_stride": False}
        options["stage_with_dcn"] = tuple(stage in stages for stage in (2, 3, 4, 5))
    return options


def heads(model: dict[str, Any], deform: dict[str, Any]) -> dict[str, Any]:
    """Returns mmdetection's settings of both heads."""
    head, dcn, channels = model["ins_head"], model["dcn"], model["fpn"]["channels"]
    mask = {
        "feat_channels": model["mask_head"]["channels"],
        "start_level": 0,
        "end_level": 3,
        "out_channels": head["num_kernels"],
        "mask_stride": 4,
        "norm_cfg": GROUP_NORM,
    }
    if dcn["mask_head"]:
        mask["conv_cfg"] = deform
    options = {
        "type": "SOLOV2Head",
        "num_classes": model["num_classes"],
        "in_channels": channels,
        "feat_channels": head["channels"],
        "stacked_convs": head["num_convs"],
        "strides": [8, 8, 16, 32, 32],
        "num_grids": list(head["num_grids"]),
        "cls_down_index": 0,
        "mask_feature_head": mask,
        "norm_cfg": GROUP_NORM,
        "loss_mask": {"type": "DiceLoss", "use_sigmoid": True, "loss_weight": 3.0},
        "loss_cls": {"type": "FocalLoss", "use_sigmoid": True},
    }
    if dcn["towers"] != "none":
        options |= {"dcn_cfg": deform, "dcn_apply_to_all_conv": dcn["towers"] == "all"}
    return options


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Returns mmdetection's settings of the network."""
    model, test, fpn = case["model"], case["test"], case["model"]["fpn"]
    deform = {"type": "DCNv2" if model["dcn"]["version"] == 2 else "DCN"}
    deform["deform_groups"] = model["dcn"]["groups"]
    deep = model["backbone"]["depth"] >= 50
    neck = {
        "type": "FPN",
        "in_channels": [256, 512, 1024, 2048] if deep else [64, 128, 256, 512],
        "out_channels": fpn["channels"],
        "start_level": 0,
        "num_outs": 5,
    }
    if fpn["norm"] != "none":
        neck["norm_cfg"] = GROUP_NORM if fpn["norm"] == "gn" else {"type": "BN"}
    return {
        "type": "SOLOv2",
        "backbone": trunk(model, deform),
        "neck": neck,
        "mask_head": heads(model, deform),
        "test_cfg": {
            "nms_pre": test["nms_pre"],
            "score_thr": test["score_threshold"],
            "mask_thr": test["mask_threshold"],
            "filter_thr": test["update_threshold"],
            "kernel": test["nms_kernel"],
            "sigma": test["nms_sigma"],
            "max_per_img": test["max_per_image"],
        },
    }


def build(case: dict[str, Any]) -> Any:
    """Returns the model."""
    try:
        import mmcv
        import mmdet  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        fail(f"{error.name} is not installed")
    try:
        import mmcv._ext  # noqa: F401
    except ImportError:
        sys.modules["mmcv._ext"] = Absent("mmcv._ext")
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    register_all_modules(init_default_scope=True)
    dcn = case["model"]["dcn"]
    deformed = dcn["stages"] or dcn["mask_head"] or dcn["towers"] != "none"
    if deformed and isinstance(sys.modules["mmcv._ext"], Absent):
        deform_by_torchvision()
    return MODELS.build(ConfigDict(settings(case))).eval()


def fill(model: Any, state: dict[str, np.ndarray]) -> None:
    """Puts the tensors in; each must be used, and none be missing."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"mmdetection's network lacks {len(unexpected)} of the tensors ({unexpected[:3]}), and "
            f"the file {len(missing)} of its ({missing[:3]})"
        )


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    case = json.loads((folder / "case.json").read_text())
    if case["model"]["num_classes"]:
        shapes = {n: list(v.shape) for n, v in build(case).state_dict().items()}
        (folder / "names.json").write_text(json.dumps(shapes))
        return
    with np.load(folder / "state.npz") as file:
        state = {name: file[name] for name in file.files}
    class_layer = next(state[n] for n in state if n.endswith("conv_cls.weight"))
    case["model"]["num_classes"] = len(class_layer)
    model = build(case)
    fill(model, state)
    import torch

    image = torch.from_numpy(np.load(folder / "image.npy")).permute(0, 3, 1, 2).contiguous()

    def cells(levels):
        return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in levels], 1).numpy()

    with torch.no_grad():
        stages = model.backbone(image)
        levels = model.neck(stages)
        kernels, classes, features = model.mask_head(levels)
        joined = {"cate": cells(classes), "kernel": cells(kernels)}  # changed by what follows
        size = {"img_shape": tuple(image.shape[2:]), "ori_shape": tuple(image.shape[2:])}
        found = model.mask_head.predict_by_feat(kernels, classes, features, batch_img_metas=[size])
    arrays = {f"backbone/res{i}": x.permute(0, 2, 3, 1).numpy() for i, x in enumerate(stages, 2)}
    arrays |= {f"fpn/p{i}": x.permute(0, 2, 3, 1).numpy() for i, x in enumerate(levels, 2)}
    arrays |= joined
    arrays["mask_feat"] = features.permute(0, 2, 3, 1).numpy()
    masks = found[0].masks.numpy().astype(bool)
    some = masks.any((1, 2))  # ours drops a mask that has no pixel left
    arrays["detected/labels"] = found[0].labels.numpy()[some]
    arrays["detected/scores"] = found[0].scores.numpy()[some]
    arrays["detected/masks"] = masks[some]
    np.savez(folder / "original.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
