"""SOLOv2 light on one's own data: AdamW, cosine, a moving average, an evaluation per epoch.

    python train.py --data FOLDER --workdir runs/mine --config.init_from=WEIGHTS

The command takes this file where `--data` is given and `--config` is not, and sets sizes,
grids, batch, rate and epochs by what it finds in the data.
"""

from configs import light_448_r50


def get_config():
    """Returns the configuration."""
    config = light_448_r50.get_config()
    config.data.advice = True
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.2

    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-4
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 0.05
    config.optim.schedule = "cosine"
    config.optim.final_rate = 3e-6
    config.optim.clip_norm = 10.0
    config.optim.ema_decay = 0.998

    config.train.epochs = 36
    config.train.batch_size = 4
    config.train.patience = 12
    config.eval.raw_weights = False
    return config
