"""What a step minimises: the losses of a batch's fields that a config weighs, added up."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solov2_jax import distributed, ops
from solov2_jax.box_losses import color_edges, mask_terms
from solov2_jax.config import input_statistics
from solov2_jax.config_schema import as_steps
from solov2_jax.distillation import attention_distance, soft_mask_terms
from solov2_jax.losses import Normalizers, normalizers_of, pair_weights, solov2_loss
from solov2_jax.mask_losses import further_mask_terms
from solov2_jax.pair_losses import pair_loss
from solov2_jax.structs import Batch, Outputs, Targets
from solov2_jax.targets import assign_targets
from solov2_jax.training.teacher import Teacher
from solov2_jax.training.terms import TERMS, assign_terms, build_terms

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Loss:
    """A loss whose sums over microbatches give the whole batch's, as pure functions.

    Called with (params, model_state, batch, key), it returns (loss, metrics) of a whole
    batch, as at step 0.

    Attributes:
      assign: (batch, key, step) -> (targets with a row for each image, normalizers: what sums
        over the whole batch are divided by). Knows no parameters.
      compute: (params, model_state, batch, targets, normalizers, constants) -> (loss,
        (metrics, model state after it)) of some of the rows; losses and metrics are additive.
      constants: arrays that are neither trained nor saved, such as a teacher's variables.
      moments: (variables, batch) -> mean and variance at each trained batch norm.
      matmul_precision: of all products where it is computed, in the backward pass too.
    """

    assign: Callable[[PyTree, jax.Array, jax.Array | int], tuple[PyTree, PyTree]]
    compute: Callable[..., tuple[jax.Array, tuple[Metrics, PyTree]]]
    moments: Callable[[PyTree, PyTree], PyTree] | None = None
    matmul_precision: str = "default"
    constants: PyTree = None

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        targets, normalizers = self.assign(batch, key, 0)
        loss, (metrics, _) = self.compute(
            params, model_state, batch, targets, normalizers, self.constants
        )
        return loss, metrics


def build_loss(
    config: Any,
    model: Any,
    *,
    evaluated: bool = False,
    teacher: Teacher | None = None,
    own_padding: bool = False,
) -> Loss:
    """Returns SOLOv2's loss, `loss_ins` (dice) + `loss_cate` (focal), as a config weighs them,
    and of batches with `has_mask` that of the masks learned from boxes.

    With `loss.semantic_weight` also `loss_semantic`, of the network's auxiliary head.

    Args:
      evaluated: of the network as prediction uses it: trained batch norms normalise by their
        running statistics, not by the batch's.
      teacher: whose outputs are learned too.
      own_padding: a batch counts as padded to the largest of its images and multiples of 32,
        as the reference pads it, whatever shape its arrays have; else as these are.
    """
    trained_norms = "sync_bn" in (config.model.backbone.norm, config.model.fpn.norm)
    mutable = ["batch_stats"] if trained_norms and not evaluated else []
    find_targets, compare = _target_finder(config), _build_comparison(config)
    terms = build_terms(config)
    options = {"auxiliary": True} if terms else {}
    mean, std = input_statistics(config)

    def image_of(batch: dict[str, jax.Array]) -> jax.Array:
        return ops.normalize_image(batch["image"], batch["image_size"], mean, std)

    def extent_of(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the network's argument of that name, and none where it is the arrays'."""
        if not own_padding:
            return {}
        largest = jnp.max(ops.padded_extent(batch["image_size"]), axis=0, keepdims=True)
        return {"extent": jnp.broadcast_to(largest, batch["image_size"].shape)}

    def assign(
        batch: dict[str, jax.Array], key: jax.Array, step: jax.Array | int
    ) -> tuple[PyTree, PyTree]:
        extent = extent_of(batch)
        whole = Batch(**unpack_masks(batch), **extent)
        targets = find_targets(whole, key=key)
        added, totals = assign_terms(terms, whole, targets)
        # A dict: splitting the rows gives them one axis more for a while.
        rows = {**vars(targets), **added, **extent}
        return rows, (normalizers_of(targets, whole.has_mask), (step, totals))

    taught = _build_distillation(config) if teacher else None

    def compute(params, model_state, batch, targets, normalizers, constants):
        batch, variables = unpack_masks(batch), {"params": params, **model_state}
        extent = {"extent": targets["extent"]} if own_padding else {}
        image, called = image_of(batch), {**options, **extent}
        if mutable:
            outputs, changed = model.apply(variables, image, mutable=mutable, **called)
            model_state = {**model_state, **changed}
        else:
            outputs = model.apply(variables, image, **called)
        of_pairs, (step, totals) = normalizers
        pairs = Targets(**{n: x for n, x in targets.items() if n not in terms | extent})
        inside = None
        if own_padding:
            inside = ops.inside(targets["extent"] // 4, *batch["masks"].shape[2:])
        batch = {**batch, "inside": inside}
        loss, metrics = compare(outputs, pairs, batch, of_pairs, step)
        added = {n: t.loss(outputs, pairs, targets[n], totals[n]) for n, t in terms.items()}
        loss, metrics = loss + sum(added.values()), metrics | added
        if teacher and taught:
            wanted = teacher.outputs(constants, batch, **extent)
            more, further = taught(outputs, wanted, pairs, of_pairs, inside)
            loss, metrics = loss + more, metrics | further
        return loss, (metrics, model_state)

    def moments(variables: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        collections = ["batch_stats", "moments"]
        image, extent = image_of(batch), extent_of(batch)
        _, changed = model.apply(variables, image, mutable=collections, **extent)
        return changed.get("moments", {})

    precision = config.model.matmul_precision
    return Loss(
        assign=assign,
        compute=compute,
        moments=jax.default_matmul_precision(precision)(moments),
        matmul_precision=precision,
        constants=teacher.variables if teacher else None,
    )


def unpack_masks(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a batch with `masks` uint8 [B, G, h4, w4] instead of `mask_bits`, if it has these.

    Args:
      batch: `mask_bits` are uint8 [B, G, h4, w4 / 8], the first pixel in the highest bit.
    """
    if "mask_bits" not in batch:
        return batch
    rest = {name: rows for name, rows in batch.items() if name != "mask_bits"}
    return {**rest, "masks": jnp.unpackbits(batch["mask_bits"], axis=-1)}


def _target_finder(config: Any) -> Callable[..., Targets]:
    """Returns (batch, key) -> targets."""
    return functools.partial(
        assign_targets,
        num_grids=tuple(config.model.ins_head.num_grids),
        scale_ranges=tuple(tuple(pair) for pair in config.targets.scale_ranges),
        sigma=config.targets.sigma,
        num_classes=config.model.num_classes,
        max_pairs=config.targets.max_pairs,
    )


def _build_comparison(config: Any) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns (outputs, targets, batch, normalizers, step) -> (loss, metrics)."""
    weights = config.loss
    of_boxes, of_masks = _build_box_loss(config), _build_mask_loss(config)

    def compare(
        outputs: Outputs,
        targets: Targets,
        batch: dict[str, jax.Array],
        normalizers: Normalizers,
        step: jax.Array | int,
    ) -> tuple[jax.Array, Metrics]:
        loss, metrics = solov2_loss(
            outputs,
            targets,
            batch["masks"],
            dice_weight=weights.dice_weight,
            focal_weight=weights.focal_weight,
            focal_alpha=weights.focal_alpha,
            focal_gamma=weights.focal_gamma,
            normalizers=normalizers,
            has_mask=batch.get("has_mask"),
            inside=batch["inside"],
        )
        if weights.mask_bce_weight or weights.boundary_weight:
            more, further = of_masks(outputs, targets, batch, normalizers.pairs)
            loss, metrics = loss + more, metrics | further
        if "has_mask" in batch:
            more, further = of_boxes(outputs, targets, batch, normalizers.box_pairs, step)
            loss, metrics = loss + more, metrics | further
        return loss, metrics

    return compare


def _build_mask_loss(config: Any) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns (outputs, targets, batch, number of pairs) -> (loss, metrics) of the terms that
    stand beside dice.

    Metrics: `loss_mask_bce` and `loss_boundary`, weighted, which add up to the loss.
    """
    weights = config.loss
    terms = functools.partial(further_mask_terms, gamma=weights.mask_bce_gamma)

    def loss_of(
        outputs: Outputs, targets: Targets, batch: dict[str, jax.Array], num_pairs: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        factors = jnp.float32([weights.mask_bce_weight, weights.boundary_weight])
        factors = factors / jnp.maximum(num_pairs, 1.0)
        kernels = jnp.take_along_axis(outputs.kernel, targets.pair_cell[..., None], axis=1)
        weight, _ = pair_weights(targets, batch.get("has_mask"))
        loss, sums = pair_loss(
            terms,
            kernels,
            outputs.mask_feat,
            targets.pair_instance,
            batch["masks"],
            weight,
            factors,
            batch["inside"],
        )
        bce, boundary = factors * sums
        return loss, {"loss_mask_bce": bce, "loss_boundary": boundary}

    return loss_of


def _build_box_loss(config: Any) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns (outputs, targets, batch, number of pairs, step) -> (loss, metrics) of the
    objects that have a box and no mask.

    Metrics: `loss_projection` and `loss_pairwise`, weighted, which add up to the loss.
    """
    weights = config.loss
    warmup = as_steps(weights.pairwise_warmup, config.train.steps)
    bgr, threshold = config.input.channel_order == "BGR", weights.color_similarity

    def loss_of(
        outputs: Outputs,
        targets: Targets,
        batch: dict[str, jax.Array],
        num_pairs: jax.Array,
        step: jax.Array | int,
    ) -> tuple[jax.Array, Metrics]:
        edges = color_edges(batch["image"], batch["image_size"], bgr=bgr, threshold=threshold)
        ramp = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
        factors = jnp.float32([weights.projection_weight, weights.pairwise_weight])
        factors = factors * jnp.stack([1.0, ramp]) / jnp.maximum(num_pairs, 1.0)
        kernels = jnp.take_along_axis(outputs.kernel, targets.pair_cell[..., None], axis=1)
        _, weight = pair_weights(targets, batch["has_mask"])
        loss, terms = pair_loss(
            mask_terms,
            kernels,
            outputs.mask_feat,
            targets.pair_instance,
            (batch["masks"], edges),
            weight,
            factors,
            batch["inside"],
        )
        projection, pairwise = factors * terms
        return loss, {"loss_projection": projection, "loss_pairwise": pairwise}

    return loss_of


def _build_distillation(config: Any) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns (outputs, the teacher's, targets, normalizers, pixels inside the batch's padding,
    None: all) -> (loss, metrics).

    Metrics: `loss_distill_mask` and `loss_distill_feature`, weighted, which add up to it.
    """
    weights = config.loss

    def loss_of(
        outputs: Outputs,
        teacher: Outputs,
        targets: Targets,
        normalizers: Normalizers,
        inside: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        cell = targets.pair_cell[..., None]
        kernels, wanted = (jnp.take_along_axis(o.kernel, cell, 1) for o in (outputs, teacher))
        num_pairs = jnp.maximum(normalizers.pairs + normalizers.box_pairs, 1.0)
        mask_loss, _ = pair_loss(
            soft_mask_terms,
            kernels,
            outputs.mask_feat,
            wanted,
            teacher.mask_feat,
            targets.pair_weight,
            jnp.full(1, weights.distill_mask_weight) / num_pairs,
            inside,
        )
        features = (outputs.mask_feat, teacher.mask_feat)
        if inside is not None:
            features = (jnp.where(inside[..., None], x, 0) for x in features)
        distance = attention_distance(*features)
        feature_loss = weights.distill_feature_weight * jnp.sum(distance) / normalizers.images
        parts = {"loss_distill_mask": mask_loss, "loss_distill_feature": feature_loss}
        return mask_loss + feature_loss, parts

    return loss_of


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
        # Each batch's by itself: its pixels are many, and the batches alike.
        further = {k: float(v.mean()) for k, v in column.items() if k in TERMS}
        return {
            "val/loss": loss_ins + loss_cate + sum(further.values()),
            "val/loss_ins": loss_ins,
            "val/loss_cate": loss_cate,
            "val/mean_iou": float(column["mean_iou"] @ pairs / num_pairs),
            **{f"val/{name}": value for name, value in further.items()},
        }
