"""Sizes after the resize, and the padded shapes that hold them."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from solov2_jax.data import sampler
from solov2_jax.data.coco import CocoDataset

log = logging.getLogger(__name__)

# Derived padded shapes: how many at most, and which share of padded pixels one more
# must save to be worth its compilation.
_DERIVED = {"train": (5, 0.05), "test": (8, 0.02)}


@dataclasses.dataclass(frozen=True)
class Resize:
    """Where the padded shapes and the sizes within them come from, in pixels."""

    shorts: tuple[int, ...]  # shorter side; one is drawn per image and epoch
    max_size: int  # longer side at most
    buckets: tuple[Sequence[int], ...] = ()  # padded (h, w); () derives them
    exact: bool = False  # with (): each image's own multiples of 32, however many


def resize_of(
    shorts: Sequence[int],
    max_size: int,
    buckets: Sequence[Sequence[int]],
    key: str,
    sampling: str = "choice",
) -> Resize:
    """Returns the sizes, or raises naming the config's key.

    Args:
      sampling: "choice": one of `shorts`; "range": any whole number between the
        smallest and the largest of them.
    """
    if sampling not in ("choice", "range"):
        raise ValueError(f'input.size_sampling is {sampling!r}; use "choice" or "range".')
    if sampling == "range" and shorts:
        shorts = range(min(shorts), max(shorts) + 1)
    if not shorts or min(shorts) < 1 or max_size < 1:
        raise ValueError(f"{key}: sizes {tuple(shorts)}, at most {max_size}, must be positive.")
    return Resize(
        tuple(int(s) for s in shorts),
        int(max_size),
        tuple(buckets),
    )


def choose_buckets(
    dataset: CocoDataset,
    sizes: np.ndarray,
    chosen: np.ndarray,
    resize: Resize,
    name: str,
) -> tuple[tuple[sampler.Bucket, ...], np.ndarray]:
    """Returns the padded shapes and each image's, per scale, int16 [N, S].

    Args:
      sizes: (height, width) of every image at every scale, int [N, S, 2].
      chosen: indices of the images that are used.
      name: "train" or "test".
    """
    key = f"input.buckets_{name}"
    limit, tolerance = _DERIVED[name]
    if resize.buckets:
        buckets = sampler.check_buckets(resize.buckets, key)
    else:
        if resize.exact:
            limit, tolerance = sizes.size, -1.0  # no two shapes are ever joined
        buckets = sampler.derive_buckets(sizes[chosen], limit, tolerance)
        log.info("%s, derived from %d images: %s", key, len(chosen), buckets)
    assigned = np.zeros(sizes.shape[:2], np.int16)
    names = dataset.file_names[chosen]
    assigned[chosen] = sampler.assign_buckets(sizes[chosen], buckets, names, key)
    return buckets, assigned


def nominal_buckets(resize: Resize, height: int, width: int) -> tuple[sampler.Bucket, ...]:
    """Returns the padded training shapes where no data set is known.

    They are the configured ones, or else those of images of one size, upright and
    lying.
    """
    if resize.buckets:
        return sampler.check_buckets(resize.buckets, "input.buckets_train")
    sides = np.array([height, width])
    sizes = sampler.all_sizes(sides, sides[::-1], resize.shorts, resize.max_size)
    return sampler.derive_buckets(sizes, *_DERIVED["train"])
