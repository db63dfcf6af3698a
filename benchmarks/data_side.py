"""The two programs of the input pipeline's benchmark: ours, and the plain form.

"plain" is what one writes first, and this project had before in much the same form:
Pillow's picture as an array, resized as an array, turned around by numpy; each object
drawn by pycocotools as a whole mask and scaled down as one; batches of zeros, handed
from the worker by grain and copied. Both give the same batches, bit for bit.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import worker
from absl import flags
from pycocotools import mask as coco_mask

from solov2_jax.data import rasterize, sampler, transforms
from solov2_jax.data.batch import ArrayDict, TrainBatchMaker, expand_masks
from solov2_jax.data.images import open_sized, reuse_memory
from solov2_jax.data.outlines import MIN_BOX_SIDE
from solov2_jax.data.pipeline import Batches
from solov2_jax.data.shared_memory import New, in_memory


@dataclasses.dataclass(frozen=True)
class TimedLoader(TrainBatchMaker):
    """Our loader with a clock around its stages."""

    stages: worker.Stages = dataclasses.field(default_factory=worker.Stages)

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        return expand_masks(super().__call__(step, new))

    def read(self, index: int, size: tuple[int, int], flip: bool, out: np.ndarray) -> None:
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        with self.stages("decode"):
            image = open_sized(data.path(index), *old, data.annotation_file)
        with self.stages("resize"):
            transforms.write_image(image, out[: size[0], : size[1]], flip, self.bgr)
            out[size[0] :] = 0
            out[: size[0], size[1] :] = 0

    def fill_objects(self, *args: Any) -> int:
        with self.stages("rasterise"):
            return super().fill_objects(*args)


@dataclasses.dataclass(frozen=True)
class PlainLoader(TrainBatchMaker):
    """The plain form, with the same clock."""

    stages: worker.Stages = dataclasses.field(default_factory=worker.Stages)

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        del new
        h, w = self.plan.buckets[self.plan.bucket[step]]
        b, g = self.plan.image.shape[1], self.slots
        batch = {
            "image": np.zeros((b, h, w, 3), np.uint8),
            "image_size": np.zeros((b, 2), np.int32),
            "boxes": np.zeros((b, g, 4), np.float32),
            "labels": np.zeros((b, g), np.int32),
            "centers": np.zeros((b, g, 2), np.float32),
            "masks": np.zeros((b, g, h // 4, w // 4), np.uint8),
            "valid": np.zeros((b, g), bool),
            "image_id": np.zeros(b, np.int32),
        }
        for row in range(b):
            index = int(self.plan.image[step, row])
            epoch = int(self.plan.epoch[step, row])
            scale = sampler.scale_index(self.seed, epoch, index, self.sizes.shape[1])
            size = tuple(self.sizes[index, int(scale)].tolist())
            flip = sampler.is_flipped(self.seed, epoch, index, self.flip_prob)
            self.read(index, size, flip, batch["image"][row])
            batch["image_size"][row] = size
            batch["image_id"][row] = self.dataset.image_ids[index]
            with self.stages("rasterise"):
                of_row = {key: value[row] for key, value in batch.items()}
                self.fill_objects(of_row, index, size, flip)
        return batch

    def read(self, index: int, size: tuple[int, int], flip: bool, out: np.ndarray) -> None:
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        with self.stages("decode"):
            image = np.array(open_sized(data.path(index), *old, data.annotation_file))
        with self.stages("resize"):
            image = transforms.resize_image(image, *size)
            image = image[:, ::-1] if flip else image
            image = image[..., ::-1] if self.bgr else image
            out[: size[0], : size[1]] = image

    def fill_objects(self, row: ArrayDict, index: int, size: tuple[int, int], flip: bool) -> int:
        data, slot = self.dataset, 0
        old = int(data.heights[index]), int(data.widths[index])
        objects = np.arange(data.start[index], data.start[index + 1])
        boxes = transforms.transform_boxes(data.boxes[objects], old, size, flip)
        for number, box in zip(objects.tolist(), boxes, strict=True):
            if not (box[2:] - box[:2] > MIN_BOX_SIDE).all() or slot == self.slots:
                continue
            mask = whole_mask(data.segmentations, number, old, size, flip)
            rows, columns = mask.sum(1, dtype=np.int64), mask.sum(0, dtype=np.int64)
            if not (area := rows.sum()):
                continue
            small = quarter(mask)
            row["masks"][slot, : small.shape[0], : small.shape[1]] = small
            sums = columns @ np.arange(len(columns)), rows @ np.arange(len(rows))
            row["centers"][slot] = np.array(sums, np.float32) / np.float32(area)
            row["boxes"][slot], row["labels"][slot] = box, data.labels[number]
            row["valid"][slot] = True
            slot += 1
        return slot


def whole_mask(
    segmentations: Any, index: int, old: tuple[int, int], size: Any, flip: bool
) -> np.ndarray:
    """Returns an object's mask in the resized image, uint8 [h, w]."""
    polygons = segmentations.polygons(index)
    if not polygons:  # few data sets have run lengths: as ours
        crop = rasterize.rasterize(segmentations, index, old, size, flip)
        mask = np.zeros(size, np.uint8)
        if crop is not None:
            h, w = crop.pixels.shape
            mask[crop.top :, crop.left :][:h, :w] = crop.pixels
        return mask
    height, width = size
    scaled = []
    for polygon in polygons:
        x = polygon[0::2] * (width / old[1])
        y = polygon[1::2] * (height / old[0])
        scaled.append(np.stack([width - x if flip else x, y], axis=-1).ravel())
    runs: Any = coco_mask.merge(coco_mask.frPyObjects(scaled, height, width))
    return coco_mask.decode(runs)


def quarter(mask: np.ndarray) -> np.ndarray:
    """Returns a whole mask at a quarter of its size, by OpenCV's fixed point."""
    (y0, y1, wy0, wy1), (x0, x1, wx0, wx1) = (_neighbours(s) for s in mask.shape)
    upper, lower = (
        (mask[y[:, None], x0] * wx0 + mask[y[:, None], x1] * wx1) >> 4 for y in (y0, y1)
    )
    rows = ((upper * wy0[:, None]) >> 16) + ((lower * wy1[:, None]) >> 16)
    return ((rows + 2) >> 2).astype(np.uint8)


def _neighbours(size: int) -> tuple[np.ndarray, ...]:
    new = int(size * 0.25 + 0.5)
    position = ((np.arange(new) + 0.5) * (size / max(new, 1)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    part = position - low.astype(np.float32)
    weights = [np.rint(p * np.float32(2048)).astype(np.int32) for p in (1 - part, part)]
    return low, low + 1, *weights


class PlainBatches:
    """Batches of a loader from one worker process, as grain sends arrays, copied."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __iter__(self) -> Iterator[ArrayDict]:
        loader, reading = self.batches._loader, self.batches._reading
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = (
            grain.MapDataset.range(len(self.batches))
            .map(loader)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=reading.num_threads,
                    prefetch_buffer_size=max(reading.prefetch, reading.num_threads),
                )
            )
            .mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=reading.num_workers,
                    per_worker_buffer_size=reading.prefetch,
                )
            )
        )
        iterator = iter(stream)
        try:
            for batch in iterator:
                yield {key: np.array(value) for key, value in batch.items()}
        finally:
            iterator.close()


def with_loader(batches: Batches, program: str, timed: bool) -> Any:
    """Returns the batches as a program makes them.

    Args:
      timed: its loader alone, `loader(step)`, with `stages`, for use without workers.
    """
    ours = batches._loader
    assert isinstance(ours, TrainBatchMaker)
    values = {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)}
    if program == "ours":
        if not timed:
            return batches
        reuse_memory()
        return TimedLoader(**values)
    plain = PlainLoader(**values)
    if timed:
        return plain
    batches._loader = plain
    return PlainBatches(batches)
