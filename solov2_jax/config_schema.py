"""Which values the keys of a configuration may have."""

from collections.abc import Mapping
from typing import Any

AT_LEAST = {
    "model.num_classes": 0,
    "model.backbone.freeze_at": 0,
    "model.ins_head.num_convs": 1,
    "targets.max_pairs": 1,
    "data.max_instances": 0,
    "data.num_workers": 0,
    "data.num_threads": 0,
    "data.prefetch": 1,
    "optim.momentum": 0.0,
    "optim.weight_decay": 0.0,
    "optim.weight_decay_norm": 0.0,
    "optim.warmup_factor": 0.0,
    "optim.warmup_steps": 0,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "optim.reference_batch_size": 0,
    "optim.num_decays": 0,
    "optim.final_rate": 0.0,
    "optim.decay_steps": 0,
    "train.steps": 0,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.log_every": 0,
    "train.checkpoint_every": 0,
    "train.eval_every": 0,
    "train.keep_checkpoints": 1,
    "train.max_skipped": 1,
    "train.patience": 0,
    "train.precise_bn": 0,
    "train.histogram_every": 0,
    "train.watch_steps": 0,
    "data.train.max_images": 0,
    "eval.loss_images": 0,
    "eval.batch_size": 1,
    "eval.max_images": 0,
}
ABOVE_ZERO = ("optim.learning_rate", "optim.gamma", "loss.dice_weight")
_ONE_OF = {
    "optim.name": ("sgd", "adamw"),
    "optim.schedule": ("multistep", "cosine", "fixed_gamma"),
    "model.dtype": ("float32", "bfloat16"),
    "model.backbone.depth": (18, 34, 50, 101, 152),
    "model.backbone.norm": ("frozen_bn", "gn", "sync_bn"),
    "model.backbone.freeze_at": (0, 1, 2, 3, 4, 5),
    "test.nms_type": ("matrix", "mask"),
    "test.nms_kernel": ("gaussian", "linear"),
    "input.channel_order": ("BGR", "RGB"),
    "data.name": ("", "shapes", "tfds:FOLDER"),
    "eval.backend": ("fast", "pycocotools"),
}


def wrong_values(flat: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the values, a phrase for each impossible one.

    Args:
      flat: {"train.steps": 270000, ...}, every key.
    """
    wrong = []
    if missing := [k for k in (*AT_LEAST, *ABOVE_ZERO, *_ONE_OF) if k not in flat]:
        return [f"{', '.join(missing)} missing; add what configs/base.py has"]
    for key, least in AT_LEAST.items():
        if flat[key] < least:
            wrong.append(f"{key} = {flat[key]} must be at least {least}")
    for key in ABOVE_ZERO:
        if not flat[key] > 0:
            wrong.append(f"{key} = {flat[key]} must be above 0")
    for key, values in _ONE_OF.items():
        folder = key == "data.name" and str(flat[key]).startswith("tfds:")
        if flat[key] not in values and not folder:
            wrong.append(f"{key} = {flat[key]!r} must be one of {values}")
    for key in ("optim.momentum", "optim.ema_decay"):
        if flat[key] >= 1:
            wrong.append(f"{key} = {flat[key]} must be below 1")
    if flat["train.patience"] and not flat["train.eval_every"]:
        wrong.append("train.patience needs train.eval_every, and that is 0")
    if flat["train.precise_bn"] and flat["model.backbone.norm"] != "sync_bn":
        wrong.append("train.precise_bn is for model.backbone.norm = 'sync_bn' only")
    known = ("tensorboard", "csv", "wandb", "mlflow")
    if unknown := [name for name in flat["train.writers"] if name not in known]:
        wrong.append(f"train.writers has {unknown[0]!r}, which is not one of {known}")
    traced = flat["train.profile_steps"]
    if traced and not (len(traced) == 2 and 1 <= traced[0] <= traced[1]):
        wrong.append(f"train.profile_steps = {traced} must be () or (first, last)")
    milestones = flat["optim.milestones"]
    if not all(isinstance(m, int) for m in milestones):
        wrong.append(f"optim.milestones = {milestones} must be whole numbers (steps)")
    elif list(milestones) != sorted(set(milestones)):
        wrong.append(f"optim.milestones = {milestones} must increase")
    grids, ranges = flat["model.ins_head.num_grids"], flat["targets.scale_ranges"]
    if not len(grids) == len(ranges) == 5:
        wrong.append(
            f"model.ins_head.num_grids ({len(grids)}) and targets.scale_ranges "
            f"({len(ranges)}) must have one entry for each of the 5 levels"
        )
    return wrong
