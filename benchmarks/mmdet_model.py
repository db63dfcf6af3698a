"""mmdetection's SOLOv2 of one of our configs, with given weights, on the CPU.

Runs in the peers' environment. mmcv-lite has no compiled operators, and this network
calls none; mmdetection imports their module all the same, so an empty one stands in.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _NoOperators(types.ModuleType):
    """In place of `mmcv._ext`: every operator exists, and none can be called."""

    __file__ = "<no operators>"  # what asks for a module's source wants a name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return missing


def build(case: Path) -> Any:
    """Returns the model of a case, in evaluation mode, every weight filled."""
    sys.modules.setdefault("mmcv._ext", _NoOperators("mmcv._ext"))
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "solov2"
    model = Config.fromfile(folder / "solov2_r50_fpn_1x_coco.py").model
    config = json.loads((case / "config.json").read_text())
    fit(model, config)
    built = MODELS.build(model)
    weights = json.loads((case / "weights.json").read_text())
    with np.load(weights["mmdet"]) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    missing, unexpected = built.load_state_dict(state, strict=False)
    missing = [n for n in missing if not n.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: {missing=}, {unexpected=}")
    return built.eval()


def fit(model: Any, config: Any) -> None:
    """Makes mmdetection's model config say what ours says; in place."""
    backbone, head, test = (
        config["model"]["backbone"],
        config["model"]["ins_head"],
        config["test"],
    )
    deep = backbone["depth"] >= 50
    model.backbone.update(
        depth=backbone["depth"],
        init_cfg=None,
        frozen_stages=backbone["freeze_at"] - 1,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
        style="caffe" if deep and backbone["stride_in_1x1"] else "pytorch",
    )
    channels = config["model"]["fpn"]["channels"]
    model.neck.out_channels = channels
    if not deep:
        model.neck.in_channels = [64, 128, 256, 512]
    model.mask_head.update(
        num_classes=config["model"]["num_classes"],
        in_channels=channels,
        feat_channels=head["channels"],
        stacked_convs=head["num_convs"],
        num_grids=list(head["num_grids"]),
        scale_ranges=config["targets"]["scale_ranges"],
        pos_scale=config["targets"]["sigma"],
        norm_cfg=dict(type="GN", num_groups=32, requires_grad=True),
    )
    model.mask_head.mask_feature_head.update(
        feat_channels=config["model"]["mask_head"]["channels"],
        out_channels=head["num_kernels"],
    )
    model.data_preprocessor.update(
        mean=config["input"]["mean"], std=config["input"]["std"], bgr_to_rgb=False
    )
    model.test_cfg.update(
        nms_pre=test["nms_pre"],
        score_thr=test["score_threshold"],
        mask_thr=test["mask_threshold"],
        filter_thr=test["update_threshold"],
        kernel=test["nms_kernel"],
        sigma=test["nms_sigma"],
        max_per_img=test["max_per_image"],
    )


def samples(arrays: Any, training: bool) -> list[Any]:
    """Returns a data sample for each image of a case, with its objects if training."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    made = []
    for i, size in enumerate(arrays["image_size"].tolist()):
        sample = DetDataSample()
        shape = tuple(size)
        sample.set_metainfo(dict(img_shape=shape, ori_shape=shape, img_id=i))
        if training:
            masks = BitmapMasks(arrays["full_masks"][i], *shape)
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(arrays["boxes"][i]),
                labels=torch.from_numpy(arrays["labels"][i]).long(),
                masks=masks,
            )
        made.append(sample)
    return made


def pixels(arrays: Any) -> list[torch.Tensor]:
    """Returns the images as mmdetection's pipeline gives them: uint8 [3, H, W]."""
    images = zip(arrays["image"], arrays["image_size"].tolist(), strict=True)
    return [
        torch.from_numpy(np.ascontiguousarray(image[:h, :w].transpose(2, 0, 1)))
        for image, (h, w) in images
    ]
