"""SOLOv2 light at 448 pixels, ResNet-34, 3x schedule: for real time and small machines.

    python train.py --config configs/light_448_r34.py --workdir runs/light_448_r34 \
        --config.init_from=WEIGHTS

The paper's authors publish mask AP 32.0 on COCO val2017 for this recipe; this
configuration has not been trained to the end by us.
"""

from configs import light_448_r18


def get_config():
    """Returns the configuration."""
    return light_448_r18.get_config(depth=34)
