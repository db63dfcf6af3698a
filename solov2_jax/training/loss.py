"""What a step minimises: SOLOv2's loss of a batch's numpy fields, in training and validation."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from solov2_jax import distributed, ops
from solov2_jax.config import input_statistics
from solov2_jax.losses import normalizers_of, solov2_loss
from solov2_jax.structs import Batch, Targets
from solov2_jax.targets import assign_targets

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Loss:
    """A loss whose sums over microbatches give the whole batch's, as pure functions.

    Called with (params, model_state, batch, key), it returns (loss, metrics) of a whole
    batch.

    Attributes:
      assign: (batch, key) -> (targets with a row for each image, normalizers: what sums
        over the whole batch are divided by). Knows no parameters.
      compute: (params, model_state, batch, targets, normalizers) -> (loss, (metrics,
        model state after it)) of some of the rows; losses and metrics are additive.
      moments: (variables, batch) -> mean and variance at each trained batch norm.
      matmul_precision: of all products where it is computed, in the backward pass too.
    """

    assign: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]
    compute: Callable[..., tuple[jax.Array, tuple[Metrics, PyTree]]]
    moments: Callable[[PyTree, PyTree], PyTree] | None = None
    matmul_precision: str = "default"

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        targets, normalizers = self.assign(batch, key)
        loss, (metrics, _) = self.compute(params, model_state, batch, targets, normalizers)
        return loss, metrics


def build_loss(config: Any, model: Any, *, evaluated: bool = False) -> Loss:
    """Returns SOLOv2's loss, `loss_ins` (dice) + `loss_cate` (focal), as a config weighs them.

    Args:
      evaluated: of the network as prediction uses it: trained batch norms normalise by their
        running statistics, not by the batch's.
    """
    trained_norms = "sync_bn" in (config.model.backbone.norm, config.model.fpn.norm)
    mutable = ["batch_stats"] if trained_norms and not evaluated else []
    find_targets = functools.partial(
        assign_targets,
        num_grids=tuple(config.model.ins_head.num_grids),
        scale_ranges=tuple(tuple(pair) for pair in config.targets.scale_ranges),
        sigma=config.targets.sigma,
        num_classes=config.model.num_classes,
        max_pairs=config.targets.max_pairs,
    )
    compare = functools.partial(
        solov2_loss,
        dice_weight=config.loss.dice_weight,
        focal_weight=config.loss.focal_weight,
        focal_alpha=config.loss.focal_alpha,
        focal_gamma=config.loss.focal_gamma,
    )
    mean, std = input_statistics(config)

    def image_of(batch: dict[str, jax.Array]) -> jax.Array:
        return ops.normalize_image(batch["image"], batch["image_size"], mean, std)

    def assign(batch: dict[str, jax.Array], key: jax.Array) -> tuple[PyTree, PyTree]:
        targets = find_targets(Batch(**batch), key=key)
        # A dict: splitting the rows gives them one axis more for a while.
        return dict(vars(targets)), normalizers_of(targets)

    def compute(params, model_state, batch, targets, normalizers):
        variables = {"params": params, **model_state}
        if mutable:
            outputs, changed = model.apply(variables, image_of(batch), mutable=mutable)
            model_state = {**model_state, **changed}
        else:
            outputs = model.apply(variables, image_of(batch))
        loss, metrics = compare(
            outputs, Targets(**targets), batch["masks"], normalizers=normalizers
        )
        return loss, (metrics, model_state)

    def moments(variables: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        collections = ["batch_stats", "moments"]
        _, changed = model.apply(variables, image_of(batch), mutable=collections)
        return changed["moments"]

    precision = config.model.matmul_precision
    return Loss(
        assign=assign,
        compute=compute,
        moments=jax.default_matmul_precision(precision)(moments),
        matmul_precision=precision,
    )


class ValidationLoss:
    """variables -> {"val/loss": ..., ...}: those of one batch with all images.

    Args:
      loss: of whole batches, by the network as it is evaluated.
      batches: makes the batches, the same ones each time.
    """

    def __init__(self, loss: Loss, batches: Callable[[], Iterable[dict[str, np.ndarray]]]):
        self._batches, self.compiles = batches, 0
        self._mesh = distributed.make_mesh()
        copied = distributed.replicated(self._mesh)

        def metrics(variables: PyTree, batch: PyTree) -> Metrics:
            self.compiles += 1  # runs when traced: once for each padded shape
            state = {name: tree for name, tree in variables.items() if name != "params"}
            with jax.default_matmul_precision(loss.matmul_precision):
                # The key only chooses among more pairs than there are slots.
                return loss(variables["params"], state, batch, jax.random.key(0))[1]

        by_batch = distributed.split_by_batch(self._mesh)
        self._metrics = jax.jit(metrics, in_shardings=(copied, by_batch), out_shardings=copied)

    def __call__(self, variables: PyTree) -> dict[str, float]:
        variables = distributed.copy_to_all(variables, self._mesh)
        metrics = []
        for batch in self._batches():
            arrays = distributed.put_batch(batch, self._mesh)
            metrics.append(jax.device_get(self._metrics(variables, arrays)))
        column = {name: np.array([m[name] for m in metrics]) for name in metrics[0]}
        pairs, cells = column["num_pairs"], column["num_cells"]
        num_pairs = max(pairs.sum(), 1.0)
        loss_ins = float(column["loss_ins"] @ pairs / num_pairs)
        # The class loss is divided by the positive cells + 1.
        loss_cate = float(column["loss_cate"] @ (cells + 1) / (cells.sum() + 1))
        return {
            "val/loss": loss_ins + loss_cate,
            "val/loss_ins": loss_ins,
            "val/loss_cate": loss_cate,
            "val/mean_iou": float(column["mean_iou"] @ pairs / num_pairs),
        }
