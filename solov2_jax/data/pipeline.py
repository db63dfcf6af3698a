"""From a data set on disk to padded batches: numpy, worker processes, no jax.

The order is a `BatchSchedule`; grain only fetches its batches, in threads or processes.
grain itself imports jax in a worker, if it is installed; nothing starts a device.

Workers live and die with the process that reads. Ctrl-C and SIGTERM are for that process
alone, although a terminal, a notebook and a batch system signal the whole group: it
decides what becomes of the run, and may still want batches. A worker that is killed is an
error of the reader; a reader that is killed takes its workers along.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping
from multiprocessing import connection, resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from solov2_jax.data import sampler
from solov2_jax.data.augment import Augment
from solov2_jax.data.batch import ArrayDict, BatchMaker, EvalBatchMaker, PixelMap, expand_masks
from solov2_jax.data.buckets import Resize, choose_buckets
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.custom_augment import custom_function
from solov2_jax.data.images import reuse_memory
from solov2_jax.data.shared_memory import MmapPickle, PoolSender, SharedMemoryPool, receive
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError

log = logging.getLogger(__name__)

_IN_USE = 4  # batches that the reader may hold before they travel more slowly
_PIPED = 1 << 16  # bytes of an array that goes through a worker's pipe at most
_NO_AUGMENT = Augment()
_NO_MAPS: dict[str, PixelMap] = {}
_IS_BGR = {"RGB": False, "BGR": True}
_SMALL_ARRAYS = 1 << 20  # bytes of a slot for what is neither image nor masks


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are fetched; never changes what is in them."""

    num_workers: int = 0  # processes; 0: threads only
    num_threads: int = 2  # per process
    prefetch: int = 2  # batches ready per worker


class Batches:
    """An iterable of `len` dicts of arrays; each iteration starts from the front.

    Attributes:
      maker: makes the batch of a step; may be replaced.
      packed: training masks come as bits, see `expand_masks`.
    """

    def __init__(self, maker: EvalBatchMaker, start: int, reading: Reading):
        self.maker, self.reading, self.packed = maker, reading, False
        self.buckets = maker.schedule.buckets
        self._start, self._stop = start, len(maker.schedule)

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

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
        pool = self._make_pool()
        iterator = iter(self._stream(pool))
        told = False
        try:
            in_processes = self.reading.num_workers > 0
            with _signals_held_back() if in_processes else contextlib.nullcontext():
                batch = _next(iterator)  # starts the processes
            while batch is not None:
                arrays = receive(batch, pool)
                told = told or self._tell_left_out(arrays)
                yield expand_masks(arrays, packed=self.packed)
                batch = _next(iterator)
        finally:
            iterator.close()
            # grain's last batches hang in reference cycles with its StopIteration.
            gc.collect()

    def _stream(self, pool: SharedMemoryPool | None) -> Any:
        """Returns grain's stream of what `receive` takes."""
        reading = self.reading
        if not flags.FLAGS.is_parsed():
            # grain reads absl flags in its processes, also outside of an absl app.
            flags.FLAGS.mark_as_parsed()
        if not reading.num_workers:
            reuse_memory()
        maker = self.maker if pool is None else PoolSender(self.maker, pool)
        steps = grain.MapDataset.range(self._start, self._stop)
        stream = steps.map(MmapPickle(maker)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=reading.num_threads,
                prefetch_buffer_size=max(reading.prefetch, reading.num_threads),
            )
        )
        if not reading.num_workers:
            return stream
        # Each small array would otherwise get shared memory of its own.
        options = grain.experimental.DatasetOptions(min_shm_size=_PIPED)
        stream = grain.experimental.WithOptionsIterDataset(stream, options)
        return stream.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=min(reading.num_workers, len(self)),
                per_worker_buffer_size=reading.prefetch,
            ),
            worker_init_fn=_start_worker,
        )

    def _make_pool(self) -> SharedMemoryPool | None:
        """Returns memory for the batches on their way and some that are in use."""
        reading = self.reading
        if not reading.num_workers or not hasattr(os, "memfd_create"):
            return None
        ahead = reading.prefetch + max(reading.prefetch, reading.num_threads) + 1
        largest = max(self.maker.batch_bytes(h, w) for h, w in self.buckets)
        slots = reading.num_workers * ahead + _IN_USE
        return SharedMemoryPool(slots, largest + largest // 4 + _SMALL_ARRAYS)

    def _tell_left_out(self, batch: ArrayDict) -> bool:
        """Logs that augmentation made more objects than fit, and returns whether it did."""
        maker, left_out = self.maker, int(batch.get("left_out", 0))
        if not left_out or not isinstance(maker, BatchMaker) or not maker.augment.adds_objects:
            return False
        log.warning(
            "with what augment.mosaic_prob, mixup_prob, paste_prob and augment.custom add, "
            "images have more than "
            "data.max_instances = %d objects; the smallest are left out, %d in this batch. "
            "Raise data.max_instances to train on all.",
            maker.slots,
            left_out,
        )
        return True


def _next(iterator: Any) -> Any:
    """Returns the next batch, None after the last one.

    Raises:
      InputError: where a worker process was killed.
    """
    try:
        return next(iterator, None)
    except RuntimeError as error:
        text = str(error)
        if "Worker process was terminated" not in text:
            raise
        code = text.partition("exit code ")[2].partition(".")[0]
        raise InputError(
            f"a process that reads training data ended unexpectedly (exit code {code}; -9 is "
            "a kill, mostly by the system for want of memory): lower data.num_workers, "
            "data.prefetch or train.batch_size, or give the machine more memory."
        ) from error


def _start_worker(_index: int, _count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reuse_memory()


def _end_with_parent() -> None:
    """Waits until the process that reads is gone, however it ended, and ends this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _close(reference: "weakref.ref[Generator[ArrayDict, None, None]]") -> None:
    """Ends a generator that still exists."""
    if (generator := reference()) is not None:
        generator.close()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back inside `with`, for what this thread starts: for good.

    Threads and processes inherit what is held back, so a worker is safe from its first
    instruction on. In the present thread a signal arrives when the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # It would start with the first worker, and lets the signals through when it does.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    augment: Augment = _NO_AUGMENT,
    keypoints: Keypoints | None = None,
    pixel_maps: Mapping[str, PixelMap] = _NO_MAPS,
    join_steps: int = 2**62,
    reading: Reading = Reading(),
) -> Batches:
    """Returns the batches of steps `start_step` to `num_steps`, keys as in `Batch`.

    What step t holds depends on `seed` and t alone.

    Args:
      batch_size: global; `shard` (i, n) fetches the i-th of its n slices.
      max_instances: padded objects per image, those with the largest boxes; 0 for the
        data set's largest number, and once more for each way in which images are joined.
      repeat_threshold: see `sampler.repeat_factors`; 0: every image once an epoch.
      max_images: train on the first ones only; 0 for all.
      keypoints: of the data set's objects, for a field `keypoints`.
      pixel_maps: further fields, uint8 [B, h, w], by name.
      join_steps: from this step on, no images are joined (mosaic, mixup, copy and paste).
    """
    rows = _slice_of_batch(batch_size, shard)
    if pixel_maps and (augment.adds_objects or augment.cutout_prob):
        raise InputError(
            "augment.paste_prob, mosaic_prob, mixup_prob, cutout_prob and augment.custom do "
            f"not reach {', '.join(pixel_maps)}; set them back to 0 and ()."
        )
    for path in augment.custom:
        custom_function(path)  # an error before anything is read
    sizes = resize.sizes(dataset.heights, dataset.widths)
    if augment.jitter_scale:
        sizes = np.full((len(dataset), 1, 2), augment.jitter_size, np.int32)
    images = _training_images(dataset, keep_empty, max_images)
    buckets, assigned = choose_buckets(dataset, sizes, images, resize, "train")
    schedule = sampler.train_schedule(
        images,
        buckets,
        assigned,
        seed=seed,
        num_steps=num_steps,
        batch_size=batch_size,
        repeats=_repeats(dataset, images, repeat_threshold),
        evenly=bool((dataset.weights != 1).any()),
    )
    maker = BatchMaker(
        dataset=dataclasses.replace(dataset, table=None),
        schedule=schedule.part(rows=rows),
        resize=resize,
        bgr=_IS_BGR[channel_order] and dataset.pixels.channels == 3,
        images=images,
        seed=seed,
        flip_prob=flip_prob,
        slots=_slots(dataset.objects_per_image[images], max_instances, augment),
        augment=augment,
        keypoints=keypoints,
        pixel_maps=pixel_maps,
        join_steps=join_steps,
    )
    return Batches(maker, start_step, reading)


def _slice_of_batch(batch_size: int, shard: tuple[int, int]) -> slice:
    """Returns the rows of the i-th of n equal slices of a batch."""
    index, count = shard
    if batch_size % count or not 0 <= index < count:
        raise InputError(
            f"train.batch_size {batch_size} cannot be split into {count} equal slices "
            f"(slice {index}); make it a multiple of the number of processes."
        )
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def epoch_images(
    dataset: CocoDataset, *, keep_empty: bool, max_images: int, repeat_threshold: float
) -> float:
    """Returns how many images an epoch of `train_batches` has, repeats included."""
    images = chosen_images(dataset, keep_empty, max_images)
    factors = _factors(dataset, images, repeat_threshold)
    return float(len(images) if factors is None else factors.sum())


def _factors(dataset: CocoDataset, images: np.ndarray, threshold: float) -> np.ndarray | None:
    """Returns how often each of `images` is shown in an epoch, float [n]; None: once."""
    weights = dataset.weights[images]
    if threshold and len(images):
        factors = sampler.repeat_factors(dataset.labels, dataset.start, images, threshold)
        return factors * weights
    return weights if (weights != 1).any() else None


def chosen_images(dataset: CocoDataset, keep_empty: bool, max_images: int) -> np.ndarray:
    """Returns the indices of the images that the keys leave, increasing."""
    images = np.arange(len(dataset)) if keep_empty else np.flatnonzero(dataset.objects_per_image)
    return images[images < max_images] if max_images else images


def _training_images(dataset: CocoDataset, keep_empty: bool, max_images: int) -> np.ndarray:
    """Returns the indices of the images to train on, increasing."""
    num_objects = dataset.objects_per_image
    images = chosen_images(dataset, keep_empty, max_images)
    if not len(images):
        raise InputError(
            f"{dataset.annotation_file}: no image has an object to train on, and "
            "data.keep_empty is False; annotate some or set it to True."
        )
    if num_empty := int((num_objects == 0).sum()):
        log.info(
            "%d of %d images (%.1f %%) have no object; they are %s (data.keep_empty)",
            num_empty,
            len(dataset),
            100 * num_empty / len(dataset),
            "trained on as negatives" if keep_empty else "left out",
        )
    return images


def _slots(num_objects: np.ndarray, max_instances: int, augment: Augment) -> int:
    """Returns the padded objects of an image, and logs what that leaves out."""
    most = int(num_objects.max()) * (1 + augment.joins)
    slots = max_instances or max(8, -(-most // 8) * 8)
    if (crowded := num_objects > slots).any():
        log.warning(
            "%d images have more than data.max_instances = %d objects; their %d "
            "smallest are left out. Raise data.max_instances to train on all.",
            crowded.sum(),
            slots,
            (num_objects[crowded] - slots).sum(),
        )
    return slots


def _repeats(dataset: CocoDataset, images: np.ndarray, threshold: float) -> np.ndarray | None:
    """Returns how often each image is shown in an epoch; None: once."""
    factors = _factors(dataset, images, threshold)
    if factors is None:
        return None
    weighted = " and weights of the images" if (dataset.weights[images] != 1).any() else ""
    log.info(
        "data.repeat_threshold %g%s: %d of %d images are shown more than once an epoch, "
        "at most %.1f times; an epoch has %.0f images",
        threshold,
        weighted,
        (factors > 1).sum(),
        len(images),
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
    reading: Reading = Reading(),
) -> Batches:
    """Returns every image once: image, image_size, image_id, original_size [B, 2].

    Images are in the json's order but for the grouping into buckets; rows that fill up
    a batch have image_id -1.

    Args:
      max_images: only the first ones; 0 for all.
      shard: (i, n) gives the i-th of n parts of the batches. Those of one padded shape
        are dealt one after the other, so that a part has few shapes.
    """
    resize = dataclasses.replace(resize, shorts=resize.shorts[:1])
    images = np.arange(len(dataset))[: max_images or None]
    sizes = resize.sizes(dataset.heights, dataset.widths)
    buckets, assigned = choose_buckets(dataset, sizes, images, resize, "test")
    schedule = sampler.eval_schedule(assigned[images, 0], buckets, batch_size)
    index, count = shard
    order = np.argsort(schedule.bucket, kind="stable") if count > 1 else np.arange(len(schedule))
    begin, end = (-(-i * len(order) // count) for i in (index, index + 1))
    part = schedule.part(steps=order[begin:end])
    dataset = dataclasses.replace(dataset, table=None)  # workers do not need it
    bgr = _IS_BGR[channel_order] and dataset.pixels.channels == 3
    maker = EvalBatchMaker(dataset, part, resize, bgr)
    return Batches(maker, 0, reading)
