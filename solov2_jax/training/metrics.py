"""The metrics of the latest steps: on the devices until somebody wants to read them."""

import logging
from collections import deque
from typing import Any

import jax
import numpy as np

# Steps whose metrics may wait on the devices, and steps that a mean may span.
_MAX_PENDING = 100
_MAX_STEPS = 1000

log = logging.getLogger("solov2_jax")


class MetricsWindow:
    """What the steps since the last log line computed.

    Reading a device array makes the host wait, so `add` only keeps a reference and
    `fetch` reads many at once. What it holds is part of a checkpoint (`saved`): a run
    that resumes within a log period writes the same line as one that never stopped.

    Attributes:
      values: metrics of each step that was not skipped.
      skipped: steps of the run whose loss or gradient was not finite.
      streak: (step, image ids) of the latest of them, as long as no other came after.

    Args:
      max_skipped: length of the streak at which `fetch` raises.
      saved: what `saved` returned, to continue with.
    """

    def __init__(self, max_skipped: int, saved: dict[str, Any] | None = None):
        saved = saved or {"window": []}
        self.values: deque[dict[str, float]] = deque(saved["window"], maxlen=_MAX_STEPS)
        # Checkpoints of earlier versions know no skipped steps.
        self.skipped: int = saved.get("skipped", 0)
        self.streak: list[tuple[int, list[int]]] = list(saved.get("streak", ()))
        self._max_skipped = max_skipped
        self._pending: list[tuple[int, Any, dict[str, jax.Array]]] = []

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the steps fetched so far."""
        return {"window": list(self.values), "skipped": self.skipped, "streak": self.streak}

    def add(self, step: int, metrics: dict[str, jax.Array], image_ids: Any) -> None:
        """Remembers the metrics of a step and the images it saw."""
        self._pending.append((step, image_ids, metrics))
        if len(self._pending) >= _MAX_PENDING:
            self.fetch()

    def fetch(self) -> None:
        """Waits for the steps so far; raises when too many in a row were skipped."""
        pending, self._pending = self._pending, []
        for step, image_ids, metrics in jax.device_get(pending):
            values = {name: float(value) for name, value in metrics.items()}
            if not values.pop("skipped"):
                self.values.append(values)
                self.streak = []
                continue
            self.skipped += 1
            self.streak.append((step, np.ravel(image_ids).tolist()))
            log.warning(
                "step %d is skipped: loss %s, gradient norm %s; image ids %s",
                step,
                values["loss"],
                values["grad_norm"],
                _listed(self.streak[-1][1]),
            )
            if len(self.streak) >= self._max_skipped:
                raise self._error(values)

    def _error(self, values: dict[str, float]) -> FloatingPointError:
        first, last = self.streak[0][0], self.streak[-1][0]
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        ids = dict.fromkeys(i for _, images in self.streak for i in images)
        return FloatingPointError(
            f"{steps}: loss or gradient not finite (the last: loss = {values['loss']}, "
            f"gradient norm = {values['grad_norm']}); the image ids: "
            f"{_listed(list(ids))}. Such steps are skipped, and train.max_skipped = "
            f"{self._max_skipped} of them in a row end the run. Lower "
            "optim.learning_rate, lengthen optim.warmup_steps or set "
            "optim.clip_norm=35, in a new --workdir; if it is always the same image, "
            "look at it and its annotations. The checkpoints from before are kept"
        )

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric over the window, skipped steps aside.

        `mean_iou` is the mean over the pairs of all steps.
        """
        names = self.values[-1] if self.values else ()
        means = {n: float(np.mean([v[n] for v in self.values])) for n in names}
        if means.get("num_pairs", 0) > 0 and "mean_iou" in means:
            hits = [v["mean_iou"] * v["num_pairs"] for v in self.values]
            means["mean_iou"] = float(np.mean(hits)) / means["num_pairs"]
        return means

    def clear(self) -> None:
        """Starts a new window."""
        self.values.clear()


def _listed(ids: list[int]) -> str:
    """Returns the first of the ids as text."""
    more = f" and {len(ids) - 64} more" if len(ids) > 64 else ""
    return ", ".join(map(str, ids[:64])) + more
