"""Export as StableHLO: `jax.export`'s file, which needs JAX and nothing of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from solov2_jax.io import write_bytes
from solov2_jax.models.conv import portable_forms
from solov2_jax.tools.export.program import Program

# One file runs on all of them.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PRECISIONS = ("float32", "float16")


def write(program: Program, inputs: tuple[Any, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Writes one padded shape's program; the metadata stays in its own file."""
    del metadata
    from jax import export

    with portable_forms():
        exported = export.export(jax.jit(program), platforms=PLATFORMS)(*inputs)
    write_bytes(bytes(exported.serialize()), path)


def read(path: Path, outputs: tuple[str, ...]) -> Callable[..., dict[str, np.ndarray]]:
    """Returns the program of a file, as its own runtime runs it."""
    del outputs
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    # Compiled here: what a damaged file raises belongs to reading it.
    call = jax.jit(exported.call).lower(*exported.in_avals).compile()
    return lambda image, image_size: jax.device_get(call(image, image_size))
