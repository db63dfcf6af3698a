"""The whole program on generated data, from random weights, on two CPU cores.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

Nothing is downloaded. `docs/results.md` has the measured time and AP.
"""

from configs import base


def get_config():
    """Returns the configuration: a small SOLOv2 for images of 128 pixels."""
    config = base.get_config()
    config.data.name = "shapes"
    config.data.num_workers = 0
    config.data.generated.num_train = 800
    config.data.generated.color_cue = 1.0
    config.data.generated.max_objects = 4
    config.data.generated.min_radius = 0.16
    config.data.generated.max_radius = 0.35

    config.model.backbone.depth = 18
    config.model.backbone.freeze_at = 0
    config.model.backbone.norm = "gn"
    config.model.fpn.channels = 128
    config.model.ins_head.num_convs = 2
    config.model.ins_head.channels = 128
    config.model.ins_head.num_kernels = 64
    config.model.ins_head.num_grids = (16, 16, 8, 6, 4)
    config.model.mask_head.channels = 64
    config.targets.scale_ranges = ((1, 32), (16, 64), (32, 96), (64, 128), (96, 512))
    config.targets.max_pairs = 64

    config.input.std = (57.375, 57.12, 58.395)
    config.input.min_sizes_train = (128,)
    config.input.max_size_train = config.input.max_size_test = 128
    config.input.min_size_test = 128

    config.optim.name = "adamw"
    config.optim.learning_rate = 0.001
    config.optim.warmup_steps = 50
    config.optim.milestones = (650, 820)
    config.optim.clip_norm = 10.0
    config.train.steps = 900
    config.train.batch_size = 4
    config.train.checkpoint_every = 300
    config.eval.batch_size = 8
    return config
