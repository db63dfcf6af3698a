"""Sizes after the resize, and the padded shapes ("buckets") that hold them."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.transforms import shortest_edge_sizes
from solov2_jax.io import InputError
from solov2_jax.rle import Size

log = logging.getLogger(__name__)

Bucket = tuple[int, int]  # padded (height, width)

STRIDE = 32  # of the coarsest feature level: sides of a bucket are its multiples

# Of derived padded shapes: one more must save this share of padded pixels.
TOLERANCE = {"train": 0.05, "test": 0.02}


def round_up(size: int, divisor: int) -> int:
    """Returns the smallest multiple of `divisor` that is not below `size`."""
    return -(-size // divisor) * divisor


@dataclasses.dataclass(frozen=True)
class Resize:
    """Where the padded shapes and the sizes within them come from, in pixels."""

    shorts: tuple[int, ...]  # shorter side; one is drawn per image and epoch
    max_size: int  # longer side at most
    buckets: tuple[Sequence[int], ...] = ()  # padded (h, w); () derives them
    max_buckets: int = 2  # that are derived

    def size(self, original: Size, scale: int = 0) -> Size:
        """Returns (height, width) of an image of this size at one of the scales."""
        height, width = shortest_edge_sizes(*original, self.shorts[scale], self.max_size).tolist()
        return height, width

    def sizes(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Returns (height, width) of images [N] at every scale, int32 [N, S, 2]."""
        shorts = np.asarray(self.shorts)
        return shortest_edge_sizes(heights[:, None], widths[:, None], shorts, self.max_size)


def derive_buckets(sizes: np.ndarray, limit: int, tolerance: float) -> tuple[Bucket, ...]:
    """Returns at most `limit` padded shapes that hold the sizes with little padding.

    Starts from every shape that occurs, rounded up to multiples of 32, and joins the
    two whose union costs the fewest padded pixels, until there are few enough and the
    next union would cost more than `tolerance` of all pixels. A data set of one size
    thus gets exactly that size.

    Args:
      sizes: (height, width), int [..., 2].
    """
    cells = -(-sizes.reshape(-1, 2).astype(np.int64) // STRIDE)
    keys, weights = np.unique(cells[:, 0] << 32 | cells[:, 1], return_counts=True)
    shapes = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=-1) * STRIDE
    total = int((weights * shapes.prod(axis=1)).sum())
    while len(shapes) > 1:
        union = np.maximum(shapes[:, None], shapes[None])
        own = weights * shapes.prod(axis=1)
        both = weights[:, None] + weights[None]
        cost = both * union.prod(axis=-1) - own[:, None] - own[None]
        cost[np.tril_indices(len(shapes))] = np.iinfo(np.int64).max
        i, j = np.unravel_index(int(cost.argmin()), cost.shape)
        if len(shapes) <= limit and cost[i, j] > tolerance * total:
            break
        shapes[i], weights[i] = union[i, j], both[i, j]
        shapes, weights = np.delete(shapes, j, axis=0), np.delete(weights, j)
    return tuple(sorted((int(h), int(w)) for h, w in shapes))


def check_buckets(buckets: Sequence[Sequence[int]], key: str) -> tuple[Bucket, ...]:
    """Returns the buckets as tuples, or raises naming the config's key."""
    for bucket in buckets:
        if len(bucket) != 2 or any(s < STRIDE or s % STRIDE for s in bucket):
            raise InputError(
                f"{key}: {tuple(bucket)} is not a (height, width) of positive "
                f"multiples of {STRIDE}; round it up."
            )
    return tuple((int(h), int(w)) for h, w in buckets)


def assign_buckets(
    sizes: np.ndarray, buckets: Sequence[Bucket], names: np.ndarray, key: str
) -> np.ndarray:
    """Returns the smallest bucket that holds each size, int16 [...].

    Args:
      sizes: (height, width) after the resize, int [..., 2]; the first axis is images.
      names: of the images, for the message.
      key: the config's key, for the message.
    """
    shapes = np.array(buckets, np.int64)
    order = np.argsort(shapes.prod(axis=1), kind="stable")
    result = np.full(sizes.shape[:-1], -1, np.int16)
    for b in order[::-1]:
        result[(sizes <= shapes[b]).all(axis=-1)] = b
    if (bad := np.argwhere(result < 0)).size:
        largest = sizes[tuple(bad[0])].tolist()
        raise InputError(
            f"{key}: no shape in {[tuple(b) for b in buckets]} holds "
            f"{describe(names[np.unique(bad[:, 0])].tolist())}; {names[bad[0][0]]} is "
            f"{largest} (height, width) after the resize. Add a shape that does, or "
            "leave the key empty to have shapes derived."
        )
    return result


def choose_buckets(
    dataset: CocoDataset, sizes: np.ndarray, chosen: np.ndarray, resize: Resize, name: str
) -> tuple[tuple[Bucket, ...], np.ndarray]:
    """Returns the padded shapes and each image's, per scale, int16 [N, S].

    Args:
      sizes: (height, width) of every image at every scale, int [N, S, 2].
      chosen: indices of the images that are used.
      name: "train" or "test".
    """
    key = f"input.buckets_{name}"
    if resize.buckets:
        buckets = check_buckets(resize.buckets, key)
    else:
        buckets = derive_buckets(sizes[chosen], resize.max_buckets, TOLERANCE[name])
        log.info("%s, derived from %d images: %s", key, len(chosen), buckets)
    assigned = np.zeros(sizes.shape[:2], np.int16)
    names = dataset.file_names[chosen]
    assigned[chosen] = assign_buckets(sizes[chosen], buckets, names, key)
    return buckets, assigned
