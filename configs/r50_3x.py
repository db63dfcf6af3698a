"""SOLOv2, ResNet-50, 3x schedule: 270,000 steps of 16 images.

    python train.py --config configs/r50_3x.py --workdir runs/r50_3x \
        --config.init_from=WEIGHTS

The reference publishes mask AP 37.6 on COCO val2017 for this recipe;
this configuration has not been trained to the end by us. Made for 8 GPUs: elsewhere set
`train.batch_size`, and with it `optim.learning_rate` in proportion.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.input.max_buckets_train = 5  # a long run wins more by them than it waits
    return config
