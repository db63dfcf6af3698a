"""SOLOv2 light, ResNet-18, with the levers of configs/strong_r50.py: 270,000 steps of 16 images.

    python train.py --config configs/strong_light_r18.py --workdir runs/strong_light_r18 \
        --config.init_from=WEIGHTS --config.model.dtype=bfloat16

A larger run teaches it with --config.distill_from=WORKDIR, if its grids and ranges are these.
Not trained to the end by us.
"""

from configs import light_448_r18, strong_r50


def get_config():
    """Returns the configuration."""
    config = strong_r50.strengthen(light_448_r18.get_config(), size=512)
    config.augment.jitter_scale = (0.3, 1.8)
    return config
