"""The self-test `train.py --overfit N`: can this set-up learn N images by heart?

Whatever is wrong with annotations, category ids, sizes, weights or normalisation shows
here in minutes: a network that cannot repeat what it saw has not been given what one
thinks.
"""

import logging
from typing import Any

log = logging.getLogger("solov2_jax")

# segm/AP50 on the training images from which on the test is passed. Learnt by heart,
# masks at a quarter of the size are far above it; a broken set-up stays near 0.
PASS_AP50 = 0.5
MIN_STEPS, STEPS_PER_IMAGE = 200, 25


def overfit_config(config: Any, number: int) -> Any:
    """Returns the config with what learning `number` images by heart takes.

    The same images in every epoch (one size, not augmented), a recipe for short runs,
    validation on the training images. Data, network and weights stay.
    """
    if number < 1:
        raise ValueError(f"--overfit {number}: give a number of images, such as 8")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.train.max_images = config.eval.max_images = number
        input_, optim, train = config.input, config.optim, config.train
        input_.flip_prob = 0.0
        input_.min_sizes_train = (input_.min_size_test,)
        input_.max_size_train = input_.max_size_test
        input_.buckets_train = input_.buckets_test
        augment, config.data.repeat_threshold = config.augment, 0.0
        augment.rotate_prob = augment.paste_prob = 0.0
        augment.brightness = augment.contrast = augment.saturation = 0.0
        augment.crop_size = augment.jitter_scale = ()
        train.batch_size = min(train.batch_size, number)
        train.steps = max(MIN_STEPS, STEPS_PER_IMAGE * number)
        train.checkpoint_every = train.eval_every = 0
        train.log_every = max(1, train.steps // 20)
        optim.name, optim.learning_rate, optim.reference_batch_size = "adamw", 5e-4, 0
        optim.schedule, optim.decay_steps, optim.final_rate = "cosine", 0, 0.0
        optim.warmup_steps, optim.clip_norm = train.steps // 10, 10.0
        optim.ema_decay = 0.0
        config.eval.num_pictures, config.eval.loss_images = number, 0
    return config


def verdict(metrics: dict[str, float], number: int) -> tuple[bool, str]:
    """Returns (whether the self-test is passed, one line that says so).

    Args:
      metrics: of the evaluation on the training images.
    """
    value = metrics["segm/AP50"]
    passed = value is not None and value >= PASS_AP50
    text = f"overfit {number}: segm/AP50 {value:.3f} on the images trained on: "
    if passed:
        return True, text + "passed"
    return False, text + (
        f"FAILED, {PASS_AP50} is the least. Look at eval/pictures (is the truth on the "
        "left right?), at the line about masks that are not learnt, if there is one, "
        "and at init_from: a pretrained backbone learns much faster"
    )
