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


# Streams of random_bits.
_ORDER, _SCALE, _FLIP, _REPEAT, AUGMENT = range(5)


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The images of T batches of size B; -1 is padding."""

    image: np.ndarray  # int32 [T, B], index in the data set
    # int32 [T, B], how often the data set was gone through before; where images are
    # repeated within an epoch, this times the largest number of copies, plus the copy.
    epoch: np.ndarray
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


def train_schedule(
    images: np.ndarray,
    buckets: tuple[Bucket, ...],
    image_buckets: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
    repeats: np.ndarray | None = None,
) -> BatchSchedule:
    """Returns the batches of a training run; a longer run begins with the same ones.

    Each epoch goes through the images in a new order; images wait in their bucket,
    over the end of an epoch too, until the bucket has a batch.
    Source: detectron2 data/common.py, AspectRatioGroupedDataset, with buckets instead
    of two orientations.

    Args:
      images: indices of the images to train on, int [n].
      image_buckets: bucket of every image of the data set at every scale, int [N, S].
      repeats: how often to show each of `images` in an epoch, on average, float [n],
        at least 1; None: once.
    """
    pending = [np.zeros((0, 2), np.int32) for _ in buckets]
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    copies = np.ones(len(images), int) if repeats is None else np.ceil(repeats)
    copies = copies.astype(int)
    most = int(copies.max())
    if repeats is not None:
        images, repeats = np.repeat(images, copies), np.repeat(repeats, copies)
    copy = np.arange(len(images)) - np.repeat(np.cumsum(copies) - copies, copies)
    made = epoch = 0
    while made < num_steps:
        wanted = (num_steps - made) * batch_size
        epochs = max(1, min(-(-wanted // len(images)), _CHUNK // len(images)))
        block = np.arange(epoch, epoch + epochs)[:, None]
        order = np.argsort(random_bits(seed, _ORDER, block * most + copy, images))
        chosen = images[order]
        key = block * most + copy[order]
        scales = scale_index(seed, key, chosen, image_buckets.shape[1])
        bucket = image_buckets[chosen, scales]
        stream = np.stack([chosen, key], axis=-1).astype(np.int32)
        if repeats is not None:
            shown = _is_shown(seed, block, images, copy, repeats)
            shown = np.take_along_axis(shown, order, axis=1)
            bucket, stream = bucket[shown], stream[shown]
        bucket, stream = bucket.ravel(), stream.reshape(-1, 2)
        items, owner = _group(stream, bucket, pending, batch_size)
        pieces.append((items, owner))
        made += len(items)
        epoch += epochs
    items = np.concatenate([p[0] for p in pieces])[:num_steps]
    owner = np.concatenate([p[1] for p in pieces])[:num_steps]
    return BatchSchedule(items[..., 0], items[..., 1], owner, buckets)


def _is_shown(
    seed: int,
    epoch: np.ndarray,
    image: np.ndarray,
    copy: np.ndarray,
    repeats: np.ndarray,
) -> np.ndarray:
    """Returns which copies an epoch has: all whole ones, the last one at random."""
    bits = random_bits(seed, _REPEAT, epoch, image) >> np.uint64(11)
    return bits.astype(float) * 2.0**-53 < repeats - copy


def repeat_factors(labels: np.ndarray, start: np.ndarray, threshold: float) -> np.ndarray:
    """Returns how often to show each image in an epoch, float [N], at least 1.

    The larger of 1 and sqrt(threshold / share) of the image's rarest class, where the
    share is that of the images that have the class.
    Source: detectron2 data/samplers/distributed_sampler.py,
    repeat_factors_from_category_frequency.

    Args:
      labels: of the objects, sorted by image.
      start: the objects of image i are start[i]:start[i + 1].
    """
    number = len(start) - 1
    image = np.repeat(np.arange(number), np.diff(start))
    pairs = np.unique(np.stack([image, labels], axis=-1), axis=0).reshape(-1, 2)
    share = np.bincount(pairs[:, 1]) / number
    factors = np.ones(number)
    wanted = np.sqrt(threshold / share[pairs[:, 1]])
    np.maximum.at(factors, pairs[:, 0], wanted)
    return factors


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


def eval_schedule(
    image_buckets: np.ndarray, buckets: tuple[Bucket, ...], batch_size: int
) -> BatchSchedule:
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
    return BatchSchedule(items[..., 0], items[..., 1], owner, buckets)
