"""From a config to a task: the one place in training that unpacks the config."""

import functools
import hashlib
import logging
import math
import pathlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from solov2_jax import distributed
from solov2_jax.data.buckets import Bucket
from solov2_jax.data.build import (
    build_eval_batches,
    build_loss_batches,
    build_train_batches,
    has_own_padding,
    load_datasets,
    load_further_vals,
    with_keypoints,
)
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.custom_augment import try_first_image
from solov2_jax.data.pipeline import Batches, epoch_images
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import (
    FinishedEvaluation,
    build_evaluator,
    build_reports,
    evaluate,
)
from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_backbone, build_model
from solov2_jax.training.loss import Loss, ValidationLoss, build_loss
from solov2_jax.training.optim import (
    build_schedule,
    check_groups,
    describe_rate,
    layer_rates,
    make_optimizer,
    trainable_mask,
)
from solov2_jax.training.teacher import load_teacher
from solov2_jax.training.terms import build_terms
from solov2_jax.user_code import import_function, named_failure

PyTree = Any
Evaluate = Callable[[dict[str, PyTree]], Mapping[str, float | None]]

log = logging.getLogger("solov2_jax")


@dataclass(frozen=True)
class Task:
    """What is trained: everything that the loop does not know by itself.

    The loop knows this, and neither SOLOv2 nor COCO.
    """

    config: Any  # resolved: the number of classes is filled in
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    init: Callable[[jax.Array], dict[str, PyTree]]  # key -> variables
    loss: Loss
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: PyTree
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]]  # from a step on
    evaluate: Evaluate  # of variables
    fingerprint: str  # of the training data's content
    # Padded (height, width) of the batches from a step on, (): not known beforehand.
    buckets: Callable[[int], Sequence[Bucket]] = lambda step: ()
    metric_names: tuple[str, ...] = ()  # that `evaluate` returns; (): not known beforehand
    # The latest evaluation, or nothing: before the first, and in all processes but the first.
    finished: deque[FinishedEvaluation] = field(default_factory=lambda: deque(maxlen=1))


def build_task(config: Any, workdir: pathlib.Path, *, val_is_train: bool = False) -> Task:
    """Returns the SOLOv2 task that a config describes; writes nothing.

    Args:
      val_is_train: evaluate on the training images instead of the validation's.
    """
    train, val = checked_datasets(config, val_is_train=val_is_train)
    num_classes = len(train.class_names)
    config = with_keypoints(in_steps(config, train), train)
    config.model.num_classes = num_classes
    model = build_model(config, num_classes, auxiliary=True)

    image = jax.ShapeDtypeStruct((1, 64, 64, config.data.channels), jnp.float32)

    def init(key: jax.Array) -> dict[str, PyTree]:
        # Lazy: the forward pass is traced for its shapes and not computed.
        return dict(model.lazy_init(key, image))

    params = _shapes_of(init, config.model.backbone.name)["params"]
    trainable = build_trainable(config, params)
    log_trainable(params, trainable)
    log.info("%s", describe_rate(config))
    schedule, tx = build_optimizer(config, trainable)
    teacher = load_teacher(config, train.class_names)
    own_padding = has_own_padding(config, train)
    loss = build_loss(config, model, teacher=teacher, own_padding=own_padding)
    finished: deque[FinishedEvaluation] = deque(maxlen=1)
    validations = build_validations(config, val, alone=val_is_train)
    evaluate_val = build_evaluate(config, model, validations, workdir, finished)
    if config.eval.loss_images:
        evaluate_val = with_validation_loss(evaluate_val, config, model, val)

    @functools.lru_cache(maxsize=1)
    def source(step: int) -> Batches:
        made = build_train_batches(config, train, step, _shard())
        made.packed = True
        return made

    if config.augment.custom:
        try_first_image(source(0).maker)

    def batches(step: int) -> Generator[dict[str, np.ndarray], None, None]:
        yield from source(step)

    return Task(
        config=config,
        class_names=tuple(train.class_names),
        category_ids=tuple(train.category_ids),
        init=init,
        loss=loss,
        tx=tx,
        schedule=schedule,
        trainable=trainable,
        batches=batches,
        buckets=lambda step: source(step).maker.schedule.used_buckets(step),
        evaluate=evaluate_val,
        fingerprint=fingerprint(train),
        metric_names=metric_names(config, validations),
        finished=finished,
    )


def _shapes_of(init: Callable[[jax.Array], PyTree], backbone: str) -> PyTree:
    """Returns the shapes of the variables; what a backbone of the user's raises is named."""
    own = ":" in backbone
    with named_failure(f"model.backbone.name: {backbone}") if own else nullcontext():
        return jax.eval_shape(init, jax.random.key(0))


def checked_datasets(config: Any, *, val_is_train: bool) -> tuple[CocoDataset, CocoDataset]:
    """Returns training and validation data, after the functions of `train.checks`."""
    train, val = load_datasets(config)
    val = train if val_is_train else val
    for path in config.train.checks:
        import_function(path, "train.checks", ("config", "train", "val"))(config, train, val)
    if not len(val.labels) and val.counts["no_segmentation"]:
        log.warning(
            "%s: its objects have no masks, so AP of masks is undefined and no checkpoint the "
            "best; give validation images with masks",
            val.annotation_file,
        )
    return train, val


def in_steps(config: Any, train: Any) -> Any:
    """Returns a copy of the config, its epochs over these training images as steps.

    `train.steps`, `train.eval_every`, `augment.stop_last` and, unless it is shorter,
    `train.checkpoint_every` are set where `train.epochs` is; shares of the run stay shares.
    """
    config = config.copy_and_resolve_references()
    values = config.train
    if not values.epochs:
        return config
    images = epoch_images(
        train,
        keep_empty=config.data.keep_empty,
        max_images=config.data.train.max_images,
        repeat_threshold=config.data.repeat_threshold,
    )
    per_epoch = images / values.batch_size
    values.steps = max(1, math.ceil(values.epochs * per_epoch))
    values.eval_every = max(1, round(values.eval_epochs * per_epoch)) if values.eval_epochs else 0
    if config.augment.stop_last_epochs:
        config.augment.stop_last = float(round(config.augment.stop_last_epochs * per_epoch))
    if values.eval_every and values.checkpoint_every:
        values.checkpoint_every = min(values.checkpoint_every, values.eval_every)
    log.info(
        "%g epochs of %.0f images are %d steps of %d images; %s",
        values.epochs,
        images,
        values.steps,
        values.batch_size,
        f"evaluated every {values.eval_every} steps"
        if values.eval_every
        else "evaluated at the end",
    )
    return config


def _shard() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def build_trainable(config: Any, params: PyTree) -> PyTree:
    """Returns a tree of bools: which of these parameters are trained."""
    backbone, patterns = config.model.backbone, tuple(config.optim.freeze)
    stages = build_backbone(config).stages()
    frozen = f"model.backbone.freeze_at = {backbone.freeze_at}"
    check_groups(params, stages[: backbone.freeze_at], frozen, "stages")
    return trainable_mask(params, backbone.freeze_at, backbone.norm, patterns, stages)


def log_trainable(params: PyTree, trainable: PyTree) -> None:
    """Logs how many numbers there are in the parameters, and how many are trained."""
    sizes = jax.tree.leaves(jax.tree.map(lambda x: x.size, params))
    trained = sum(n for n, train in zip(sizes, jax.tree.leaves(trainable), strict=True) if train)
    log.info("%s parameters, of which %s are trained", f"{sum(sizes):,}", f"{trained:,}")


def build_optimizer(
    config: Any, trainable: PyTree
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns (learning rate by step, optimiser)."""
    optim = config.optim
    schedule, factor_of = build_schedule(config), None
    if optim.layer_decay < 1:
        layers = build_backbone(config).layers()
        check_groups(trainable, layers, f"optim.layer_decay = {optim.layer_decay}", "layers")
        factor_of = layer_rates(layers, optim.layer_decay)
    tx = make_optimizer(
        schedule,
        name=optim.name,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        weight_decay_norm=optim.weight_decay_norm,
        clip_norm=optim.clip_norm,
        trainable=trainable,
        factor_of=factor_of,
    )
    return schedule, tx


@dataclass(frozen=True)
class Validation:
    """A data set that the run is evaluated on; its metrics' names begin with `prefix`."""

    prefix: str  # "" or "NAME/"
    dataset: Any
    evaluator: CocoEvaluator

    def names(self) -> list[str]:
        """Returns the names of its metrics, as far as they are known beforehand."""
        return [self.prefix + name for name in self.evaluator.metric_names()]


def build_validations(config: Any, val: Any, *, alone: bool = False) -> list[Validation]:
    """Returns `val` and, unless `alone`, those of `data.vals`, with their evaluators.

    Before training: what is wrong with the ground truth is told now.
    """
    names = dict(zip(val.category_ids, val.class_names, strict=True))
    further = [
        Validation(f"{v.name}/", v.dataset, build_evaluator(config, v.dataset, v.metric))
        for v in ([] if alone else load_further_vals(config, names))
    ]
    return [Validation("", val, build_evaluator(config, val)), *further]


def build_evaluate(
    config: Any,
    model: Any,
    validations: Sequence[Validation],
    workdir: pathlib.Path,
    finished: deque[FinishedEvaluation] | None = None,
) -> Evaluate:
    """Returns variables -> metrics on the validation data.

    Args:
      finished: gets every finished evaluation of the first, without its pictures' predictions.
    """
    reports = build_reports(config)
    if finished is not None:
        last = finished
        first = [*reports, lambda evaluation: last.append(replace(evaluation, predictions={}))]
    else:
        first = reports

    def evaluate_variables(variables: dict[str, PyTree]) -> Mapping[str, float | None]:
        # The state lives on the devices of all processes, prediction on this one's.
        variables = jax.device_get(variables)
        names, ids = validations[0].dataset.class_names, validations[0].dataset.category_ids
        predictor = build_predictor(config, model, variables, names, ids)
        predictor = predictor.on_devices(jax.local_devices())
        devices = distributed.devices_per_process()
        metrics: dict[str, float | None] = {}
        for validation in validations:
            if validation.prefix:
                log.info("evaluating on %s", validation.dataset.annotation_file)
            values = evaluate(
                predictor,
                validation.evaluator,
                validation.dataset,
                build_eval_batches(config, validation.dataset, _shard(), devices),
                workdir / "eval" / validation.prefix,
                num_pictures=config.eval.num_pictures,
                max_per_image=config.test.max_per_image,
                reports=reports if validation.prefix else first,
            )
            metrics |= {validation.prefix + name: value for name, value in values.items()}
        return metrics

    return evaluate_variables


def with_validation_loss(evaluate_val: Evaluate, config: Any, model: Any, dataset: Any) -> Evaluate:
    """Returns `evaluate_val` with the validation loss among its results."""
    loss = build_loss(config, model, evaluated=True, own_padding=True)
    batches = functools.partial(build_loss_batches, config, dataset, _shard())
    validation_loss = ValidationLoss(loss, batches)

    def both(variables: dict[str, PyTree]) -> Mapping[str, float | None]:
        values = validation_loss(variables)
        log.info("%s", "  ".join(f"{k} {v:.4f}" for k, v in sorted(values.items())))
        return {**evaluate_val(variables), **values}

    return both


def metric_names(config: Any, validations: Sequence[Validation]) -> tuple[str, ...]:
    """Returns the names of the metrics that an evaluation of a run gives.

    () where an evaluator of the user's own does not say.
    """
    if not all(v.evaluator.names_known for v in validations):
        return ()
    names = [name for validation in validations for name in validation.names()]
    if config.eval.loss_images:
        names += [f"val/{name}" for name in ("loss", "loss_ins", "loss_cate", "mean_iou")]
        names += [f"val/{name}" for name in build_terms(config)]
    if config.optim.ema_decay and config.eval.raw_weights:
        names += [f"raw/{name}" for name in names]
    return tuple(names)


def fingerprint(dataset: Any) -> str:
    """Returns a hash of what training reads of a data set, but not of where it lies."""
    digest = hashlib.sha256()
    for name in ("image_ids", "file_names", "heights", "widths", "start", "boxes", "labels"):
        digest.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    if (dataset.weights != 1).any():  # without any, the hash of runs from before there were
        digest.update(dataset.weights.tobytes())
    if not dataset.has_mask.all():
        digest.update(dataset.has_mask.tobytes())
    digest.update(repr((dataset.class_names, dataset.category_ids)).encode())
    return digest.hexdigest()[:16]
