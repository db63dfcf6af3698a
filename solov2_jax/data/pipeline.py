"""From a data set on disk to padded batches: numpy, worker processes, no jax.

The order is a `BatchPlan`; grain only fetches its batches, in threads or processes.
grain itself imports jax in a worker, if it is installed; nothing starts a device.


Ctrl-C is for the process that reads: its workers go on until it closes them.

A terminal and a notebook's stop button signal the whole group of processes. The reader
decides what becomes of the run; a worker that died of it would print a traceback, and
could not give the batches that are still wanted.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import logging
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from solov2_jax.data import sampler
from solov2_jax.data.augment import Augment
from solov2_jax.data.batch import (
    ArrayDict,
    AugmentedBatchMaker,
    EvalBatchMaker,
    TrainBatchMaker,
    expand_masks,
)
from solov2_jax.data.buckets import Resize, choose_buckets
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import reuse_memory
from solov2_jax.data.shared_memory import (
    MmapPickle,
    PoolSender,
    SharedMemoryPool,
    make_pool,
    receive,
)

log = logging.getLogger(__name__)

_IN_USE = 4  # batches that the reader may hold before they travel more slowly
_PIPED = 1 << 16  # bytes of an array that goes through a worker's pipe at most


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
        loader: TrainBatchMaker | EvalBatchMaker,
        plan: sampler.BatchSchedule,
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
        if not reading.num_workers:
            reuse_memory()
        arena = self._make_arena()
        loader = self._loader if arena is None else PoolSender(self._loader, arena)
        batches = grain.MapDataset.range(self._start, self._stop)
        stream = batches.map(MmapPickle(loader)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=reading.num_threads,
                prefetch_buffer_size=max(reading.prefetch, reading.num_threads),
            )
        )
        if reading.num_workers:
            # Each small array would otherwise get shared memory of its own.
            options = grain.experimental.DatasetOptions(min_shm_size=_PIPED)
            stream = grain.experimental.WithOptionsIterDataset(stream, options)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=min(reading.num_workers, len(self)),
                    per_worker_buffer_size=reading.prefetch,
                ),
                worker_init_fn=_start_worker,
            )
        iterator = iter(stream)
        try:
            with kept_from_children(bool(reading.num_workers)):
                batch = next(iterator, None)  # starts the processes
            while batch is not None:
                yield expand_masks(receive(batch, arena))
                batch = next(iterator, None)
        finally:
            iterator.close()
            # grain's last batches hang in reference cycles with its StopIteration.
            gc.collect()

    def _make_arena(self) -> SharedMemoryPool | None:
        """Returns memory for the batches on their way and some that are in use."""
        reading = self._reading
        if not reading.num_workers:
            return None
        ahead = reading.prefetch + max(reading.prefetch, reading.num_threads) + 1
        largest = max(self._loader.batch_bytes(h, w) for h, w in self.buckets)
        return make_pool(reading.num_workers * ahead + _IN_USE, largest)


def _start_worker(number: int, count: int) -> None:
    """Prepares a worker process."""
    del number, count
    ignore()
    reuse_memory()


def _close(generator: "weakref.ref[Generator[ArrayDict, None, None]]") -> None:
    """Ends a generator that still exists."""
    if (alive := generator()) is not None:
        alive.close()


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
    repeat_threshold: float = 0.0,
    max_images: int = 0,
    channel_order: str = "RGB",
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    augment: Augment | None = None,
    reading: Reading | None = None,
) -> Batches:
    """Returns the batches of steps `start_step` to `num_steps`, keys as in `Batch`.

    What step t holds depends on `seed` and t alone.

    Args:
      batch_size: global; `shard` (i, n) fetches the i-th of its n slices.
      max_instances: padded objects per image; 0 for the data set's largest number.
        Of more objects, the ones with the largest boxes are kept.
      keep_empty: train on images without objects too.
      repeat_threshold: show images of classes that fewer than this share of the images
        have more often, see `plan.repeat_factors`; 0: every image once an epoch.
      max_images: train on the first ones only; 0 for all.
      channel_order: "RGB" or "BGR".
      augment: what may happen to an image beyond resize and flip; None: nothing. Where
        objects are pasted and `max_instances` is 0, there is room for twice as many.
    """
    index, count = shard
    if batch_size % count or not 0 <= index < count:
        raise ValueError(
            f"train.batch_size {batch_size} cannot be split into {count} equal slices "
            f"(slice {index}); make it a multiple of the number of processes."
        )
    sizes = sampler.all_sizes(dataset.heights, dataset.widths, resize.shorts, resize.max_size)
    if augment is not None and augment.jitter_scale:
        sizes = np.full((len(dataset), 1, 2), augment.jitter_size, np.int32)
    chosen = np.arange(len(dataset)) if keep_empty else np.flatnonzero(dataset.objects_per_image)
    if max_images:
        chosen = chosen[chosen < max_images]
    if not len(chosen):
        raise ValueError(
            f"{dataset.annotation_file}: no image has an object to train on, and "
            "data.keep_empty is False; annotate some or set it to True."
        )
    buckets, assigned = choose_buckets(dataset, sizes, chosen, resize, "train")
    _report_negatives(dataset, keep_empty)
    plan = sampler.train_schedule(
        chosen,
        buckets,
        assigned,
        seed=seed,
        num_steps=num_steps,
        batch_size=batch_size,
        repeats=_repeats(dataset, chosen, repeat_threshold),
    )
    part = slice(index * batch_size // count, (index + 1) * batch_size // count)
    plan = dataclasses.replace(
        plan, image=plan.image[:, part].copy(), epoch=plan.epoch[:, part].copy()
    )
    number = dataset.objects_per_image[chosen]
    most = int(number.max()) * (2 if augment is not None and augment.paste_prob else 1)
    slots = max_instances or max(8, -(-most // 8) * 8)
    if (crowded := number > slots).any():
        log.warning(
            "%d images have more than data.max_instances = %d objects; their %d "
            "smallest are left out",
            crowded.sum(),
            slots,
            (number[crowded] - slots).sum(),
        )
    fields = dataset, plan, sizes, _is_bgr(channel_order), seed, flip_prob, slots
    loader = TrainBatchMaker(*fields)
    if augment is not None and augment.active:
        loader = AugmentedBatchMaker(*fields, augment, resize)
    return Batches(loader, plan, start_step, reading or Reading())


def _report_negatives(dataset: CocoDataset, keep_empty: bool) -> None:
    """Logs how many images have no object, and what becomes of them."""
    number = int((dataset.objects_per_image == 0).sum())
    fate = "trained on as negatives" if keep_empty else "left out"
    log.info(
        "%d of %d images (%.1f %%) have no object; they are %s (data.keep_empty)",
        number,
        len(dataset),
        100 * number / len(dataset),
        fate,
    )


def _repeats(dataset: CocoDataset, chosen: np.ndarray, threshold: float) -> np.ndarray | None:
    """Returns how often each chosen image is shown in an epoch; None: once."""
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"data.repeat_threshold is {threshold}; it is a share of the images, 0..1."
        )
    if not threshold:
        return None
    factors = sampler.repeat_factors(dataset.labels, dataset.start, threshold)[chosen]
    log.info(
        "data.repeat_threshold %g: %d of %d images are shown more than once an epoch, "
        "at most %.1f times; an epoch has %.0f images",
        threshold,
        (factors > 1).sum(),
        len(chosen),
        factors.max(),
        factors.sum(),
    )
    return factors


def eval_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    resize: Resize,
    channel_order: str = "RGB",
    max_images: int = 0,
    shard: tuple[int, int] = (0, 1),
    reading: Reading | None = None,
) -> Batches:
    """Returns every image once: image, image_size, image_id, original_size [B, 2].

    Images are in the json's order but for the grouping into buckets; rows that fill up
    a batch have image_id -1.

    Args:
      max_images: only the first ones; 0 for all.
      shard: (i, n) gives every n-th batch from the i-th on; together, n such parts hold
        each image once.
    """
    sizes = sampler.all_sizes(dataset.heights, dataset.widths, resize.shorts[:1], resize.max_size)
    chosen = np.arange(len(dataset))[: max_images or None]
    buckets, assigned = choose_buckets(dataset, sizes, chosen, resize, "test")
    plan = sampler.eval_schedule(assigned[chosen, 0], buckets, batch_size)
    index, count = shard
    part = slice(index, None, count)
    plan = dataclasses.replace(
        plan, image=plan.image[part], epoch=plan.epoch[part], bucket=plan.bucket[part]
    )
    loader = EvalBatchMaker(dataset, plan, sizes, _is_bgr(channel_order))
    return Batches(loader, plan, 0, reading or Reading())


def _is_bgr(channel_order: str) -> bool:
    if channel_order not in ("RGB", "BGR"):
        raise ValueError(f'input.channel_order is {channel_order!r}; use "RGB" or "BGR".')
    return channel_order == "BGR"


def ignore() -> None:
    """Lets SIGINT pass this process by."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def kept_from_children(wanted: bool) -> Iterator[None]:
    """Holds SIGINT back inside `with`, for what this thread starts: for good.

    Threads and processes inherit what is held back, so a worker is safe from its first
    instruction on. In the present thread the signal arrives when the block ends.

    Args:
      wanted: False: nothing is held back.
    """
    if not wanted or not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    # It would start with the first worker, and lets the signal through when it does.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
