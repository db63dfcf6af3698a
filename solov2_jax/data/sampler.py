"""Which image goes into which batch, at which size: pure functions of the seed.

A training run's whole order is computed up front, so that resuming at any step is an
index, and neither the number of workers nor of devices changes it.
"""

import dataclasses

import numpy as np

from solov2_jax.data.buckets import Bucket
from solov2_jax.rle import ranks

_CHUNK = 1 << 20  # images scheduled at once; changes nothing but memory


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
_ORDER, _SCALE, _FLIP, _REPEAT = range(4)
_PHASE = 92
# Of `random_generator`: an image's look; which guest is pasted and where; the look of
# a guest; custom augmentations; blur, noise, ...; a mosaic; the looks in it; which image
# is mixed with; that one's look.
LOOK, PASTE, GUEST, CUSTOM, DEGRADE, MOSAIC, TILE, MIXUP, MIXED = range(4, 13)


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

    def part(
        self, steps: slice | np.ndarray = slice(None), rows: slice = slice(None)
    ) -> "BatchSchedule":
        """Returns some of the batches, or some rows of each."""
        image, epoch = self.image[steps, rows].copy(), self.epoch[steps, rows].copy()
        return BatchSchedule(image, epoch, self.bucket[steps], self.buckets)

    def used_buckets(self, start: int = 0) -> tuple[Bucket, ...]:
        """Returns the padded (height, width) from a batch on, that of the first one first."""
        used = self.bucket[start:]
        _, first = np.unique(used, return_index=True)
        return tuple(self.buckets[i] for i in used[np.sort(first)].tolist())


def scale_index(
    seed: int, epoch: np.ndarray | int, image: np.ndarray | int, num_scales: int
) -> np.ndarray:
    """Returns which of the scales an image gets in an epoch, int64."""
    bits = random_bits(seed, _SCALE, epoch, image)
    return np.asarray(bits % np.uint64(num_scales), np.int64)


def is_flipped(seed: int, epoch: int, image: int, probability: float) -> bool:
    """Returns whether an image is mirrored in an epoch."""
    return bool(_uniform(random_bits(seed, _FLIP, epoch, image)) < probability)


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Returns the bits as numbers in [0, 1), float64."""
    return np.asarray((bits >> np.uint64(11)).astype(float) * 2.0**-53)


def random_generator(seed: int, purpose: int, *keys: int) -> np.random.Generator:
    """Returns the generator of one purpose of augmentation; no two share a stream."""
    return np.random.Generator(np.random.PCG64(int(random_bits(seed, purpose, *keys))))


def train_schedule(
    images: np.ndarray,
    buckets: tuple[Bucket, ...],
    image_buckets: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
    repeats: np.ndarray | None = None,
    evenly: bool = False,
) -> BatchSchedule:
    """Returns the batches of a training run; a longer run begins with the same ones.

    Each epoch has a new order; images wait in their bucket, over the end of an epoch too,
    until the bucket has a batch.
    Source: detectron2's AspectRatioGroupedDataset, with buckets instead of orientations.

    Args:
      images: indices of the images to train on, int [n].
      image_buckets: bucket of every image of the data set at every scale, int [N, S].
      repeats: how often to show each of `images` in an epoch, on average, float [n],
        above 0; None: once.
      evenly: an image that is to be shown r times is shown r E times in E epochs, rounded
        up or down; else, in each epoch, its last copy is drawn by itself.
    """
    pending = [np.zeros((0, 2), np.int32) for _ in buckets]
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    repeats = np.ones(len(images)) if repeats is None else repeats
    copies = np.ceil(repeats).astype(int)
    most = int(copies.max())
    images, repeats, copy = np.repeat(images, copies), np.repeat(repeats, copies), ranks(copies)
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
        if (repeats != 1).any():
            # Of an image's copies all whole ones, the last one at random.
            if evenly:
                phase = (random_bits(seed, _PHASE, images) >> np.uint64(44)) * 2.0**-20
                times = np.floor((block + 1) * repeats + phase) - np.floor(block * repeats + phase)
                shown = copy < times
            else:
                shown = _uniform(random_bits(seed, _REPEAT, block, images)) < repeats - copy
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


def repeat_factors(
    labels: np.ndarray, start: np.ndarray, images: np.ndarray, threshold: float
) -> np.ndarray:
    """Returns how often to show each of `images` in an epoch, float [n], at least 1.

    The larger of 1 and sqrt(threshold / share) of the image's rarest class, where the
    share is that of the images that have the class.
    Source: detectron2 data/samplers/distributed_sampler.py,
    repeat_factors_from_category_frequency.

    Args:
      labels: of the objects, sorted by image.
      start: the objects of image i are start[i]:start[i + 1].
      images: indices of those that are trained on, increasing, int [n]; others do not
        count.
    """
    image = np.repeat(np.arange(len(start) - 1), np.diff(start))
    used = np.isin(image, images)
    rows = np.searchsorted(images, image[used])
    pairs = np.unique(np.stack([rows, labels[used]], axis=-1), axis=0).reshape(-1, 2)
    share = np.bincount(pairs[:, 1]) / len(images)
    factors = np.ones(len(images))
    np.maximum.at(factors, pairs[:, 0], np.sqrt(threshold / share[pairs[:, 1]]))
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
        arrivals = np.flatnonzero(bucket == b)
        num_waiting = len(pending[b])
        queue = np.concatenate([pending[b], stream[arrivals]])
        full = len(queue) // batch_size  # batches
        batches.append(queue[: full * batch_size].reshape(full, batch_size, 2))
        owners.append(np.full(full, b, np.int16))
        last = np.arange(1, full + 1) * batch_size - 1 - num_waiting
        completed.append(arrivals[last])
        pending[b] = queue[full * batch_size :]
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
