"""SOLOv2's loss of a batch's numpy fields: normalise, apply, assign, compare.

The training loss on validation images."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from solov2_jax import ops
from solov2_jax.losses import Normalizers, normalizers_of, solov2_loss
from solov2_jax.structs import Batch, Targets
from solov2_jax.training import sharding
from solov2_jax.training.step import LossFn, Metrics

PyTree = Any
Rows = tuple[dict[str, jax.Array], dict[str, jax.Array]]  # of Batch, of Targets


class Solov2Objective:
    """An `Objective`, and a plain loss function of whole batches when called.

    Args:
      apply: (variables, normalised image) -> `Outputs`.
      assign: (batch, key) -> `Targets`.
      mean, std: of the pixels, in the batch's channel order.
      weights: keyword arguments of `solov2_loss`.
      mutable: the model's collections that a step changes, such as "batch_stats".
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        assign: Callable[[Batch, jax.Array], Targets],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        weights: dict[str, float],
        mutable: tuple[str, ...] = (),
    ):
        self._mutable = list(mutable)
        self._apply, self._assign = apply, assign
        self._mean, self._std, self._weights = mean, std, weights

    def prepare(self, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Rows, Normalizers]:
        targets = self._assign(Batch(**batch), key)
        # Dicts: whoever splits the rows gives them one axis more for a while.
        return (batch, dict(vars(targets))), normalizers_of(targets)

    def part(
        self,
        params: PyTree,
        model_state: PyTree,
        rows: Rows,
        normalizers: Normalizers,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        batch, targets = Batch(**rows[0]), Targets(**rows[1])
        variables = {"params": params, **model_state}
        if self._mutable:
            outputs, changed = self._apply(variables, self._image(rows[0]), mutable=self._mutable)
            model_state = {**model_state, **changed}
        else:
            outputs = self._apply(variables, self._image(rows[0]))
        loss, metrics = solov2_loss(
            outputs, targets, batch.masks, normalizers=normalizers, **self._weights
        )
        return loss, (metrics, model_state)

    def moments(self, variables: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        """Returns mean and variance of a batch at each trained batch norm."""
        collections = [*self._mutable, "moments"]
        image = self._image(batch)
        _, changed = self._apply(variables, image, mutable=collections)
        return changed["moments"]

    def _image(self, batch: dict[str, jax.Array]) -> jax.Array:
        return ops.normalize_image(batch["image"], batch["image_size"], self._mean, self._std)

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        rows, normalizers = self.prepare(batch, key)
        loss, (metrics, _) = self.part(params, model_state, rows, normalizers)
        return loss, metrics


class ValidationLoss:
    """variables -> {"val/loss": ..., ...}: those of one batch with all images.

    Args:
      loss_fn: of whole batches.
      batches: makes the batches, the same ones each time.
    """

    def __init__(self, loss_fn: LossFn, batches: Callable[[], Iterable[dict[str, np.ndarray]]]):
        self._batches, self.compiles = batches, 0
        self._mesh = sharding.make_mesh()
        copied = sharding.replicated(self._mesh)

        def metrics(variables: PyTree, batch: PyTree) -> dict[str, jax.Array]:
            self.compiles += 1  # runs when traced: once for each padded shape
            state = {name: tree for name, tree in variables.items() if name != "params"}
            # The key only chooses among more pairs than there are slots.
            return loss_fn(variables["params"], state, batch, jax.random.key(0))[1]

        by_batch = sharding.split_by_batch(self._mesh)
        self._metrics = jax.jit(metrics, in_shardings=(copied, by_batch), out_shardings=copied)

    def __call__(self, variables: PyTree) -> dict[str, float]:
        variables = sharding.copy_to_all(variables, self._mesh)
        rows = []
        for batch in self._batches():
            arrays = sharding.put_batch(batch, self._mesh)
            rows.append(jax.device_get(self._metrics(variables, arrays)))
        pairs = np.array([row["num_pairs"] for row in rows])
        cells = np.array([row["num_cells"] for row in rows])
        each = {n: np.array([row[n] for row in rows]) for n in rows[0]}
        ins, iou = (
            float(each[n] @ pairs / max(pairs.sum(), 1.0)) for n in ("loss_ins", "mean_iou")
        )
        # The class loss is divided by the positive cells + 1.
        cate = float(each["loss_cate"] @ (cells + 1) / (cells.sum() + 1))
        return {
            "val/loss": ins + cate,
            "val/loss_ins": ins,
            "val/loss_cate": cate,
            "val/mean_iou": iou,
        }
