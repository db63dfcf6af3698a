"""Crowded pictures of one's own, such as cells: grids so dense that touching objects have cells.

    python train.py --data FOLDER --config configs/dense.py --workdir runs/dense \
        --config.init_from=WEIGHTS

What `solov2 doctor --data FOLDER` says of grid collisions tells whether it is needed. Nothing
follows from the data here but the classes: sizes are those of configs/light_448_r50.py.
"""

from configs import finetune


def get_config():
    """Returns the configuration."""
    config = finetune.get_config()
    config.data.advice = False
    config.model.ins_head.num_grids = (80, 64, 40, 24, 16)
    config.targets.max_pairs = 1024
    config.augment.vflip_prob = 0.5
    config.augment.turn_prob = 0.75
    config.test.nms_pre = 1500
    config.test.max_candidates = 8192
    config.test.max_per_image = 500
    config.eval.max_detections = 500
    return config
