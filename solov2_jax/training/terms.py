"""Terms that a config may add to SOLOv2's loss, each with an auxiliary output of the network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from solov2_jax.keypoints import keypoint_loss, keypoint_pairs
from solov2_jax.semantic import foreground_counts, semantic_labels, semantic_loss
from solov2_jax.structs import Batch, Outputs, Targets

PyTree = Any
TERMS = ("loss_semantic", "loss_keypoint")  # their metrics' names


@dataclass(frozen=True)
class Term:
    """A weighted loss whose sums over microbatches give the whole batch's.

    Attributes:
      assign: (batch, targets) -> (what it compares with, a row for each image; what its sum
        over the whole batch is divided by).
      loss: (outputs, targets, those rows, that divisor) -> the loss of some of the rows.
    """

    assign: Callable[[Batch, Targets], tuple[PyTree, PyTree]]
    loss: Callable[[Outputs, Targets, PyTree, PyTree], jax.Array]


def build_terms(config: Any) -> dict[str, Term]:
    """Returns the terms that have a weight, by their metrics' names."""
    terms = {}
    if config.loss.semantic_weight:
        terms["loss_semantic"] = _semantic_term(config)
    if config.model.keypoint_head.names and config.loss.keypoint_weight:
        terms["loss_keypoint"] = _keypoint_term(config)
    return terms


def assign_terms(
    terms: Mapping[str, Term], batch: Batch, targets: Targets
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Returns (rows, divisors) of each term, as `Term.assign` gives them."""
    assigned = {name: term.assign(batch, targets) for name, term in terms.items()}
    return {n: rows for n, (rows, _) in assigned.items()}, {n: d for n, (_, d) in assigned.items()}


def _semantic_term(config: Any) -> Term:
    classes, weights = config.model.num_classes, config.loss

    def assign(batch: Batch, _: Targets) -> tuple[jax.Array, jax.Array]:
        labels = semantic_labels(batch, classes)
        return labels, foreground_counts(labels, classes)

    def loss(outputs: Outputs, _: Targets, labels: jax.Array, counts: jax.Array) -> jax.Array:
        assert outputs.semantic is not None
        alpha, gamma = weights.focal_alpha, weights.focal_gamma
        value = semantic_loss(outputs.semantic, labels, counts, alpha=alpha, gamma=gamma)
        return weights.semantic_weight * value

    return Term(assign, loss)


def _keypoint_term(config: Any) -> Term:
    weights = config.loss

    def assign(batch: Batch, targets: Targets) -> tuple[dict[str, jax.Array], jax.Array]:
        return keypoint_pairs(batch, targets, weights.keypoint_pairs)

    def loss(
        outputs: Outputs, _: Targets, rows: dict[str, jax.Array], count: jax.Array
    ) -> jax.Array:
        assert outputs.keypoint_kernel is not None and outputs.keypoint_feat is not None
        value = keypoint_loss(
            outputs.keypoint_kernel,
            outputs.keypoint_feat,
            rows,
            count,
            sigma=weights.keypoint_sigma,
            gamma=weights.focal_gamma,
        )
        return weights.keypoint_weight * value

    return Term(assign, loss)
