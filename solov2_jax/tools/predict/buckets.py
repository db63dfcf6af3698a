"""A few padded shapes for many images, so that few programs are compiled."""

import contextlib
from typing import Protocol, runtime_checkable

import numpy as np

from solov2_jax.data.buckets import Bucket, derive_buckets
from solov2_jax.data.images import read_header
from solov2_jax.tools.predict.sources import ImageFiles, Source, VideoFile

# Share of all pixels that padding may add for one shape less.
TOLERANCE = 0.02


@runtime_checkable
class BucketedPredictor(Protocol):
    """What this needs of a `Predictor`."""

    def padded_shape(self, height: int, width: int) -> Bucket: ...


def shapes_of(
    sources: list[Source], predictor: BucketedPredictor, limit: int
) -> tuple[Bucket, ...]:
    """Returns at most `limit` padded shapes that hold every image and frame."""
    sizes: list[tuple[int, int]] = []
    for source in sources:
        if isinstance(source, ImageFiles):
            for path in source.paths:
                with contextlib.suppress(ValueError):  # its reader says it later
                    header = read_header(path)
                    sizes.append((header.height, header.width))
        elif isinstance(source, VideoFile):
            sizes.append(source.reader.size)
    if not sizes:
        return ()  # nothing can be read; each file says why
    shapes = [predictor.padded_shape(*size) for size in sizes]
    return derive_buckets(np.array(shapes), limit, TOLERANCE)
