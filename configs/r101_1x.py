"""SOLOv2, ResNet-101, 1x schedule: 90,000 steps of 16 images.

    python train.py --config configs/r101_1x.py --workdir runs/r101_1x \
        --config.init_from=WEIGHTS

The reference publishes no figure for this recipe;
this configuration has not been trained to the end by us. Made for 8 GPUs: elsewhere set
`train.batch_size`, and with it `optim.learning_rate` in proportion.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.input.max_buckets_train = 5  # a long run wins more by them than it waits
    config.model.backbone.depth = 101
    config.train.steps = 90_000
    config.optim.milestones = (60_000, 80_000)
    return config
