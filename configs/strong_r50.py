"""SOLOv2, ResNet-50, with what helps beyond the reference's recipe: 270,000 steps.

    python train.py --config configs/strong_r50.py --workdir runs/strong_r50 \
        --config.init_from=WEIGHTS

Cosine schedule, CondInst's auxiliary semantic loss, gradients clipped as in the paper's
own code, a moving average of the weights, and a rate that follows `train.batch_size`. Made
for 8 GPUs; not trained to the end by us.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.loss.semantic_weight = 1.0
    config.optim.schedule = "cosine"
    config.optim.clip_norm = 35.0
    config.optim.ema_decay = 0.9998
    config.optim.reference_batch_size = 16
    return config
