"""SOLOv2, ResNet-50, with what the field trains with today: 270,000 steps of 16 images.

    python train.py --config configs/strong_r50.py --workdir runs/strong_r50 \
        --config.init_from=WEIGHTS --config.model.dtype=bfloat16

AdamW with lower rates towards the image and no frozen stage, large-scale jitter with copy and
paste until the last tenth, CondInst's auxiliary semantic loss, cosine, a moving average, and
denser grids. float32 unless `model.dtype` says otherwise: bfloat16 is for GPUs and TPUs. Each
lever is a key, and docs/recipes.md says what is known of it. Made for 8 GPUs; not trained to
the end by us.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    return strengthen(base.get_config())


def strengthen(config, size: int = 1024, grids=(56, 48, 32, 20, 14)):
    """Returns the configuration with the levers set.

    Args:
      size: of the square that jittered images are cut to, pixels.
      grids: cells per side on each level.
    """
    config.model.backbone.freeze_at = 0
    config.model.ins_head.num_grids = grids
    config.targets.max_pairs = 512
    config.loss.semantic_weight = 1.0

    config.augment.jitter_scale = (0.1, 2.0)
    config.augment.jitter_size = (size, size)
    config.augment.paste_prob = 0.5
    config.augment.stop_last = 0.1

    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-4
    config.optim.layer_decay = 0.7
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.final_rate = 2e-6
    config.optim.clip_norm = 10.0
    config.optim.ema_decay = 0.9998
    config.optim.reference_batch_size = 16
    return config
