"""From a data set on disk to padded batches: numpy, worker processes, no jax.

The order is a `BatchPlan`; grain only fetches its batches, in threads or processes.
grain itself imports jax in a worker, if it is installed; nothing starts a device.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from solov2_jax.data import plan as planning
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.loading import ArrayDict, EvalLoader, TrainLoader
from solov2_jax.data.mapped import Mapped

log = logging.getLogger(__name__)

# Derived padded shapes: how many at most, and which share of padded pixels one more
# must save to be worth its compilation.
_TRAIN_BUCKETS, _TRAIN_TOLERANCE = 5, 0.05
_TEST_BUCKETS, _TEST_TOLERANCE = 8, 0.02


@dataclasses.dataclass(frozen=True)
class Resize:
    """Where the padded shapes and the sizes within them come from, in pixels."""

    shorts: tuple[int, ...]  # shorter side; one is drawn per image and epoch
    max_size: int  # longer side at most
    buckets: tuple[Sequence[int], ...] = ()  # padded (h, w); () derives them
    exact: bool = False  # with (): each image's own multiples of 32, however many


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are fetched; never changes what is in them."""

    num_workers: int = 0  # processes; 0: threads only
    num_threads: int = 2  # per process
    prefetch: int = 2  # batches ready per worker


class Batches:
    """An iterable of `len` dicts of arrays; each iteration starts from the front."""

    def __init__(
        self,
        loader: TrainLoader | EvalLoader,
        plan: planning.BatchPlan,
        start: int,
        reading: Reading,
    ):
        self.buckets = plan.buckets
        self._start, self._stop = start, len(plan)
        self._loader, self._reading = loader, reading

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def replace_loader(self, make: Callable[[Any], Any]) -> None:
        """Lets another loader, made from the present one, make the batches."""
        self._loader = make(self._loader)

    def __iter__(self) -> Iterator[ArrayDict]:
        generator = self._fetch()
        # Also when the program ends in the middle: worker processes and shared memory
        # are given back before Python takes its modules apart.
        close = functools.partial(_close, weakref.ref(generator))
        atexit.register(close)
        weakref.finalize(generator, atexit.unregister, close).atexit = False
        return generator

    def _fetch(self) -> Generator[ArrayDict, None, None]:
        if not len(self):
            return
        reading = self._reading
        if not flags.FLAGS.is_parsed():
            # grain reads absl flags in its processes, also outside of an absl app.
            flags.FLAGS.mark_as_parsed()
        batches = grain.MapDataset.range(self._start, self._stop)
        stream = batches.map(Mapped(self._loader)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=reading.num_threads,
                prefetch_buffer_size=max(reading.prefetch, reading.num_threads),
            )
        )
        if reading.num_workers:
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=min(reading.num_workers, len(self)),
                    per_worker_buffer_size=reading.prefetch,
                )
            )
        iterator = iter(stream)
        try:
            yield from map(_own, iterator)
        finally:
            iterator.close()
            # grain's last batches hang in reference cycles with its StopIteration.
            gc.collect()


def _close(generator: "weakref.ref[Generator[ArrayDict, None, None]]") -> None:
    """Ends a generator that still exists."""
    if (alive := generator()) is not None:
        alive.close()


def _own(batch: ArrayDict) -> ArrayDict:
    """Returns copies outside of the workers' shared memory, which is freed at once."""
    return {key: np.array(value) for key, value in batch.items()}


def train_batches(
    dataset: CocoDataset,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
    resize: Resize,
    flip_prob: float,
    max_instances: int = 0,
    keep_empty: bool = True,
    channel_order: str = "RGB",
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    reading: Reading | None = None,
) -> Batches:
    """Returns the batches of steps `start_step` to `num_steps`, keys as in `Batch`.

    What step t holds depends on `seed` and t alone.

    Args:
      batch_size: global; `shard` (i, n) fetches the i-th of its n slices.
      max_instances: padded objects per image; 0 for the data set's largest number.
        Of more objects, the ones with the largest boxes are kept.
      keep_empty: train on images without objects too.
      channel_order: "RGB" or "BGR".
    """
    index, count = shard
    if batch_size % count or not 0 <= index < count:
        raise ValueError(
            f"train.batch_size {batch_size} cannot be split into {count} equal slices "
            f"(slice {index}); make it a multiple of the number of processes."
        )
    sizes = planning.all_sizes(
        dataset.heights, dataset.widths, resize.shorts, resize.max_size
    )
    chosen = (
        np.arange(len(dataset))
        if keep_empty
        else np.flatnonzero(dataset.objects_per_image)
    )
    if not len(chosen):
        raise ValueError(
            f"{dataset.annotation_file}: no image has an object to train on, and "
            "data.keep_empty is False; annotate some or set it to True."
        )
    buckets, assigned = _buckets(
        dataset, sizes, chosen, resize, _TRAIN_BUCKETS, _TRAIN_TOLERANCE, "train"
    )
    plan = planning.train_plan(
        chosen,
        buckets,
        assigned,
        seed=seed,
        num_steps=num_steps,
        batch_size=batch_size,
    )
    part = slice(index * batch_size // count, (index + 1) * batch_size // count)
    plan = dataclasses.replace(
        plan, image=plan.image[:, part].copy(), epoch=plan.epoch[:, part].copy()
    )
    number = dataset.objects_per_image[chosen]
    slots = max_instances or max(8, -(-int(number.max()) // 8) * 8)
    if (crowded := number > slots).any():
        log.warning(
            "%d images have more than data.max_instances = %d objects; their %d "
            "smallest are left out",
            crowded.sum(),
            slots,
            (number[crowded] - slots).sum(),
        )
    loader = TrainLoader(
        dataset, plan, sizes, _is_bgr(channel_order), seed, flip_prob, slots
    )
    return Batches(loader, plan, start_step, reading or Reading())


def eval_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    resize: Resize,
    channel_order: str = "RGB",
    max_images: int = 0,
    reading: Reading | None = None,
) -> Batches:
    """Returns every image once: image, image_size, image_id, original_size [B, 2].

    Images are in the json's order but for the grouping into buckets; rows that fill up
    a batch have image_id -1.

    Args:
      max_images: only the first ones; 0 for all.
    """
    sizes = planning.all_sizes(
        dataset.heights, dataset.widths, resize.shorts[:1], resize.max_size
    )
    chosen = np.arange(len(dataset))[: max_images or None]
    buckets, assigned = _buckets(
        dataset, sizes, chosen, resize, _TEST_BUCKETS, _TEST_TOLERANCE, "test"
    )
    plan = planning.eval_plan(assigned[chosen, 0], buckets, batch_size)
    loader = EvalLoader(dataset, plan, sizes, _is_bgr(channel_order))
    return Batches(loader, plan, 0, reading or Reading())


def _buckets(
    dataset: CocoDataset,
    sizes: np.ndarray,
    chosen: np.ndarray,
    resize: Resize,
    limit: int,
    tolerance: float,
    name: str,
) -> tuple[tuple[planning.Bucket, ...], np.ndarray]:
    """Returns the padded shapes and each image's, per scale, int16 [N, S]."""
    key = f"input.buckets_{name}"
    if resize.buckets:
        buckets = planning.check_buckets(resize.buckets, key)
    else:
        if resize.exact:
            limit, tolerance = sizes.size, -1.0  # no two shapes are ever joined
        buckets = planning.derive_buckets(sizes[chosen], limit, tolerance)
        log.info("%s, derived from %d images: %s", key, len(chosen), buckets)
    assigned = np.zeros(sizes.shape[:2], np.int16)
    names = dataset.file_names[chosen]
    assigned[chosen] = planning.assign_buckets(sizes[chosen], buckets, names, key)
    return buckets, assigned


def _is_bgr(channel_order: str) -> bool:
    if channel_order not in ("RGB", "BGR"):
        raise ValueError(
            f'input.channel_order is {channel_order!r}; use "RGB" or "BGR".'
        )
    return channel_order == "BGR"


def resize_of(
    shorts: Sequence[int], max_size: int, buckets: Sequence[Sequence[int]], key: str
) -> Resize:
    """Returns the sizes, or raises naming the config's key."""
    if not shorts or min(shorts) < 1 or max_size < 1:
        raise ValueError(
            f"{key}: sizes {tuple(shorts)}, at most {max_size}, must be positive."
        )
    return Resize(
        tuple(int(s) for s in shorts),
        int(max_size),
        tuple(buckets),
    )
