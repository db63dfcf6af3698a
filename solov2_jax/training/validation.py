"""The training loss on validation images."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from solov2_jax.training import sharding
from solov2_jax.training.gradients import LossFn

PyTree = Any


class ValidationLoss:
    """variables -> {"val/loss": ..., ...}: those of one batch with all images.

    Args:
      loss_fn: of whole batches.
      batches: makes the batches, the same ones each time.
    """

    def __init__(
        self, loss_fn: LossFn, batches: Callable[[], Iterable[dict[str, np.ndarray]]]
    ):
        self._batches, self.compiles = batches, 0
        self._mesh = sharding.make_mesh()
        copied = sharding.replicated(self._mesh)

        def metrics(variables: PyTree, batch: PyTree) -> dict[str, jax.Array]:
            self.compiles += 1  # runs when traced: once for each padded shape
            state = {name: tree for name, tree in variables.items() if name != "params"}
            # The key only chooses among more pairs than there are slots.
            return loss_fn(variables["params"], state, batch, jax.random.key(0))[1]

        by_batch = sharding.split_by_batch(self._mesh)
        self._metrics = jax.jit(
            metrics, in_shardings=(copied, by_batch), out_shardings=copied
        )

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
            float(each[n] @ pairs / max(pairs.sum(), 1.0))
            for n in ("loss_ins", "mean_iou")
        )
        # The class loss is divided by the positive cells + 1.
        cate = float(each["loss_cate"] @ (cells + 1) / (cells.sum() + 1))
        return {
            "val/loss": ins + cate,
            "val/loss_ins": ins,
            "val/loss_cate": cate,
            "val/mean_iou": iou,
        }
