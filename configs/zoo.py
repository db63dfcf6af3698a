"""Every published SOLOv2 that has a recipe of its own, by name: networks, pixels, schedules.

    python train.py --config configs/zoo.py:mmdet_r101_dcn --workdir runs/r101_dcn \
        --config.init_from=WEIGHTS

`AP` is the mask AP on COCO val2017 that the publisher gives for the published file; none of
these has been trained to the end by us. Made for 16 images a step.
"""

from typing import Any, NamedTuple

from configs import base, light_448_r18


class Variant(NamedTuple):
    """A published model: its AP, where its recipe is published, and keys of the config."""

    ap: float | None  # None: the recipe is published, weights are not
    source: str
    keys: dict[str, Any]
    light: bool = False  # keys besides those of configs/light_448_r18.py


_RGB = {
    "input.channel_order": "RGB",
    "input.mean": (123.675, 116.28, 103.53),
    "input.std": (58.395, 57.12, 57.375),
    "model.backbone.stride_in_1x1": False,
}
_DCN = {"model.dcn.stages": (3, 4, 5), "model.dcn.towers": "all", "model.dcn.mask_head": True}
_X101 = {
    "model.backbone.depth": 101,
    "model.backbone.groups": 64,
    "model.backbone.width_per_group": 4,
}
_SHORT_SIDES = {"input.min_sizes_train": (352, 384, 416, 448, 480, 512)}


def _epochs(epochs: int, *milestones: int) -> dict[str, Any]:
    """Returns the keys of a schedule in epochs, as programs other than the reference have."""
    shares = tuple(round(milestone / epochs, 6) for milestone in milestones)
    return {"train.epochs": float(epochs), "optim.milestones": shares}


# mmdetection: mmdet/configs/solov2 at 3.3.0; the paper's code: WXinlong/SOLO, configs/solov2;
# both clip at 35 and warm up over 500 steps.
_OPTIM = {"optim.clip_norm": 35.0, "optim.warmup_steps": 500.0}
_MMDET_1X = {**_RGB, **_OPTIM, "optim.warmup_factor": 1 / 3, **_epochs(12, 8, 11)}
_MMDET = {**_RGB, **_OPTIM, "optim.warmup_factor": 1 / 3, **_epochs(36, 27, 33)}
_SOLO_1X = {**_RGB, **_OPTIM, **_epochs(12, 9, 11)}
_SOLO = {**_RGB, **_OPTIM, **_epochs(36, 27, 33)}
# PaddleDetection, configs/solov2 and its _base_.
_PADDLE = {**_RGB, "optim.warmup_steps": 1000.0, "optim.warmup_factor": 0.0}
_PADDLE_3X = {**_PADDLE, **_epochs(36, 24, 33)}
_VD = {"model.backbone.deep_stem": True, "model.backbone.avg_down": True}
# AdelaiDet, configs/DenseCL.
_SYNC_BN = {
    "model.backbone.norm": "sync_bn",
    "model.backbone.freeze_at": 0,
    "model.fpn.norm": "sync_bn",
    "train.precise_bn": 200,
    "train.steps": 90_000,
    "optim.milestones": (60_000.0, 80_000.0),
}
# DiscoBox: the network and how it is tested; it is trained from boxes, which is not here.
_DISCO = {**_SOLO, "test.mask_threshold": 0.4, "optim.warmup_steps": 2000.0}
_DISCO |= _epochs(36, 33, 35)

_LIGHT_512 = {
    "model.dcn.stages": (3, 4, 5),
    "model.dcn.towers": "last",
    "model.ins_head.num_convs": 3,
    "targets.scale_ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)),
}
_TO_852 = {
    **_SHORT_SIDES,
    "input.max_size_train": 852,
    "input.max_size_test": 852,
    "input.min_size_test": 512,
}
_DEPTH = {n: {"model.backbone.depth": n} for n in (18, 34, 50, 101)}
_FROM_MMDET, _FROM_SOLO = "open-mmlab/mmdetection 3.3", "WXinlong/SOLO"
_FROM_PADDLE, _FROM_ADET = "PaddlePaddle/PaddleDetection", "aim-uofa/AdelaiDet"
_FROM_BOX, _FROM_DISCO = "LiWentomng/BoxInstSeg", "NVlabs/DiscoBox"

VARIANTS: dict[str, Variant] = {
    "adelaidet_r50": Variant(37.6, _FROM_ADET, {}),
    "adelaidet_r101": Variant(39.0, _FROM_ADET, _DEPTH[101]),
    "adelaidet_r50_1x_syncbn": Variant(35.2, f"{_FROM_ADET}, DenseCL", _SYNC_BN),
    "adelaidet_r50_1x_densecl": Variant(35.7, f"{_FROM_ADET}, DenseCL", {**_SYNC_BN, **_RGB}),
    "mmdet_r50_1x": Variant(34.8, _FROM_MMDET, {**_MMDET_1X, "input.min_sizes_train": (800,)}),
    "mmdet_r50": Variant(37.5, _FROM_MMDET, _MMDET),
    "mmdet_r101": Variant(39.1, _FROM_MMDET, {**_MMDET, **_DEPTH[101]}),
    "mmdet_r101_dcn": Variant(41.2, _FROM_MMDET, {**_MMDET, **_DEPTH[101], **_DCN}),
    "mmdet_x101_dcn": Variant(42.4, _FROM_MMDET, {**_MMDET, **_X101, **_DCN}),
    "mmdet_light_r18": Variant(29.7, _FROM_MMDET, {**_MMDET, **_DEPTH[18]}, light=True),
    "mmdet_light_r34": Variant(31.9, _FROM_MMDET, {**_MMDET, **_DEPTH[34]}, light=True),
    "mmdet_light_r50": Variant(33.7, _FROM_MMDET, {**_MMDET, **_DEPTH[50]}, light=True),
    "mmdet_light_r50_dcn": Variant(
        None, _FROM_MMDET, {**_MMDET, **_DEPTH[50], **_LIGHT_512}, light=True
    ),
    "solo_r50_1x": Variant(34.8, _FROM_SOLO, {**_SOLO_1X, "input.min_sizes_train": (800,)}),
    "solo_r50": Variant(37.5, _FROM_SOLO, _SOLO),
    "solo_r101": Variant(39.1, _FROM_SOLO, {**_SOLO, **_DEPTH[101]}),
    "solo_r101_dcn": Variant(41.4, _FROM_SOLO, {**_SOLO, **_DEPTH[101], **_DCN}),
    "solo_x101_dcn": Variant(42.4, _FROM_SOLO, {**_SOLO, **_X101, **_DCN}),
    "solo_light_448_r18": Variant(29.6, _FROM_SOLO, {**_SOLO, **_DEPTH[18]}, light=True),
    "solo_light_448_r34": Variant(32.0, _FROM_SOLO, {**_SOLO, **_DEPTH[34]}, light=True),
    "solo_light_448_r50": Variant(33.7, _FROM_SOLO, {**_SOLO, **_DEPTH[50]}, light=True),
    "solo_light_512_dcn_r50": Variant(
        36.4,
        _FROM_SOLO,
        {**_SOLO, **_DEPTH[50], **_LIGHT_512, **_TO_852, "model.dcn.version": 1},
        light=True,
    ),
    "paddle_r50_1x": Variant(
        35.5,
        _FROM_PADDLE,
        {**_PADDLE, **_epochs(12, 8, 11), "input.min_sizes_train": (800,)},
    ),
    "paddle_r50": Variant(38.0, _FROM_PADDLE, _PADDLE_3X),
    "paddle_r101_vd_dcn": Variant(
        42.7,
        _FROM_PADDLE,
        {
            **_PADDLE_3X,
            **_DEPTH[101],
            **_VD,
            **_DCN,
            "model.dcn.head_bias": True,
            "optim.warmup_steps": 2000.0,
            "optim.ema_decay": 0.9998,
        },
    ),
    "paddle_r50_vd_dcn_512": Variant(
        39.0,
        f"{_FROM_PADDLE}, enhanced",
        {
            **_PADDLE_3X,
            **_DEPTH[50],
            **_VD,
            **_DCN,
            **_TO_852,
            "model.backbone.norm": "sync_bn",
            "model.ins_head.num_convs": 3,
            "model.dcn.towers": "last",
            "model.dcn.head_bias": True,
            "targets.scale_ranges": base.get_config().targets.scale_ranges,
            "optim.ema_decay": 0.9998,
        },
        light=True,
    ),
    # Its files of 2020. Without DropBlock, crops, colours and lower rates in the backbone.
    "paddle_mobilenet_v3_448": Variant(
        30.0,
        f"{_FROM_PADDLE} 2.3, static/configs/solov2",
        {
            **_PADDLE,
            **_epochs(36, 24, 32),
            "model.backbone.name": "mobilenet_v3_large_paddle",
            "model.backbone.freeze_at": 0,
            "optim.ema_decay": 0.9998,
        },
        light=True,
    ),
    "discobox_r50": Variant(30.7, _FROM_DISCO, _DISCO),
    "discobox_r101_dcn": Variant(35.3, _FROM_DISCO, {**_DISCO, **_DEPTH[101], **_DCN}),
    "discobox_x101_dcn": Variant(37.3, _FROM_DISCO, {**_DISCO, **_X101, **_DCN}),
    "boxinstseg_discobox_r50": Variant(32.2, _FROM_BOX, _DISCO),
    "boxinstseg_discobox_r101": Variant(33.4, _FROM_BOX, {**_DISCO, **_DEPTH[101]}),
}


def get_config(variant: str = ""):
    """Returns the configuration of one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(
            f"no variant {variant!r}: write configs/zoo.py:NAME with one of {', '.join(VARIANTS)}"
        )
    chosen = VARIANTS[variant]
    config = light_448_r18.get_config() if chosen.light else base.get_config()
    config.input.max_buckets_train = 5  # a long run wins more by them than it waits
    for key, value in chosen.keys.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return config
