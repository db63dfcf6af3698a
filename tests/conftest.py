"""Eight CPU devices, no silent broadcasting, compiled programs kept between runs."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

# Tests that start other processes inherit these, and so share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PLATFORMS"] = "cpu"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# The same examples on every run; no deadline, because a first call compiles.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Takes back what a command that runs inside a test does to the logs."""
    logs = [logging.getLogger(name) for name in ("solov2_jax", "absl")]
    before = [(log, log.propagate, log.level, list(log.handlers)) for log in logs]
    raising = logging.raiseExceptions
    yield
    for log, propagate, level, handlers in before:
        log.propagate, log.level, log.handlers[:] = propagate, level, handlers
    logging.raiseExceptions = raising


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Returns a loader: `golden("units")` gives the arrays of tests/golden/units.npz.

    The arrays were computed by the reference (PyTorch, CPU, float32).
    """

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load
