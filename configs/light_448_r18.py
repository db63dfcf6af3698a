"""SOLOv2 light at 448 pixels, ResNet-18, 3x schedule: for real time and small machines.

    python train.py --config configs/light_448_r18.py --workdir runs/light_448_r18 \
        --config.init_from=WEIGHTS

The paper's authors publish mask AP 29.6 on COCO val2017 for this recipe; this
configuration has not been trained to the end by us.
"""

from configs import base


def get_config(depth: int = 18):
    """Returns the configuration; the other light variants differ in depth."""
    config = base.get_config()
    config.input.max_buckets_train = 5  # a long run wins more by them than it waits
    config.model.backbone.depth = depth
    config.model.ins_head.num_convs = 2
    config.model.ins_head.channels = 256
    config.model.ins_head.num_kernels = 128
    config.targets.scale_ranges = (
        (1, 56),
        (28, 112),
        (56, 224),
        (112, 448),
        (224, 896),
    )
    config.input.min_sizes_train = (352, 384, 416, 448, 480, 512)
    config.input.max_size_train = config.input.max_size_test = 768
    config.input.min_size_test = 448
    return config
