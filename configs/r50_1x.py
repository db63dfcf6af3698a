"""SOLOv2, ResNet-50, 1x schedule: 90,000 steps of 16 images.

    python train.py --config configs/r50_1x.py --workdir runs/r50_1x \
        --config.init_from=WEIGHTS

The reference publishes mask AP 34.8 on COCO val2017 for this recipe;
this configuration has not been trained to the end by us. Made for 8 GPUs: elsewhere set
`train.batch_size`, and with it `optim.learning_rate` in proportion.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.input.max_buckets_train = 5  # a long run wins more by them than it waits
    config.train.steps = 90_000
    config.optim.milestones = (60_000, 80_000)
    return config
