"""Which image goes into which batch, at which size: pure functions of the seed.

A training run's whole order is computed up front, so that resuming at any step is an
index, and neither the number of workers nor of devices changes it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.transforms import shortest_edge_sizes

Bucket = tuple[int, int]

STRIDE = 32  # of the coarsest feature level: sides of a bucket are its multiples
_CHUNK = 1 << 20  # images planned at once; changes nothing but memory


def random_bits(seed: int, stream: int, *keys: np.ndarray | int) -> np.ndarray:
    """Returns uint64 hashes of the keys, broadcast: randomness without a state.

    Source: splitmix64's finaliser (Steele, Lea, Flood 2014), chained over the keys.

    Args:
      stream: separates the uses of one seed.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    for key in (seed, stream, *keys):
        value = np.asarray(key).astype(np.int64).astype(np.uint64)
        with np.errstate(over="ignore"):
            state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


_ORDER, _SCALE, _FLIP = range(3)  # streams of random_bits


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The images of T batches of size B; -1 is padding."""

    image: np.ndarray  # int32 [T, B], index in the data set
    epoch: np.ndarray  # int32 [T, B], how often the data set was gone through before
    bucket: np.ndarray  # int16 [T], index in `buckets`
    buckets: tuple[Bucket, ...]  # padded (height, width)

    def __len__(self) -> int:
        return len(self.image)


def scale_index(
    seed: int, epoch: np.ndarray | int, image: np.ndarray | int, number: int
) -> np.ndarray:
    """Returns which of `number` scales an image gets in an epoch, int64."""
    bits = random_bits(seed, _SCALE, epoch, image)
    return np.asarray(bits % np.uint64(number), np.int64)


def is_flipped(seed: int, epoch: int, image: int, probability: float) -> bool:
    """Returns whether an image is mirrored in an epoch."""
    bits = random_bits(seed, _FLIP, epoch, image) >> np.uint64(11)
    return float(bits) * 2.0**-53 < probability


def all_sizes(
    heights: np.ndarray, widths: np.ndarray, shorts: Sequence[int], max_size: int
) -> np.ndarray:
    """Returns the (height, width) of every image at every scale, int32 [N, S, 2]."""
    short = np.asarray(shorts)
    return shortest_edge_sizes(heights[:, None], widths[:, None], short, max_size)


def derive_buckets(
    sizes: np.ndarray, limit: int, tolerance: float
) -> tuple[Bucket, ...]:
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
            raise ValueError(
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
        raise ValueError(
            f"{key}: no shape in {[tuple(b) for b in buckets]} holds "
            f"{describe(names[np.unique(bad[:, 0])].tolist())}; {names[bad[0][0]]} is "
            f"{largest} (height, width) after the resize. Add a shape that does, or "
            "leave the key empty to have shapes derived."
        )
    return result


def train_plan(
    images: np.ndarray,
    buckets: tuple[Bucket, ...],
    image_buckets: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
) -> BatchPlan:
    """Returns the batches of a training run; a longer run begins with the same ones.

    Each epoch goes through the images in a new order; images wait in their bucket,
    over the end of an epoch too, until the bucket has a batch.
    Source: detectron2 data/common.py, AspectRatioGroupedDataset, with buckets instead
    of two orientations.

    Args:
      images: indices of the images to train on, int [n].
      image_buckets: bucket of every image of the data set at every scale, int [N, S].
    """
    pending = [np.zeros((0, 2), np.int32) for _ in buckets]
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    made = epoch = 0
    while made < num_steps:
        wanted = (num_steps - made) * batch_size
        epochs = max(1, min(-(-wanted // len(images)), _CHUNK // len(images)))
        block = np.arange(epoch, epoch + epochs)[:, None]
        order = np.argsort(random_bits(seed, _ORDER, block, images))
        chosen = images[order]
        scales = scale_index(seed, block, chosen, image_buckets.shape[1])
        bucket = image_buckets[chosen, scales].ravel()
        stream = np.stack([chosen, np.broadcast_to(block, chosen.shape)], axis=-1)
        stream = stream.reshape(-1, 2).astype(np.int32)
        items, owner = _group(stream, bucket, pending, batch_size)
        pieces.append((items, owner))
        made += len(items)
        epoch += epochs
    items = np.concatenate([p[0] for p in pieces])[:num_steps]
    owner = np.concatenate([p[1] for p in pieces])[:num_steps]
    return BatchPlan(items[..., 0], items[..., 1], owner, buckets)


def _group(
    stream: np.ndarray, bucket: np.ndarray, pending: list[np.ndarray], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batches that a stream completes, in the order of completion.

    Args:
      stream: int32 [n, 2]; `bucket` of each.
      pending: what waits per bucket; updated.
    """
    batches, owners, completed = [], [], []
    for b in range(len(pending)):
        where = np.flatnonzero(bucket == b)
        waiting = len(pending[b])
        queue = np.concatenate([pending[b], stream[where]])
        number = len(queue) // batch_size
        batches.append(queue[: number * batch_size].reshape(number, batch_size, 2))
        owners.append(np.full(number, b, np.int16))
        last = np.arange(1, number + 1) * batch_size - 1 - waiting
        completed.append(where[last])
        pending[b] = queue[number * batch_size :]
    order = np.argsort(np.concatenate(completed), kind="stable")
    return np.concatenate(batches)[order], np.concatenate(owners)[order]


def eval_plan(
    image_buckets: np.ndarray, buckets: tuple[Bucket, ...], batch_size: int
) -> BatchPlan:
    """Returns batches that hold each image once, filled up with -1.

    Args:
      image_buckets: bucket of every image, int [N].
    """
    stream = np.stack([np.arange(len(image_buckets)), np.zeros(len(image_buckets))], 1)
    pending = [np.zeros((0, 2), np.int32) for _ in buckets]
    items, owner = _group(stream.astype(np.int32), image_buckets, pending, batch_size)
    for b, rest in enumerate(pending):
        if len(rest):
            fill = np.full((batch_size - len(rest), 2), -1, np.int32)
            items = np.concatenate([items, np.concatenate([rest, fill])[None]])
            owner = np.concatenate([owner, np.array([b], np.int16)])
    return BatchPlan(items[..., 0], items[..., 1], owner, buckets)
