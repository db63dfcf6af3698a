"""Every key once: its default, range and unit, and in brackets the reference's key.

The values are those of the reference's `SOLOv2/R50_3x` unless a comment says
otherwise. A config is locked: an unknown key is an error that suggests the nearest.
The rules beside the defaults (`whole`, `number`, ...) are `solov2_jax.config_schema`'s;
`used` says when a key has an effect: giving it on the command line otherwise is an error.
"""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from solov2_jax.config_schema import (
    AUTO,
    IMPORT_PATH,
    METRIC_FORM,
    NAME,
    KeyRule,
    Section,
    choice,
    number,
    only,
    several,
    share,
    steps_or_share,
    switch,
    text,
    unless,
    whole,
)

# A size in pixels, and the (height, width) of a padded image.
_PIXELS = 65_536
_PADDED = several((32, 32), whole(32, 32, _PIXELS, multiple=32), 2)
_WRITERS = ("tensorboard", "csv", "wandb", "mlflow")
_WRITER = (f"{'|'.join(_WRITERS)}|{IMPORT_PATH[0]}", f"one of {_WRITERS} or {IMPORT_PATH[1]}")
_OUTLINES = ("ellipse", "rectangle", "triangle", "star", "ring")
_IMPORT_PATH = (r"[\w.]+:\w+", 'an import path such as "package.module:name"')
# When keys are used.
_FILES, _SHAPES = only("data.name", ""), only("data.name", "shapes")
_MATRIX, _GAUSSIAN = only("test.nms_type", "matrix"), only("test.nms_kernel", "gaussian")
_KEYPOINTS = only("data.mapper", "fcpose")
_NO_EPOCHS = only("train.epochs", 0)
_NO_JITTER = only("augment.jitter_scale", ())
_TAUGHT = unless("distill_from", "")
_BOXES = only("loss.box_supervised", True)
_RESNET = only("model.backbone.name", "resnet")
_DEEP = (_RESNET, only("model.backbone.depth", 50, 101, 152))
_LAYER_NORMS = ("convnext_t", "convnext_s", "swin_t", "swin_s", "dinov2_s")
_MOBILE = ("mobilenet_v3_large", "mobilenet_v3_large_paddle")
_BACKBONES = ("resnet", *_MOBILE, *_LAYER_NORMS)
_BACKBONE = (f"{'|'.join(_BACKBONES)}|{IMPORT_PATH[0]}", f"one of {_BACKBONES} or {IMPORT_PATH[1]}")

# What `augment.preset` sets, by name.
PRESETS: dict[str, dict[str, object]] = {
    "weak": {"scale": (0.8, 1.25), "brightness": 0.1, "contrast": 0.1, "saturation": 0.1},
    "medium": {
        "scale": (0.6, 1.5),
        **dict.fromkeys(("brightness", "contrast", "saturation"), 0.3),
        "hue": 0.015,
        "blur_prob": 0.05,
    },
    "strong": {
        "scale": (0.5, 2.0),
        **dict.fromkeys(("brightness", "contrast", "saturation"), 0.4),
        "hue": 0.02,
        "blur_prob": 0.1,
        "noise": 6.0,
        "jpeg_prob": 0.1,
        "cutout_prob": 0.2,
        "mosaic_prob": 0.5,
        "mixup_prob": 0.1,
        "stop_last": 0.1,
    },
    # Cells have no upper side; light, stain and focus differ between pictures.
    "microscopy": {
        "vflip_prob": 0.5,
        "turn_prob": 0.75,
        "scale": (0.7, 1.4),
        **dict.fromkeys(("brightness", "contrast"), 0.3),
        "saturation": 0.1,
        "hue": 0.01,
        "blur_prob": 0.2,
        "noise": 6.0,
    },
    # Seen from above: any direction, other heights, haze, compressed tiles.
    "aerial": {
        "vflip_prob": 0.5,
        "turn_prob": 0.75,
        "scale": (0.6, 1.6),
        **dict.fromkeys(("brightness", "contrast", "saturation"), 0.2),
        "hue": 0.01,
        "jpeg_prob": 0.1,
        "mosaic_prob": 0.3,
        "stop_last": 0.1,
    },
}

# Keys that had another name: {old: new}. An old one is still read, and a line says so.
RENAMED: dict[str, str] = {}
# Keys that an older config.json does not have, and the values by which it trained.
ABSENT: dict[str, Any] = {"input.max_buckets_train": 5}
# Keys that are gone, and why none is missed. One that is given is passed over with a line.
REMOVED = {
    "eval.exact_padding": "every image has the results of its own padding, in any shape",
}


def _leaves_something(patterns: tuple[str, ...]) -> bool:
    """Whether some parameter is not frozen, by one name of each kind in each part."""
    names = ("backbone/res3_0/conv1/kernel", "fpn/lateral2/kernel", "fpn/lateral2/bias")
    names += ("ins_head/cate_pred/kernel", "ins_head/cate_pred/bias")
    names += ("ins_head/cate_tower/gn0/scale", "ins_head/cate_tower/gn0/bias")
    names += ("mask_head/conv_pred/kernel", "mask_head/gn_pred/scale", "mask_head/gn_pred/bias")
    return not all(any(fnmatch.fnmatchcase(n, p) for p in patterns) for n in names)


def _undivided(c: Mapping[str, Any]) -> bool:
    """Whether some channels that are deformed are no multiple of model.dcn.groups."""
    fpn, channels, heads = c["model.fpn.channels"], [], c["model.ins_head.channels"]
    if c["model.dcn.towers"] != "none":
        channels.append(heads)
        if c["model.dcn.towers"] == "all" or c["model.ins_head.num_convs"] == 1:
            channels += [fpn, fpn + 2]
    if c["model.dcn.mask_head"]:
        channels += [c["model.mask_head.channels"], fpn, fpn + 2]
    if stages := c["model.dcn.stages"]:
        deep = c["model.backbone.depth"] >= 50
        width = c["model.backbone.groups"] * c["model.backbone.width_per_group"] if deep else 64
        channels.append(width * 2 ** (min(stages) - 2))
    return any(number % c["model.dcn.groups"] for number in channels)


# No names of validation sets: metrics and folders below eval/ have them.
_NOT_NAMES = ("segm", "bbox", "boundary", "val", "raw", "report", "pictures")

# What must hold between keys: (sentence, whether it does).
RELATIONS = (
    (
        "data.vals = %(data.vals)s: each must be (name, images, json) or (name, images, json, "
        f"metric), names of letters, digits, -, _ and ., no name twice, none of {_NOT_NAMES}, "
        f"the metric {METRIC_FORM[1]}",
        lambda c: (
            all(re.fullmatch(r"[\w.-]*\w[\w.-]*", v[0]) for v in c["data.vals"])
            and all(re.fullmatch(METRIC_FORM[0], v[3]) for v in c["data.vals"] if len(v) > 3)
            and len({v[0] for v in c["data.vals"]}) == len(c["data.vals"])
            and not {v[0] for v in c["data.vals"]} & set(_NOT_NAMES)
        ),
    ),
    (
        "data.name = %(data.name)r must be one of '', a name in data.providers, 'tfds:FOLDER'",
        lambda c: (
            re.fullmatch(r"|tfds:.+", c["data.name"], re.S)
            or f"data.providers.{c['data.name']}" in c
        ),
    ),
    (
        "train.patience needs train.eval_every, and that is 0",
        lambda c: (
            not c["train.patience"]
            or c["train.eval_every"] > 0
            or (c["train.epochs"] > 0 and c["train.eval_epochs"] > 0)
        ),
    ),
    (
        "train.precise_bn is for model.backbone.norm or model.fpn.norm = 'sync_bn' only, and "
        f"{', '.join(_LAYER_NORMS)} have no batch norm",
        lambda c: (
            not c["train.precise_bn"]
            or c["model.fpn.norm"] == "sync_bn"
            or (
                c["model.backbone.norm"] == "sync_bn"
                and c["model.backbone.name"] not in _LAYER_NORMS
            )
        ),
    ),
    (
        "model.dcn.stages = %(model.dcn.stages)s is for model.backbone.name = 'resnet', and that "
        "is %(model.backbone.name)r, which has no deformable convolutions; those of the heads, "
        "model.dcn.towers and model.dcn.mask_head, go with any backbone",
        lambda c: not c["model.dcn.stages"] or c["model.backbone.name"] == "resnet",
    ),
    (
        "model.dcn.groups = %(model.dcn.groups)s must divide the channels that are deformed: "
        "model.ins_head.channels, model.mask_head.channels, model.fpn.channels, these plus 2 "
        "for coordinates, and the backbone's",
        lambda c: not _undivided(c),
    ),
    (
        "model.fpn.norm = 'gn' needs model.fpn.channels = %(model.fpn.channels)s to be a "
        "multiple of 32",
        lambda c: c["model.fpn.norm"] != "gn" or c["model.fpn.channels"] % 32 == 0,
    ),
    (
        f"model.backbone.norm = 'gn' is not for {', '.join(_MOBILE)}, whose channels do not divide "
        "into groups of 32; 'sync_bn' is",
        lambda c: c["model.backbone.norm"] != "gn" or c["model.backbone.name"] not in _MOBILE,
    ),
    (
        "data.value_range = %(data.value_range)s must be (low, high), or that for each of "
        "data.channels = %(data.channels)s, every low below its high",
        lambda c: (
            len(c["data.value_range"]) in (0, 2, 2 * c["data.channels"])
            and all(
                low < high
                for low, high in zip(
                    c["data.value_range"][::2], c["data.value_range"][1::2], strict=True
                )
            )
        ),
    ),
    (
        "data.display_channels = %(data.display_channels)s must be below data.channels = "
        "%(data.channels)s",
        lambda c: all(n < c["data.channels"] for n in c["data.display_channels"]),
    ),
    (
        "input.mean = %(input.mean)s and input.std = %(input.std)s must have an entry for each "
        "of data.channels = %(data.channels)s, or one for all (or the three of RGB weights)",
        lambda c: all(
            len(c[key]) in (1, 3, c["data.channels"]) for key in ("input.mean", "input.std")
        ),
    ),
    (
        "data.generated.min_radius = %(data.generated.min_radius)s must not be above "
        "data.generated.max_radius = %(data.generated.max_radius)s",
        lambda c: c["data.generated.min_radius"] <= c["data.generated.max_radius"],
    ),
    (
        "optim.freeze = %(optim.freeze)s freezes every parameter: nothing is left to train",
        lambda c: _leaves_something(c["optim.freeze"]),
    ),
)


def get_config() -> ConfigDict:
    """Returns the base configuration: SOLOv2, ResNet-50, 3x schedule, COCO."""
    return keys().to_config()


def rules() -> dict[str, KeyRule]:
    """Returns {"train.steps": rule, ...} of every key."""
    return keys().rules()


def keys() -> Section:
    """Returns every key with its rule."""
    config = Section()

    # Seeds the parameters, the order of the data and every augmentation [SEED].
    config.seed = whole(0, high=2**32 - 1)
    # Weights to start from: a file (.npz, .safetensors), another run's workdir, or a name
    # such as "timm/resnet50.a1_in1k", "torchvision/resnet50", "hf:USER/REPO" or an https
    # address; "" starts from random weights. Ignored when the workdir resumes [MODEL.WEIGHTS].
    config.init_from = text("")
    # Keys in which the config contradicts what init_from's weights were trained with, on
    # purpose; `train.py` adds those that its command line gives.
    config.init_from_ignores = several(
        (),
        choice(
            "input.channel_order",
            ("input.channel_order", "input.mean", "input.std", "model.backbone.stride_in_1x1"),
        ),
        unique=True,
    )

    # A trained network that teaches this one: a run's workdir, "hf:USER/REPO", or a weights file
    # with the next key; of the same classes and grids. "": none. See `loss.distill_*`.
    config.distill_from = text("")
    # The config file of a weights file that `distill_from` names.
    config.distill_config = text("", used=_TAUGHT)

    config.model = model = Section()
    # Number of classes without background; 0: counted from the training annotations
    # [MODEL.SOLOV2.NUM_CLASSES].
    model.num_classes = whole(0, high=100_000)
    # "float32" or "bfloat16": the type convolutions compute in. Parameters, sums of their
    # gradients, norms' statistics, coordinates, class logits, losses and NMS stay float32
    # [SOLVER.AMP.ENABLED].
    model.dtype = choice("float32", ("float32", "bfloat16"))
    # How float32 products are computed where the device has faster ways: "default", TF32 on
    # NVIDIA and one bfloat16 pass on TPU; "high", TF32 and three passes; "highest", float32
    # everywhere. On a CPU they are the same.
    model.matmul_precision = choice("default", ("default", "high", "highest"))
    model.backbone = backbone = Section()
    # "resnet", "convnext_t", "convnext_s", "mobilenet_v3_large", PaddleDetection's form of it
    # "mobilenet_v3_large_paddle", "swin_t", "swin_s", "dinov2_s", or your own `Backbone` by
    # its import path, such as "mypackage.nets:Stub" (docs/training.md) [MODEL.BACKBONE.NAME].
    backbone.name = text("resnet", _BACKBONE)
    # Fields of other backbones than ResNet, such as `options.depths = (3, 3, 9, 3)` of
    # ConvNeXt, or those of your own: any key may stand here that the backbone has.
    backbone.options = Section()
    # 18, 34, 50, 101 or 152 [MODEL.RESNETS.DEPTH]
    backbone.depth = choice(50, (18, 34, 50, 101, 152), used=_RESNET)
    # Stages whose weights never change: 0 none, 1 stem, 2 stem and res2, ... 5 all
    # [MODEL.BACKBONE.FREEZE_AT].
    backbone.freeze_at = whole(2, high=5)
    # Stride of a bottleneck in its first 1x1 convolution (True: MSRA/Caffe weights) or
    # in its 3x3 (False: torchvision weights) [MODEL.RESNETS.STRIDE_IN_1X1].
    backbone.stride_in_1x1 = switch(True, used=_DEEP)
    # "frozen_bn" (pretrained weights); "sync_bn", trained with the statistics of all
    # devices' images, but for frozen stages; or "gn", group norm, which lets
    # the backbone start from random weights [MODEL.RESNETS.NORM].
    backbone.norm = choice(
        "frozen_bn",
        ("frozen_bn", "gn", "sync_bn"),
        used=unless("model.backbone.name", *_LAYER_NORMS),
    )
    # Groups of the 3x3 of bottlenecks: 32 or 64, 4 wide, are ResNeXt
    # [MODEL.RESNETS.NUM_GROUPS].
    backbone.groups = whole(1, 1, 1024, used=_DEEP)
    # Channels of each of these groups in res2; the next stages have twice as many
    # [MODEL.RESNETS.WIDTH_PER_GROUP].
    backbone.width_per_group = whole(64, 1, 1024, used=_DEEP)
    # Three 3x3 convolutions instead of the 7x7; with the next key, ResNet-D, also called vd.
    backbone.deep_stem = switch(False, used=_RESNET)
    # Shortcuts that halve by the mean of 2x2 instead of the stride.
    backbone.avg_down = switch(False, used=_RESNET)
    model.dcn = dcn = Section()
    # Deformable convolutions: stages of the backbone whose 3x3 are, such as (3, 4, 5)
    # [MODEL.RESNETS.DEFORM_ON_PER_STAGE].
    dcn.stages = several((), whole(3, 2, 5), (1, 4), rising="<", used=_RESNET)
    # Which convolutions of the instance head's towers are: "none", the "last", "all".
    dcn.towers = choice("none", ("none", "last", "all"))
    dcn.mask_head = switch(False)  # all of the mask head's
    # 1: offsets; 2: a factor for each tap besides [MODEL.RESNETS.DEFORM_MODULATED].
    dcn.version = choice(2, (1, 2))
    # Equal parts of the channels with offsets of their own [MODEL.RESNETS.DEFORM_NUM_GROUPS].
    dcn.groups = whole(1, 1, 64)
    # Biases in the heads' deformable convolutions, as PaddleDetection has.
    dcn.head_bias = switch(False)
    model.fpn = fpn = Section()
    fpn.channels = whole(256, 8, 8192, multiple=8)  # of p2 .. p6 [MODEL.FPN.OUT_CHANNELS]
    # "none"; "gn", group norm; "sync_bn", trained batch norm, see backbone.norm
    # [MODEL.FPN.NORM].
    fpn.norm = choice("none", ("none", "gn", "sync_bn"))
    model.ins_head = ins_head = Section()
    # Convolutions of each tower, classes and kernels [MODEL.SOLOV2.NUM_INSTANCE_CONVS].
    ins_head.num_convs = whole(4, 1, 64)
    # of the towers [MODEL.SOLOV2.INSTANCE_CHANNELS]
    ins_head.channels = whole(512, 32, 8192, multiple=32)
    # E, weights of a dynamic kernel [..NUM_KERNELS]
    ins_head.num_kernels = whole(256, 32, 8192, multiple=32)
    # Cells per side on each level, finest level first [MODEL.SOLOV2.NUM_GRIDS].
    ins_head.num_grids = several((40, 36, 24, 16, 12), whole(1, 1, 512), 5)
    # of the towers: "gn", or "none" for biases instead [MODEL.SOLOV2.NORM]
    ins_head.norm = choice("gn", ("gn", "none"))
    ins_head.prior_prob = number(0.01, above=0, below=1)  # initial class probability [..PRIOR_PROB]
    model.mask_head = mask_head = Section()
    # Of the convolutions before the mask features [MODEL.SOLOV2.MASK_CHANNELS].
    mask_head.channels = whole(128, 32, 8192, multiple=32)
    # As ins_head.norm; the mask features themselves are normalised in any case.
    mask_head.norm = choice("gn", ("gn", "none"))

    model.keypoint_head = keypoint_head = Section()
    # The key points of an object, whose heatmaps each cell's kernel makes too; (): none, or
    # with `data.mapper` "fcpose" those of the training json, which the run notes here
    # [MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS].
    keypoint_head.names = several((), text("nose", form=NAME), (1, 1000), unique=True)
    # Pairs of them, from 1, that pictures join by a line; noted likewise.
    keypoint_head.skeleton = several((), several((1, 2), whole(1, 1, 1000), 2), (1, 1000))
    # of the features that the heatmaps are made of, coordinates besides
    keypoint_head.channels = whole(32, 32, 8192, multiple=32)

    config.targets = targets = Section()
    # sqrt(box area), input pixels, both ends included; one pair per level
    # [MODEL.SOLOV2.FPN_SCALE_RANGES].
    targets.scale_ranges = several(
        ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
        several((1, 2), whole(1, high=1_000_000), 2, rising="<"),
        5,
    )
    # size of the centre region over the box's size [..SIGMA]
    targets.sigma = number(0.2, above=0, high=10)
    # Slots for (cell, mask) pairs per image. An image with more trains on a random
    # subset of them, which is counted in the metric `pairs_dropped`.
    targets.max_pairs = whole(256, 1, 1_000_000)

    config.loss = loss = Section()
    # Weight of cells with an object, 1 - alpha that of the others
    # [MODEL.SOLOV2.LOSS.FOCAL_ALPHA].
    loss.focal_alpha = number(0.25, above=0, below=1)
    # The larger, the less a cell counts that is right already
    # [MODEL.SOLOV2.LOSS.FOCAL_GAMMA].
    loss.focal_gamma = number(2.0, 0, high=100)
    # of the class loss [MODEL.SOLOV2.LOSS.FOCAL_WEIGHT]
    loss.focal_weight = number(1.0, 0, high=1e6)
    # of the mask loss [MODEL.SOLOV2.LOSS.DICE_WEIGHT]
    loss.dice_weight = number(3.0, above=0, high=1e6)
    # Of a mask's cross entropy pixel by pixel, over the object's pixels, beside dice: for thin
    # masks. 0: none.
    loss.mask_bce_weight = number(0.0, 0, high=1e6)
    # As focal_gamma, of these pixels; 0: all count the same.
    loss.mask_bce_gamma = number(2.0, 0, high=100, used=unless("loss.mask_bce_weight", 0.0))
    # Of the dice loss of the masks' borders, eight input pixels wide. 0: none.
    loss.boundary_weight = number(0.0, 0, high=1e6)
    # Of the distance to the teacher's soft masks of the same cells (`distill_from`), at the mask
    # loss's weight.
    loss.distill_mask_weight = number(3.0, 0, high=1e6, used=_TAUGHT)
    # Of the distance to where the teacher's mask features are strong.
    loss.distill_feature_weight = number(1.0, 0, high=1e6, used=_TAUGHT)
    # Whether objects with a box and no mask are trained on: the mask must fill the box, by its
    # projections, and be equal where neighbours have one colour (BoxInst). False: such
    # objects are dropped. Data whose objects all have masks trains as if it were not there.
    loss.box_supervised = switch(True)
    # Of the projections of masks that are learned from boxes; BoxInst's 1, at SOLOv2's weight
    # of the mask loss.
    loss.projection_weight = number(3.0, 0, high=1e6, used=_BOXES)
    # of the agreement of neighbours in these masks
    loss.pairwise_weight = number(3.0, 0, high=1e6, used=_BOXES)
    # Steps in which that weight rises from 0, in a straight line; below 1, a share of the run.
    loss.pairwise_warmup = steps_or_share(0.1, used=_BOXES)
    # Least similarity exp(-d / 2) of neighbours that should agree, d their distance in CIE
    # L*a*b* at a quarter of the size.
    loss.color_similarity = number(0.3, above=0, high=1, used=_BOXES)
    # Of the auxiliary loss of a head that tells the classes of each pixel of p2 .. p5 in
    # training; 0: there is none [MODEL.CONDINST.MASK_BRANCH.SEMANTIC_LOSS_ON].
    loss.semantic_weight = number(0.0, 0, high=1e6)

    # of the heatmaps of key points
    loss.keypoint_weight = number(1.0, 0, high=1e6, used=_KEYPOINTS)
    # Of their gaussians, pixels at a quarter of the size [MODEL.FCPOSE.HEATMAP_SIGMA].
    loss.keypoint_sigma = number(1.8, above=0, high=1000, used=_KEYPOINTS)
    # (cell, object) pairs of an image whose heatmaps are compared, at most: each is J maps.
    loss.keypoint_pairs = whole(64, 1, 1_000_000, used=_KEYPOINTS)

    config.test = test = Section()
    test.score_threshold = share(0.1)  # least class score [MODEL.SOLOV2.SCORE_THR]
    # Of the soft mask, from 0 to 1: what is above it is the object
    # [MODEL.SOLOV2.MASK_THR].
    test.mask_threshold = number(0.5, 0, below=1)
    test.update_threshold = share(0.05)  # least score after NMS [MODEL.SOLOV2.UPDATE_THR]
    test.nms_pre = whole(500, 1, 1_000_000)  # candidates that enter NMS [MODEL.SOLOV2.NMS_PRE]
    test.max_per_image = whole(100, 1, 1_000_000)  # detections kept [MODEL.SOLOV2.MAX_PER_IMG]
    # "matrix" or "mask" [MODEL.SOLOV2.NMS_TYPE]
    test.nms_type = choice("matrix", ("matrix", "mask"))
    # "gaussian" or "linear" [MODEL.SOLOV2.NMS_KERNEL]
    test.nms_kernel = choice("gaussian", ("gaussian", "linear"), used=_MATRIX)
    # of the gaussian kernel [MODEL.SOLOV2.NMS_SIGMA]
    test.nms_sigma = number(2.0, above=0, high=1e6, used=(_MATRIX, _GAUSSIAN))
    # IoU above which mask NMS suppresses
    test.nms_iou = number(0.5, 0, below=1, used=only("test.nms_type", "mask"))
    # Cell-class pairs above the score threshold whose masks are looked at, best score
    # first. The reference has no bound, and memory without bound.
    test.max_candidates = whole(4096, 1, 10_000_000)

    config.input = input_ = Section()
    # "BGR" or "RGB" [INPUT.FORMAT]. With other than three channels only what the weights of
    # `init_from` were trained with: the picture's own order stays.
    input_.channel_order = choice("BGR", ("BGR", "RGB"))
    # In channel order, of values 0..255 [MODEL.PIXEL_MEAN]. One for each of
    # `data.channels`, or one for all; three with other channels: these of an RGB picture, as
    # the stem's weights take them (docs/data.md).
    input_.mean = several((103.53, 116.28, 123.675), number(0.0, -1000, high=1000), (1, 1000))
    # in channel order, as `input.mean` [MODEL.PIXEL_STD]
    input_.std = several((1.0, 1.0, 1.0), number(1.0, above=0, high=1000), (1, 1000))
    # Short side in pixels, one drawn per image [INPUT.MIN_SIZE_TRAIN].
    input_.min_sizes_train = several(
        (640, 672, 704, 736, 768, 800), whole(800, 1, _PIXELS), (1, 1000), used=_NO_JITTER
    )
    # "choice": one of `min_sizes_train`; "range": any whole number from the smallest to
    # the largest of them [INPUT.MIN_SIZE_TRAIN_SAMPLING].
    input_.size_sampling = choice("choice", ("choice", "range"), used=_NO_JITTER)
    # long side at most [INPUT.MAX_SIZE_TRAIN]
    input_.max_size_train = whole(1333, 1, _PIXELS, used=_NO_JITTER)
    input_.min_size_test = whole(800, 1, _PIXELS)  # short side in pixels [INPUT.MIN_SIZE_TEST]
    input_.max_size_test = whole(1333, 1, _PIXELS)  # long side at most [INPUT.MAX_SIZE_TEST]
    # Share of the training images that are mirrored, left to right [INPUT.RANDOM_FLIP].
    input_.flip_prob = share(0.5)
    # Padded (height, width) shapes, multiples of 32; an image goes into the smallest
    # that holds it. (): derived from the sizes above. One compilation per shape.
    input_.buckets_train = several((), _PADDED, (1, 1000))
    # How many are derived at most. More waste fewer pixels: photographs at 640 to 800 pixels
    # have 1.46 times their own in 2 shapes, 1.24 in 4; each is compiled once more.
    input_.max_buckets_train = whole(2, 1, 50, used=only("input.buckets_train", ()))
    # The same for evaluation and prediction. (): derived from the data set or, by
    # `predict.py`, each image's own.
    input_.buckets_test = several((), _PADDED, (1, 1000))

    # Changes of training images beyond resize and flip, none by default. Boxes become
    # those of the masks, as in the reference where it crops.
    config.augment = augment = Section()
    # A named set of the values below, for photographs ("weak", "medium", "strong"), cells
    # ("microscopy") or pictures from above ("aerial"); "": none. Keys that you give win; what
    # it sets is printed, and stands in the run's config.json (docs/data.md).
    augment.preset = choice("", ("", *PRESETS))
    # Share of the images that are rotated; 0.5 in the reference [INPUT.IS_ROTATE].
    augment.rotate_prob = share(0.0)
    # to either side, at most
    augment.rotate_degrees = number(30.0, 0, high=180, used=unless("augment.rotate_prob", 0.0))
    # (): none; else smallest (height, width) of the part that is kept, over the
    # image's. It holds the centre of an object [INPUT.CROP.ENABLED, SIZE].
    augment.crop_size = several((), number(1.0, above=0, high=1), 2)
    # False: the part is enlarged until it cuts no object [INPUT.CROP.CROP_INSTANCE].
    augment.crop_objects = switch(True, used=unless("augment.crop_size", ()))
    augment.vflip_prob = share(0.0)  # share of the images that are put upside down, mirrored
    # Share of the images that are turned by one, two or three quarters.
    augment.turn_prob = share(0.0)
    # (): none; else (lowest, highest) times the size that the image would have; what is
    # larger than that size is cut to it at a random place. (0.5, 1.5) is common.
    augment.scale = several((), number(1.0, above=0, high=100), 2, rising="<=", used=_NO_JITTER)
    augment.brightness = share(0.0)  # factor 1 - x to 1 + x
    augment.contrast = share(0.0)  # likewise, around the mean grey
    augment.saturation = share(0.0)  # likewise, around each pixel's grey
    augment.hue = number(0.0, 0, high=0.5)  # every hue, by up to x of the whole circle
    augment.blur_prob = share(0.0)  # share of the images that are blurred
    # of the gaussian, pixels of the network's input, at most
    augment.blur_sigma = number(2.0, above=0, high=100, used=unless("augment.blur_prob", 0.0))
    # Largest standard deviation of the noise that is added, of 255; from 0 on, per image.
    augment.noise = number(0.0, 0, high=255)
    augment.jpeg_prob = share(0.0)  # share of the images that are compressed, as JPEG has it
    # (lowest, highest) quality
    augment.jpeg_quality = several(
        (40, 90), whole(1, 1, 100), 2, rising="<=", used=unless("augment.jpeg_prob", 0.0)
    )
    # Share of the images that are hidden in part, by rectangles of one colour. What they
    # hide is cut from the objects' masks.
    augment.cutout_prob = share(0.0)
    # (lowest, highest) side of a rectangle, over the image's shorter side
    augment.cutout_size = several(
        (0.05, 0.25),
        number(0.1, above=0, high=1),
        2,
        rising="<=",
        used=unless("augment.cutout_prob", 0.0),
    )
    # rectangles, at most
    augment.cutout_holes = whole(3, 1, 100, used=unless("augment.cutout_prob", 0.0))
    # (): none; else (lowest, highest): large-scale jitter. The image is scaled to so
    # many times what fits into `jitter_size` (height, width), and cut to that; replaces
    # `input.min_sizes_train` and its padded shapes. (0.1, 2.0) is common.
    augment.jitter_scale = several((), number(1.0, above=0, high=100), 2, rising="<=")
    # (height, width) after large-scale jitter.
    augment.jitter_size = several(
        (1024, 1024), whole(1, 1, _PIXELS), 2, used=unless("augment.jitter_scale", ())
    )
    # Images that get objects of another training image, each of its objects with
    # probability 0.5. Wants `jitter_scale`, as in the paper, but works without.
    augment.paste_prob = share(0.0)
    # Images that share their padded shape with three other training images.
    augment.mosaic_prob = share(0.0)
    # Images that another training image is laid over, half transparent, with its objects.
    augment.mixup_prob = share(0.0)
    # The end of the run, in which no images are joined (mosaic, mixup, copy and paste): below
    # 1 a share of it, else steps; 0: they are joined until the end.
    augment.stop_last = steps_or_share(0.0)
    # The same in epochs, where epochs are given; `stop_last` is derived from it. 0: that counts.
    augment.stop_last_epochs = number(0.0, 0, high=1e6, used=unless("train.epochs", 0))
    # Your own augmentations: import paths such as ("mypackage.aug:cutout",) of functions
    # that get a `solov2_jax.data.augment.Sample` and return it changed, or of albumentations'
    # transforms (their classes too, "albumentations:CLAHE"), called one after another on the
    # otherwise finished image; see docs/data.md.
    augment.custom = several((), text("", form=_IMPORT_PATH), (1, 100))

    config.data = data = Section()
    data.train = Section()
    # folder of images [DATASETS.TRAIN]
    data.train.images = text("datasets/coco/train2017", used=_FILES)
    # COCO instances json of these images; `file_name` is relative to the folder.
    data.train.annotations = text(
        "datasets/coco/annotations/instances_train2017.json", form=NAME, used=_FILES
    )
    # Folder with a .npz file for each image, whose array `mask` holds the class of each pixel:
    # 0 background, 1 the first class of the json by id, 255 unknown; what loss.semantic_weight
    # trains on. "": the objects' masks [MODEL.BASIS_MODULE.LOSS_ON].
    data.train.semantic_masks = text("", used=unless("loss.semantic_weight", 0.0))
    data.train.max_images = whole(0)  # the first so many are trained on; 0: all
    data.val = Section()
    data.val.images = text("datasets/coco/val2017", used=_FILES)  # folder of images [DATASETS.TEST]
    # COCO instances json, with the same categories as the training data's.
    data.val.annotations = text(
        "datasets/coco/annotations/instances_val2017.json", form=NAME, used=_FILES
    )
    # What scores the validation data: "coco", "lvis", "cityscapes", "voc", "boundary", or a
    # class of your own by its import path; "auto": "lvis" for LVIS's json, "cityscapes" for
    # the folder gtFine/val as annotations, else "coco".
    data.val.metric = text("auto", form=METRIC_FORM)
    # Further validation sets: (name, images, json) each, or (name, images, json, metric). A
    # metric's name is then NAME/segm/AP, also for train.best_metric; files go into
    # eval/NAME.
    data.vals = several(
        (), several(("name", "images", "json"), text("", form=NAME), (3, 4)), (1, 100)
    )
    # "": objects and their masks. "fcpose": key points too, which the network then learns
    # (docs/data.md) [MODEL.FCPOSE_ON].
    data.mapper = choice("", ("", "fcpose"))
    # Pairs of names of key points that change places in a mirrored image; (): "left" and
    # "right" in the names.
    data.flip_pairs = several(
        (), several(("left", "right"), text("", form=NAME), 2), (1, 1000), used=_KEYPOINTS
    )
    # Of every picture: 3, or another number (grey, RGB with depth, multispectral).
    data.channels = whole(3, 1, 1000)
    # (): 8 bits. (low, high) of the pictures' values, integers of 16 bits or floating-point
    # numbers, or low and high of each channel, one after the other: they become 0..255 in
    # float32; what is beyond is cut off.
    data.value_range = several((), number(0.0), (2, 2000))
    # Channels, from 0 on, that are shown as red, green and blue; (): the first three, or
    # the first as grey.
    data.display_channels = several((), whole(0, high=999), 3)
    # "": those of data.train and data.val. "shapes": the embedded generated data set,
    # written below `data.generated.root` on first use, replaces them. "tfds:FOLDER":
    # the records that `solov2 tfds` wrote do.
    data.name = text("")
    # Further values of `data.name`: name -> import path of a function that takes the config
    # and returns ((images, json), (images, json)) of training and validation. Your own:
    # `config.data.providers.mine = "mypackage.data:files"`, `config.data.name = "mine"`.
    data.providers = Section()
    # Of the embedded generated data set.
    data.providers.shapes = text("solov2_jax.tools.synthetic.shapes:data_files", form=NAME)
    data.generated = generated = Section()
    # Folder that it is written below.
    generated.root = text("datasets/shapes", form=NAME, used=_SHAPES)
    generated.num_train = whole(400, 1, 10_000_000, used=_SHAPES)  # training images
    generated.num_val = whole(64, 1, 10_000_000, used=_SHAPES)  # validation images
    # height, width
    generated.image_size = several((128, 128), whole(128, 32, 8192), 2, used=_SHAPES)
    generated.seed = whole(0, high=2**32 - 1, used=_SHAPES)  # of the images' contents
    # Any of these five; a class is an outline.
    generated.classes = several(
        _OUTLINES, choice("ellipse", _OUTLINES), (1, 5), unique=True, used=_SHAPES
    )
    # Whether objects have key points, their middle and their outermost corners.
    generated.keypoints = switch(False, used=_SHAPES)
    # Share of objects whose hue tells their class; at 0 only the outline does, which
    # takes far longer to learn.
    generated.color_cue = share(0.0, used=_SHAPES)
    generated.max_objects = whole(6, 1, 1000, used=_SHAPES)  # per image
    # of an object, over the image's shorter side
    generated.min_radius = number(0.09, above=0, high=1, used=_SHAPES)
    generated.max_radius = number(0.30, above=0, high=1, used=_SHAPES)  # likewise
    # Whether `train.py --data` sets sizes, grids, batch, rate, epochs and limits by what it
    # finds in the data; what is given on the command line stays.
    data.advice = switch(False)
    # Train on images without objects too. The reference drops them
    # [DATALOADER.FILTER_EMPTY_ANNOTATIONS].
    data.keep_empty = switch(True)
    # Show images of rare classes more often: of an image's rarest class, sqrt of this
    # over the share of images that have it, times an epoch. 0: every image once; LVIS
    # is trained with 0.001 [DATALOADER.REPEAT_THRESHOLD].
    data.repeat_threshold = share(0.0)
    # Share of the objects whose masks are trained on, drawn by `seed`; of the others the box
    # alone is. Below 1 it measures what boxes would have given.
    data.mask_share = share(1.0, used=_BOXES)
    # Padded objects per image; 0: the largest number in the annotations.
    data.max_instances = whole(0, high=100_000)
    data.num_workers = whole(4, high=1024)  # processes; 0: threads only [DATALOADER.NUM_WORKERS]
    data.num_threads = whole(2, high=1024)  # reading threads per process
    data.prefetch = whole(2, 1, 1024)  # batches ready per worker

    config.optim = optim = Section()
    # "sgd", as the reference, or "adamw", which wants a rate of about 1e-4 to 1e-3.
    optim.name = choice("sgd", ("sgd", "adamw"))
    # For 16 images per step; not scaled unless the next key says so [SOLVER.BASE_LR].
    optim.learning_rate = number(0.01, above=0, high=1000)
    # Images per step that the rate is meant for: it is multiplied by train.batch_size /
    # reference_batch_size; 0: it is taken as it is [SOLVER.REFERENCE_WORLD_SIZE].
    optim.reference_batch_size = whole(0, high=1_000_000)
    # Factor on the rate per layer of the backbone, counted from its end: a layer that is i
    # layers before the FPN trains at the rate times this to the power of i (`Backbone.layers`);
    # 1: all at one rate. About 0.8 for ConvNeXt with "adamw".
    optim.layer_decay = number(1.0, above=0, high=1)
    optim.momentum = number(0.9, 0, below=1)  # of SGD; Adam's first beta [SOLVER.MOMENTUM]
    # of all but norms' parameters [SOLVER.WEIGHT_DECAY]
    optim.weight_decay = number(1e-4, 0, high=1000)
    # on norm parameters [SOLVER.WEIGHT_DECAY_NORM]
    optim.weight_decay_norm = number(0.0, 0, high=1000)
    # The rate of the first step over the rate after warm-up [SOLVER.WARMUP_FACTOR].
    optim.warmup_factor = share(0.01, used=unless("optim.warmup_steps", 0))
    # Steps in which the rate rises, in a straight line; below 1, a share of the run
    # [SOLVER.WARMUP_ITERS].
    optim.warmup_steps = steps_or_share(1000.0)
    # "multistep": times gamma at each milestone; "fixed_gamma": `num_decays` times, at
    # equal distances; "cosine": half a cosine down to `final_rate`
    # [SOLVER.LR_SCHEDULER_NAME].
    optim.schedule = choice("multistep", ("multistep", "cosine", "fixed_gamma"))
    # Steps after which "multistep" lowers the rate; numbers below 1 are shares of the
    # run, (0.78, 0.93) [SOLVER.STEPS].
    optim.milestones = several(
        (210_000, 250_000),
        steps_or_share(1),
        rising="<",
        used=only("optim.schedule", "multistep"),
    )
    # factor at each milestone or decay [SOLVER.GAMMA]
    optim.gamma = number(
        0.1, above=0, high=10, used=only("optim.schedule", "multistep", "fixed_gamma")
    )
    # of "fixed_gamma" [SOLVER.NUM_DECAYS]
    optim.num_decays = whole(3, high=1000, used=only("optim.schedule", "fixed_gamma"))
    # That "cosine" ends at; scaled as the rate is [SOLVER.BASE_LR_END].
    optim.final_rate = number(0.0, 0, high=1000, used=only("optim.schedule", "cosine"))
    # Steps that "fixed_gamma" and "cosine" are spread over, and after which the rate
    # stays; 0: train.steps. Set it to train longer without changing what was done.
    optim.decay_steps = whole(0, used=only("optim.schedule", "fixed_gamma", "cosine"))
    # Largest L2 norm of the whole gradient; 0: no clipping, as the reference. The
    # paper's own code clips at 35 [SOLVER.CLIP_GRADIENTS].
    optim.clip_norm = number(0.0, 0, high=1e9)
    # Decay per step of a moving average of the weights, such as 0.9998, which is then
    # evaluated and used besides the weights themselves; lower in the first steps; 0: no
    # average.
    optim.ema_decay = number(0.0, 0, below=1)
    # Parameters that are not trained, besides `backbone.freeze_at`: patterns of their
    # names, such as ("backbone/res3_*", "fpn/*"). A batch norm whose parameters are all
    # frozen keeps its statistics too.
    optim.freeze = several((), text("", form=(r"[^\0]+", "patterns of names")), (1, 1000))

    config.train = train = Section()
    # Optimiser steps in all; where epochs are given, derived from them [SOLVER.MAX_ITER].
    train.steps = whole(270_000, used=_NO_EPOCHS)
    # Passes over the training images, which `train.steps` is derived from; 0: that counts.
    train.epochs = number(0.0, 0, high=1e6)
    # Epochs between evaluations, where epochs are given, with a checkpoint at each; 0:
    # only the end is evaluated.
    train.eval_epochs = number(1.0, 0, high=1e6, used=unless("train.epochs", 0))
    # Images per step, over all devices; "auto": as many as the devices' memory holds by two
    # compilations of the step, a sixteenth of the training images at most. The rate follows:
    # `optim.reference_batch_size`, if 0, is the number that "auto" replaced
    # [SOLVER.IMS_PER_BATCH].
    train.batch_size = whole(
        16, 1, 1_000_000, words=(AUTO,), meant_for="optim.reference_batch_size"
    )
    # Microbatches computed one after the other, to save memory. The losses
    # and gradients are those of the whole batch.
    train.accumulate = whole(1, 1, 1_000_000)
    train.log_every = whole(20)  # steps between two lines of metrics; 0: none
    # Steps; the end is always saved. 0: only that [SOLVER.CHECKPOINT_PERIOD].
    train.checkpoint_every = whole(5000)
    # Steps; the end is always evaluated. 0: only that. Where epochs are given, derived
    # from `eval_epochs` [TEST.EVAL_PERIOD].
    train.eval_every = whole(0, used=_NO_EPOCHS)
    # The newest ones, two at least; the best is kept besides.
    train.keep_checkpoints = whole(3, 1, 1_000_000)
    # Training batches over which the statistics of trained batch norms are computed
    # before each evaluation; 0: running averages [TEST.PRECISE_BN.NUM_ITER].
    train.precise_bn = whole(0, high=1_000_000)
    # Besides console and metrics.jsonl: "tensorboard", "csv" (metrics.csv), with their
    # packages installed "wandb" and "mlflow", and your own `WriterBase` by its import
    # path, such as "mypackage.writers:MyWriter".
    train.writers = several(("tensorboard",), text("csv", _WRITER), unique=True)
    # Import paths of your own `HookBase` classes, called after those that are always
    # there, such as ("mypackage.hooks:MyHook",).
    train.hooks = several((), text("module:name", IMPORT_PATH))
    # Import paths of functions (config, training data, validation data) -> anything,
    # called before a run writes anything; one that raises stops it.
    train.checks = several(
        ("solov2_jax.tools.doctor.start:check_at_start",), text("module:name", IMPORT_PATH)
    )
    # What is made of each evaluation of a run: import paths of functions of one
    # `solov2_jax.evaluation.evaluate.FinishedEvaluation`, whose `checkpoint` is (workdir, step).
    # The default finds the scores of `--score best`. One that fails is told in a line; ():
    # none.
    train.after_evaluation = several(
        ("solov2_jax.tools.report.thresholds:write_thresholds",), text("module:name", IMPORT_PATH)
    )
    # The same for the last evaluation, when a run ends; the default writes
    # eval/report/report.html.
    train.after_training = several(
        ("solov2_jax.tools.report.page:write_run_report",), text("module:name", IMPORT_PATH)
    )
    # Steps; histograms of the parameters, in TensorBoard; 0: never.
    train.histogram_every = whole(0)
    # (first, last) of the steps whose trace is written to the workdir's profile/; ():
    # none.
    train.profile_steps = several((), whole(1, 1), 2, rising="<=")
    # Steps in a row whose loss or gradient is not finite before training stops. Such a
    # step changes neither parameters nor optimiser.
    train.max_skipped = whole(10, 1)
    # The metric of the evaluation that makes a checkpoint the best. Of a loss, less is
    # better.
    train.best_metric = text("segm/AP", form=(r"[^\s\0]+", "a metric's name"))
    # Evaluations, every `eval_every` steps, without a new best before training ends;
    # 0: it never ends early.
    train.patience = whole(0, high=1_000_000)
    # Steps that the mask loss may stay where it starts before a line says why; 0: any.
    train.watch_steps = whole(500, used=unless("train.log_every", 0))

    config.eval = Section()
    config.eval.batch_size = whole(1, 1, 100_000)  # images per step and device
    config.eval.max_images = whole(0)  # the first so many are evaluated; 0: all
    # Validation images whose loss is computed at each evaluation, in whole batches of
    # train.batch_size, as val/loss; 0: none.
    config.eval.loss_images = whole(0)
    # Of a run with a moving average, whether its evaluations look at the weights
    # themselves too, under "raw/": twice the time.
    config.eval.raw_weights = switch(True, used=unless("optim.ema_decay", 0))
    # What computes AP: "fast", hotcoco, whose metrics are equal to pycocotools' to the
    # last digit, or "pycocotools" itself, about twenty times slower.
    config.eval.backend = choice("fast", ("fast", "pycocotools"))
    # Detections per image and class that AP counts. Beyond COCO's 100 the metrics with
    # both limits are given: segm/AP and, say, segm/AP@300.
    config.eval.max_detections = whole(100, 100, 1_000_000)
    # Sides in pixels between size ranges of your own, whose AP and AR are added: (16, 64)
    # gives segm/AP_0-16, segm/AP_16-64 and segm/AP_64-inf. "lvis", "coco" and "boundary".
    config.eval.size_ranges = several((), whole(32, 1, _PIXELS), (1, 100), rising="<")
    # One for each key point: how exact its place is, in COCO's OKS; (): COCO's for its 17,
    # else 1 over their number [TEST.KEYPOINT_OKS_SIGMAS].
    config.eval.keypoint_sigmas = several(
        (), number(0.1, above=0, high=100), (1, 1000), used=_KEYPOINTS
    )
    # What is made of every finished evaluation, in this order: import paths
    # "module:name" of functions of one `solov2_jax.evaluation.evaluate.FinishedEvaluation`. The
    # first logs why AP is 0, the second draws `num_pictures` images into eval/pictures.
    config.eval.reports = several(
        (
            "solov2_jax.tools.report.diagnosis:log_diagnosis",
            "solov2_jax.tools.report.pictures:write_pictures",
        ),
        text("", form=(r"[\w.]+:\w+", "an import path such as package.module:name")),
        unique=True,
    )
    # Images drawn with ground truth beside prediction [VIS_PERIOD].
    config.eval.num_pictures = whole(16, high=100_000)

    # Keys of your own: `config.user.margin = 3` in a config file. Nothing reads them but
    # what you wrote (augmentations, hooks, checks), and any key may stand here.
    config.user = Section()

    return config
