"""What the training loop trains: it knows this, and neither SOLOv2 nor COCO."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from solov2_jax.training.step import LossFn, Objective

PyTree = Any


@dataclass(frozen=True)
class Task:
    """What is trained: everything that the loop does not know by itself."""

    config: Any  # resolved: the number of classes is filled in
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    init: Callable[[jax.Array], dict[str, PyTree]]  # key -> variables
    loss_fn: LossFn | Objective
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: PyTree
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]]  # from a step on
    evaluate: Callable[[dict[str, PyTree]], dict[str, float]]  # of variables
    fingerprint: str  # of the training data's content
    # (variables, batch) -> mean and variance at each trained batch norm
    moments: Callable[[PyTree, PyTree], PyTree] | None = None
