"""From a config to a task: the one place in training that unpacks the config."""

import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from solov2_jax.models import build_model
from solov2_jax.targets import assign_targets
from solov2_jax.training.objective import Solov2Objective, ValidationLoss
from solov2_jax.training.optim import build_schedule, describe_rate, make_optimizer, trainable_mask
from solov2_jax.training.task import Task

PyTree = Any

log = logging.getLogger("solov2_jax")


def build_task(config: Any, workdir: pathlib.Path, *, val_is_train: bool = False) -> Task:
    """Returns the SOLOv2 task that a config describes.

    Args:
      val_is_train: evaluate on the training images instead of the validation's.
    """
    from solov2_jax.data.build import build_train_batches, load_datasets
    from solov2_jax.tools.doctor.start import check_at_start

    train, val = load_datasets(config)
    val = train if val_is_train else val
    check_at_start(config, train, val)
    num_classes = len(train.class_names)
    config = config.copy_and_resolve_references()
    config.model.num_classes = num_classes
    model = build_model(config, num_classes)

    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def init(key: jax.Array) -> dict[str, PyTree]:
        # Lazy: the forward pass is traced for its shapes and not computed.
        return dict(model.lazy_init(key, image))

    params = jax.eval_shape(init, jax.random.key(0))["params"]
    trainable = build_trainable(config, params)
    log_trainable(params, trainable)
    log.info("%s", describe_rate(config))
    schedule, tx = build_optimizer(config, trainable)
    shard = (jax.process_index(), jax.process_count())
    loss_fn = build_loss(config, model)
    evaluate = build_evaluate(config, model, val, workdir)
    if config.eval.loss_images:
        evaluate = with_loss(evaluate, config, loss_fn, val, shard)

    def batches(step: int) -> Generator[dict[str, np.ndarray], None, None]:
        yield from build_train_batches(config, train, step, shard)

    return Task(
        config=config,
        class_names=tuple(train.class_names),
        category_ids=tuple(train.category_ids),
        init=init,
        loss_fn=loss_fn,
        tx=tx,
        schedule=schedule,
        trainable=trainable,
        batches=batches,
        evaluate=evaluate,
        fingerprint=fingerprint(train),
        moments=loss_fn.moments,
    )


def build_trainable(config: Any, params: PyTree) -> PyTree:
    """Returns a tree of bools: which of these parameters are trained."""
    backbone, patterns = config.model.backbone, tuple(config.optim.freeze)
    return trainable_mask(params, backbone.freeze_at, backbone.norm, patterns)


def log_trainable(params: PyTree, trainable: PyTree) -> None:
    """Logs how many numbers are trained, and how many are not."""
    sizes = jax.tree.map(lambda x, t: (x.size * t, x.size), params, trainable)
    pairs = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
    trained, all_ = sum(t for t, _ in pairs), sum(n for _, n in pairs)
    log.info("%s parameters, of which %s are trained", f"{all_:,}", f"{trained:,}")


def build_loss(config: Any, model: Any) -> Solov2Objective:
    """Returns loss_fn(params, model_state, batch, key) for batches of numpy fields."""
    targets, loss, input_ = config.targets, config.loss, config.input
    assign = functools.partial(
        assign_targets,
        num_grids=tuple(config.model.ins_head.num_grids),
        scale_ranges=tuple(tuple(pair) for pair in targets.scale_ranges),
        sigma=targets.sigma,
        num_classes=config.model.num_classes,
        max_pairs=targets.max_pairs,
    )
    return Solov2Objective(
        model.apply,
        lambda batch, key: assign(batch, key=key),
        tuple(input_.mean),
        tuple(input_.std),
        {
            "focal_alpha": loss.focal_alpha,
            "focal_gamma": loss.focal_gamma,
            "focal_weight": loss.focal_weight,
            "dice_weight": loss.dice_weight,
        },
        ("batch_stats",) if config.model.backbone.norm == "sync_bn" else (),
    )


def build_optimizer(
    config: Any, trainable: PyTree
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns (learning rate by step, optimiser)."""
    optim = config.optim
    schedule = build_schedule(config)
    tx = make_optimizer(
        schedule,
        name=optim.name,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        weight_decay_norm=optim.weight_decay_norm,
        clip_norm=optim.clip_norm,
        trainable=trainable,
    )
    return schedule, tx


def build_evaluate(
    config: Any, model: Any, dataset: Any, workdir: pathlib.Path
) -> Callable[[dict[str, PyTree]], dict[str, float]]:
    """Returns variables -> metrics on the validation data."""
    from solov2_jax.data.build import build_eval_batches
    from solov2_jax.evaluation.evaluate import build_evaluator, build_reports, evaluate
    from solov2_jax.inference.predictor import build_predictor

    shard = (jax.process_index(), jax.process_count())
    # Before training: what is wrong with the ground truth is told now.
    evaluator, reports = build_evaluator(config, dataset), build_reports(config)

    def evaluate_variables(variables: dict[str, PyTree]) -> dict[str, float]:

        # The state lives on every device; prediction runs on one.
        variables = jax.device_get(variables)
        predictor = build_predictor(
            config, model, variables, dataset.class_names, dataset.category_ids
        )
        batches = build_eval_batches(config, dataset, shard)
        return evaluate(
            predictor,
            evaluator,
            dataset,
            batches,
            workdir / "eval",
            num_pictures=config.eval.num_pictures,
            reports=reports,
        )

    return evaluate_variables


def with_loss(
    evaluate: Callable[[dict[str, PyTree]], dict[str, float]],
    config: Any,
    loss_fn: Solov2Objective,
    dataset: Any,
    shard: tuple[int, int],
) -> Callable[[dict[str, PyTree]], dict[str, float]]:
    """Returns `evaluate` with the validation loss among its results."""

    def batches() -> Any:
        from solov2_jax.data.build import build_loss_batches

        return build_loss_batches(config, dataset, shard)

    loss = ValidationLoss(loss_fn, batches)

    def both(variables: dict[str, PyTree]) -> dict[str, float]:
        values = loss(variables)
        log.info("%s", "  ".join(f"{k} {v:.4f}" for k, v in sorted(values.items())))
        return {**evaluate(variables), **values}

    return both


def fingerprint(dataset: Any) -> str:
    """Returns a hash of what training reads of a data set, but not of where it lies."""
    digest = hashlib.sha256()
    names = ("image_ids", "file_names", "heights", "widths", "start", "boxes", "labels")
    for name in names:
        digest.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    digest.update(repr((dataset.class_names, dataset.category_ids)).encode())
    return digest.hexdigest()[:16]
