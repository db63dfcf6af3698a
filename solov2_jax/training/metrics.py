"""The metrics of the latest steps: on the devices until somebody wants to read them."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

# Steps whose metrics may wait on the devices, and steps that a mean may span.
_MAX_PENDING = 100
_MAX_STEPS = 1000


class MetricsWindow:
    """What the steps since the last log line computed.

    Reading a device array makes the host wait, so `add` only keeps a reference and
    `fetch` reads many at once. The window's values are part of a checkpoint: a run that
    resumes within a log period writes the same line as one that never stopped.

    Args:
      values: of a window that is continued, one dict for each step.
    """

    def __init__(self, values: Iterable[dict[str, float]] = ()):
        self.values: deque[dict[str, float]] = deque(values, maxlen=_MAX_STEPS)
        self._pending: list[tuple[int, Any, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array], image_ids: Any) -> None:
        """Remembers the metrics of a step and the images it saw."""
        self._pending.append((step, image_ids, metrics))
        if len(self._pending) >= _MAX_PENDING:
            self.fetch()

    def fetch(self) -> None:
        """Waits for the steps so far; raises if a loss or gradient is not finite."""
        pending, self._pending = self._pending, []
        for step, image_ids, metrics in jax.device_get(pending):
            values = {name: float(value) for name, value in metrics.items()}
            check_finite(step, values, image_ids)
            self.values.append(values)

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric over the window."""
        names = self.values[-1] if self.values else ()
        return {n: float(np.mean([v[n] for v in self.values])) for n in names}

    def clear(self) -> None:
        """Starts a new window."""
        self.values.clear()


def check_finite(step: int, values: dict[str, float], image_ids: Any) -> None:
    """Raises a FloatingPointError that names the step, the loss and the images."""
    watched = [n for n in values if n.startswith("loss") or n == "grad_norm"]
    bad = [f"{n} = {values[n]}" for n in watched if not math.isfinite(values[n])]
    if bad:
        ids = ", ".join(str(i) for i in np.ravel(image_ids)[:64])
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)}; the batch's image ids: {ids}. Nothing of "
            "it was saved. Lower optim.learning_rate, lengthen optim.warmup_steps or "
            "set optim.clip_norm=35, in a new --workdir; if it is always the same "
            "image, look at it and its annotations"
        )
