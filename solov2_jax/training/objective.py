"""SOLOv2's loss of a batch's numpy fields: normalise, apply, assign, compare."""

from collections.abc import Callable
from typing import Any

import jax

from solov2_jax import ops
from solov2_jax.losses import Totals, solov2_loss, totals_of
from solov2_jax.structs import Batch, Targets
from solov2_jax.training.gradients import Metrics

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

    def prepare(
        self, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[Rows, Totals]:
        targets = self._assign(Batch(**batch), key)
        # Dicts: whoever splits the rows gives them one axis more for a while.
        return (batch, dict(vars(targets))), totals_of(targets)

    def part(
        self,
        params: PyTree,
        model_state: PyTree,
        rows: Rows,
        totals: Totals,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        batch, targets = Batch(**rows[0]), Targets(**rows[1])
        variables = {"params": params, **model_state}
        if self._mutable:
            outputs, changed = self._apply(
                variables, self._image(rows[0]), mutable=self._mutable
            )
            model_state = {**model_state, **changed}
        else:
            outputs = self._apply(variables, self._image(rows[0]))
        loss, metrics = solov2_loss(
            outputs, targets, batch.masks, totals=totals, **self._weights
        )
        return loss, (metrics, model_state)

    def moments(self, variables: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        """Returns mean and variance of a batch at each trained batch norm."""
        collections = [*self._mutable, "moments"]
        image = self._image(batch)
        _, changed = self._apply(variables, image, mutable=collections)
        return changed["moments"]

    def _image(self, batch: dict[str, jax.Array]) -> jax.Array:
        return ops.normalize_image(
            batch["image"], batch["image_size"], self._mean, self._std
        )

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        rows, totals = self.prepare(batch, key)
        loss, (metrics, _) = self.part(params, model_state, rows, totals)
        return loss, metrics
