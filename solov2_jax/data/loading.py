"""Making one padded batch of a plan: read, resize, flip, rasterise, place."""

import dataclasses

import numpy as np

from solov2_jax.data import masks, transforms
from solov2_jax.data import plan as planning
from solov2_jax.data.annotations import MIN_BOX_SIDE
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_sized

ArrayDict = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes batch t of a plan."""

    dataset: CocoDataset
    plan: planning.BatchPlan
    sizes: np.ndarray  # int32 [N, S, 2], (height, width) after the resize
    bgr: bool

    def read(self, index: int, size: tuple[int, int], flip: bool) -> np.ndarray:
        """Returns an image, resized and maybe flipped, uint8 [h, w, 3]."""
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        image = read_sized(data.path(index), *old, data.annotation_file)
        image = transforms.resize_image(image, *size)
        image = image[:, ::-1] if flip else image
        return image[..., ::-1] if self.bgr else image


@dataclasses.dataclass(frozen=True)
class TrainLoader(Loader):
    """Makes training batches."""

    seed: int
    flip_prob: float
    slots: int

    def __call__(self, step: int) -> ArrayDict:
        """Returns `Batch`'s fields for one step."""
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
            scale = int(
                planning.scale_index(self.seed, epoch, index, self.sizes.shape[1])
            )
            size = int(self.sizes[index, scale, 0]), int(self.sizes[index, scale, 1])
            flip = planning.is_flipped(self.seed, epoch, index, self.flip_prob)
            batch["image"][row, : size[0], : size[1]] = self.read(index, size, flip)
            batch["image_size"][row] = size
            batch["image_id"][row] = self.dataset.image_ids[index]
            self.fill_objects({k: v[row] for k, v in batch.items()}, index, size, flip)
        return batch

    def fill_objects(
        self, row: ArrayDict, index: int, size: tuple[int, int], flip: bool
    ) -> None:
        """Writes the objects of an image, in the json's order, into a batch's row.

        Source: detectron2 data/detection_utils.py, filter_empty_instances: an object
        without a box or without a pixel after the resize is left out.
        """
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        objects = np.arange(data.start[index], data.start[index + 1])
        boxes = transforms.transform_boxes(data.boxes[objects], old, size, flip)
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = np.flatnonzero((sides > MIN_BOX_SIDE).all(axis=1))
        if len(keep) > self.slots:
            largest = np.argsort(-sides[keep].prod(axis=1), kind="stable")
            keep = keep[np.sort(largest[: self.slots])]
        slot = 0
        for i in keep:
            crop = self._rasterize(int(objects[i]), old, size, flip)
            if crop is None:
                continue
            small = masks.quarter(crop, size)
            h, w = small.pixels.shape
            row["masks"][
                slot, small.top : small.top + h, small.left : small.left + w
            ] = small.pixels
            row["centers"][slot] = masks.mass_center(crop)
            row["boxes"][slot] = boxes[i]
            row["labels"][slot] = data.labels[objects[i]]
            row["valid"][slot] = True
            slot += 1

    def _rasterize(
        self, index: int, old: tuple[int, int], size: tuple[int, int], flip: bool
    ) -> masks.Crop | None:
        data = self.dataset
        try:
            return masks.rasterize(data.segmentations, index, old, size, flip)
        except ValueError as error:
            raise ValueError(
                f"{data.annotation_file}: annotation {data.annotation_ids[index]}: "
                f"`segmentation`: {error}; encode the mask again."
            ) from None


@dataclasses.dataclass(frozen=True)
class EvalLoader(Loader):
    """Makes evaluation batches."""

    def __call__(self, step: int) -> ArrayDict:
        """Returns image, image_size, image_id and original_size for one step."""
        h, w = self.plan.buckets[self.plan.bucket[step]]
        b = self.plan.image.shape[1]
        batch = {
            "image": np.zeros((b, h, w, 3), np.uint8),
            "image_size": np.tile(np.array([h, w], np.int32), (b, 1)),
            "image_id": np.full(b, -1, np.int32),
            "original_size": np.tile(np.array([h, w], np.int32), (b, 1)),
        }
        for row, index in enumerate(self.plan.image[step].tolist()):
            if index < 0:
                continue
            size = int(self.sizes[index, 0, 0]), int(self.sizes[index, 0, 1])
            batch["image"][row, : size[0], : size[1]] = self.read(index, size, False)
            batch["image_size"][row] = size
            batch["image_id"][row] = self.dataset.image_ids[index]
            batch["original_size"][row] = (
                self.dataset.heights[index],
                self.dataset.widths[index],
            )
        return batch
