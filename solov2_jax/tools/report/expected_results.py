"""Ranges that results must lie in: `segm/AP=0.42+-0.02`.

Source: detectron2 evaluation/testing.py, verify_results (TEST.EXPECTED_RESULTS).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solov2_jax.config import suggest
from solov2_jax.evaluation.coco import is_defined
from solov2_jax.io import InputError

_FORM = re.compile(r"(.+)=([^=+±]+)(?:\+-|±)([^=]+)")


@dataclass(frozen=True)
class ExpectedResult:
    """A metric's value and how far from it the result may be."""

    metric: str
    value: float
    tolerance: float

    def miss(self, metrics: Mapping[str, float]) -> str:
        """Returns how the result leaves the range, "" where it does not."""
        result = metrics[self.metric]
        expected = f"expected {self.value:g} +- {self.tolerance:g}"
        if not is_defined(result):
            return f"{self.metric} is undefined (nothing of that kind is annotated), {expected}"
        # One unit in the last digit of the sums is no difference.
        slack = 1e-9
        if abs(result - self.value) <= self.tolerance + slack:
            return ""
        return f"{self.metric} is {result:.4f}, {expected}"


def parse_expectations(texts: Sequence[str]) -> list[ExpectedResult]:
    """Returns the expectations, or raises InputError for one that cannot be read."""
    expectations = []
    for text in texts:
        form = _FORM.fullmatch(text.strip())
        try:
            if form is None:
                raise ValueError
            value, tolerance = float(form[2]), float(form[3])
            if not math.isfinite(value) or not 0 <= tolerance < math.inf:
                raise ValueError
        except ValueError:
            raise InputError(
                f"--expect={text}: cannot be read; write METRIC=VALUE+-TOLERANCE, "
                "such as --expect=segm/AP=0.42+-0.02"
            ) from None
        expectations.append(ExpectedResult(form[1].strip(), value, tolerance))
    return expectations


def check_names(expectations: Sequence[ExpectedResult], metrics: Sequence[str]) -> None:
    """Raises InputError for an expectation of a metric that does not exist."""
    for expectation in expectations:
        if expectation.metric not in metrics:
            raise InputError(
                f"--expect={expectation.metric}=...: the evaluation has no such "
                f"metric{suggest(expectation.metric, metrics)}"
            )


def misses(expectations: Sequence[ExpectedResult], metrics: Mapping[str, float]) -> list[str]:
    """Returns a line for each result outside of its range."""
    lines = [expectation.miss(metrics) for expectation in expectations]
    return [line for line in lines if line]
