"""The self-test `train.py --overfit N`: can this set-up overfit N images?

Whatever is wrong with annotations, category ids, sizes, weights or normalisation shows
here in minutes: a network that cannot reproduce what it was trained on was not trained on
what one thinks.
"""

from collections.abc import Mapping
from typing import Any

from solov2_jax.io import InputError

# segm/AP50 on the training images from which on the test is passed. A network that has
# overfit is far above it, even with stride-4 masks; a broken set-up stays near 0.
PASS_AP50 = 0.5
MIN_STEPS, STEPS_PER_IMAGE = 200, 25


def overfit_config(config: Any, num_images: int) -> Any:
    """Returns the config with what overfitting the first `num_images` images takes.

    The same images in every epoch (one size, not augmented), a recipe for short runs,
    validation on the training images. Data, network and weights stay.
    """
    if num_images < 1:
        raise InputError(f"--overfit {num_images}: give a number of images, such as 8")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.train.max_images = config.eval.max_images = num_images
        input_, optim, train = config.input, config.optim, config.train
        input_.flip_prob = 0.0
        input_.min_sizes_train = (input_.min_size_test,)
        input_.max_size_train = input_.max_size_test
        input_.buckets_train = input_.buckets_test
        augment, config.data.repeat_threshold = config.augment, 0.0
        augment.rotate_prob = augment.paste_prob = 0.0
        augment.brightness = augment.contrast = augment.saturation = 0.0
        augment.crop_size = augment.jitter_scale = ()
        train.batch_size = min(train.batch_size, num_images)
        train.steps = max(MIN_STEPS, STEPS_PER_IMAGE * num_images)
        train.checkpoint_every = train.eval_every = 0
        train.log_every = max(1, train.steps // 20)
        optim.name, optim.learning_rate, optim.reference_batch_size = "adamw", 5e-4, 0
        optim.schedule, optim.decay_steps, optim.final_rate = "cosine", 0, 0.0
        optim.warmup_steps, optim.clip_norm = train.steps // 10, 10.0
        optim.ema_decay = 0.0
        config.eval.num_pictures, config.eval.loss_images = num_images, 0
    return config


def verdict(metrics: Mapping[str, float | None], num_images: int) -> tuple[bool, str]:
    """Returns (whether the self-test is passed, one line that says so).

    Args:
      metrics: of the evaluation on the training images.
    """
    value = metrics["segm/AP50"]
    passed = value is not None and value >= PASS_AP50
    shown = "undefined (no objects)" if value is None else f"{value:.3f}"
    text = f"overfit {num_images}: segm/AP50 {shown} on the training images: "
    if passed:
        return True, text + "passed"
    return False, text + (
        f"FAILED, at least {PASS_AP50} is needed. Look at eval/pictures (is the ground "
        "truth on the left right?), at the line that says why masks are not learned, if "
        "there is one, and at init_from: a pretrained backbone learns much faster"
    )
