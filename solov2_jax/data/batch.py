"""Making one padded batch of a plan: read, resize, flip, rasterise, place.

Training batches of augmented images, which the plan's padded shapes still hold."""

import dataclasses

import numpy as np

from solov2_jax.data import augment as changes
from solov2_jax.data import rasterize, sampler, transforms
from solov2_jax.data.augment import Augment, Scene
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import open_sized
from solov2_jax.data.outlines import MIN_BOX_SIDE
from solov2_jax.data.rasterize import Size, stride4_masks
from solov2_jax.data.shared_memory import New, in_memory

ArrayDict = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Makes batch t of a plan."""

    dataset: CocoDataset
    plan: sampler.BatchSchedule
    sizes: np.ndarray  # int32 [N, S, 2], (height, width) after the resize
    bgr: bool

    def batch_bytes(self, height: int, width: int) -> int:
        """Returns what `new` is asked for, for a batch of this padded shape."""
        return self.plan.image.shape[1] * height * width * 3

    def read(self, index: int, size: tuple[int, int], flip: bool, out: np.ndarray) -> None:
        """Writes an image, resized and maybe flipped, into uint8 [H, W, 3]."""
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        image = open_sized(data.path(index), *old, data.annotation_file)
        transforms.write_image(image, out[: size[0], : size[1]], flip, self.bgr)
        out[size[0] :] = 0
        out[: size[0], size[1] :] = 0


@dataclasses.dataclass(frozen=True)
class TrainBatchMaker(BatchMaker):
    """Makes training batches."""

    seed: int
    flip_prob: float
    slots: int

    def batch_bytes(self, height: int, width: int) -> int:
        """Returns what `new` is asked for, for a batch of this padded shape."""
        masks = self.plan.image.shape[1] * self.slots * (height // 4) * (width // 4)
        return super().batch_bytes(height, width) + masks

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        """Returns `Batch`'s fields for one step, `masks` as `expand_masks` takes it.

        Args:
          new: makes the large arrays.
        """
        h, w = self.plan.buckets[self.plan.bucket[step]]
        b, g = self.plan.image.shape[1], self.slots
        batch = {
            "image": new((b, h, w, 3)),
            "image_size": np.zeros((b, 2), np.int32),
            "boxes": np.zeros((b, g, 4), np.float32),
            "labels": np.zeros((b, g), np.int32),
            "centers": np.zeros((b, g, 2), np.float32),
            "masks": new((b * g, h // 4, w // 4)),
            "valid": np.zeros((b, g), bool),
            "image_id": np.zeros(b, np.int32),
        }
        filled = 0
        for row in range(b):
            index = int(self.plan.image[step, row])
            epoch = int(self.plan.epoch[step, row])
            batch["image_id"][row] = self.dataset.image_ids[index]
            of_row = {k: v[row] for k, v in batch.items() if k != "masks"}
            of_row["masks"] = batch["masks"][filled:]
            filled += self.fill_row(of_row, index, epoch)
        return batch | {"masks": batch["masks"][:filled]}

    def fill_row(self, row: ArrayDict, index: int, epoch: int) -> int:
        """Writes an image with its objects into a batch's row, and returns how many
        objects there are."""
        scale = int(sampler.scale_index(self.seed, epoch, index, self.sizes.shape[1]))
        size = int(self.sizes[index, scale, 0]), int(self.sizes[index, scale, 1])
        flip = sampler.is_flipped(self.seed, epoch, index, self.flip_prob)
        self.read(index, size, flip, row["image"])
        row["image_size"][:] = size
        return self.fill_objects(row, index, size, flip)

    def fill_objects(self, row: ArrayDict, index: int, size: tuple[int, int], flip: bool) -> int:
        """Writes the objects of an image, in the json's order, into a batch's row, and
        returns how many there are.

        Source: detectron2 data/detection_utils.py, filter_empty_instances: an object
        without a box or without a pixel after the resize is left out.
        """
        data = self.dataset
        old = int(data.heights[index]), int(data.widths[index])
        objects = np.arange(data.start[index], data.start[index + 1])
        boxes = transforms.transform_boxes(data.boxes[objects], old, size, flip)
        keep = self.choose(boxes)
        outlines = self._draw(objects[keep], old, size, flip)
        labels = data.labels[objects[keep]]
        return self.write_objects(row, outlines, boxes[keep], labels, size)

    def choose(self, boxes: np.ndarray) -> np.ndarray:
        """Returns which objects have an extent and a slot, the largest boxes first to
        get one, in order."""
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = np.flatnonzero((sides > MIN_BOX_SIDE).all(axis=1))
        if len(keep) > self.slots:
            largest = np.argsort(-sides[keep].prod(axis=1), kind="stable")
            keep = keep[np.sort(largest[: self.slots])]
        return keep

    def write_objects(
        self,
        row: ArrayDict,
        outlines: rasterize.Spans,
        boxes: np.ndarray,
        labels: np.ndarray,
        size: tuple[int, int],
    ) -> int:
        """Writes the objects that have a pixel, and returns how many these are."""
        centers, present = rasterize.mass_centers(outlines, len(labels))
        number = int(present.sum())
        row["masks"][:number] = 0
        slot = np.cumsum(present) - 1
        for i, small in stride4_masks(outlines, size):
            h, w = small.pixels.shape
            row["masks"][slot[i], small.top : small.top + h, small.left : small.left + w] = (
                small.pixels
            )
        row["centers"][:number] = centers[present]
        row["boxes"][:number] = boxes[present]
        row["labels"][:number] = labels[present]
        row["valid"][:number] = True
        return number

    def _draw(
        self,
        objects: np.ndarray,
        old: tuple[int, int],
        size: tuple[int, int],
        flip: bool,
    ) -> rasterize.Spans:
        outlines = self.dataset.segmentations
        try:
            return rasterize.draw_spans(outlines, objects.tolist(), old, size, flip)
        except rasterize.InvalidRLE as error:
            raise self.damaged(objects, error) from None

    def damaged(self, objects: np.ndarray, error: rasterize.InvalidRLE) -> ValueError:
        """Returns the error that names the annotation."""
        data = self.dataset
        return ValueError(
            f"{data.annotation_file}: annotation "
            f"{data.annotation_ids[objects[error.position]]}: `segmentation`: {error}; "
            "encode the mask again."
        )


def expand_masks(batch: ArrayDict) -> ArrayDict:
    """Returns a batch whose `masks` are [b, g, h, w], zero where `valid` is False.

    Args:
      batch: `masks` are those of the valid objects only, [n, h, w], which are few: all
        others would be made, sent and copied as zeros.
    """
    if "masks" not in batch:
        return batch
    masks, valid = batch["masks"], batch["valid"]
    full = np.zeros((*valid.shape, *masks.shape[1:]), np.uint8)
    full[valid] = masks
    return batch | {"masks": full}


@dataclasses.dataclass(frozen=True)
class EvalBatchMaker(BatchMaker):
    """Makes evaluation batches."""

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        """Returns image, image_size, image_id and original_size for one step."""
        h, w = self.plan.buckets[self.plan.bucket[step]]
        b = self.plan.image.shape[1]
        batch = {
            "image": new((b, h, w, 3)),
            "image_size": np.tile(np.array([h, w], np.int32), (b, 1)),
            "image_id": np.full(b, -1, np.int32),
            "original_size": np.tile(np.array([h, w], np.int32), (b, 1)),
        }
        for row, index in enumerate(self.plan.image[step].tolist()):
            if index < 0:
                batch["image"][row] = 0
                continue
            size = int(self.sizes[index, 0, 0]), int(self.sizes[index, 0, 1])
            self.read(index, size, False, batch["image"][row])
            batch["image_size"][row] = size
            batch["image_id"][row] = self.dataset.image_ids[index]
            batch["original_size"][row] = (
                self.dataset.heights[index],
                self.dataset.widths[index],
            )
        return batch


_OWN, _GUEST = range(2)  # what an image is drawn for


@dataclasses.dataclass(frozen=True)
class AugmentedBatchMaker(TrainBatchMaker):
    """Makes training batches, all that is random in them from (seed, epoch, index).

    Boxes are those of the masks, as in the reference where it crops. An image whose
    shape has changed is shrunk until the padded shape of the unchanged image holds it:
    the reference pads a batch to whatever comes.
    """

    augment: Augment
    resize: Resize

    def fill_row(self, row: ArrayDict, index: int, epoch: int) -> int:
        """Writes an image with its objects into a batch's row, and returns how many
        objects there are."""
        h, w = row["image"].shape[:2]
        scene = self.scene(index, epoch, (h, w), _OWN)
        rng = self.random(index, epoch, _GUEST)
        guest = int(rng.integers(len(self.dataset)))
        if rng.random() < self.augment.paste_prob:
            size = scene.view.size
            other = self.scene(guest, epoch, size, _GUEST)
            scene = changes.copy_paste(scene, other, rng)
        size = scene.view.size
        out = row["image"]
        transforms.write_image(scene.view.picture, out[: size[0], : size[1]], False, self.bgr)
        out[size[0] :] = 0
        out[: size[0], size[1] :] = 0
        row["image_size"][:] = size
        boxes = rasterize.bounding_boxes(scene.outlines, len(scene.labels))
        keep = self.choose(boxes)
        outlines = rasterize.select_spans(scene.outlines, keep, len(scene.labels))
        return self.write_objects(row, outlines, boxes[keep], scene.labels[keep], size)

    def random(self, index: int, epoch: int, purpose: int) -> np.random.Generator:
        """Returns the generator of an image in an epoch."""
        bits = sampler.random_bits(self.seed, sampler.AUGMENT, epoch, index, purpose)
        return np.random.Generator(np.random.PCG64(int(bits)))

    def scene(self, index: int, epoch: int, room: Size, purpose: int) -> Scene:
        """Returns an augmented image.

        Args:
          room: its size at most.
        """
        data, augment = self.dataset, self.augment
        rng = self.random(index, epoch, purpose)
        old = int(data.heights[index]), int(data.widths[index])
        picture = open_sized(data.path(index), *old, data.annotation_file)
        objects = np.arange(data.start[index], data.start[index + 1])
        view = changes.color_jitter(transforms.affine_image(picture), augment, rng)
        view = changes.random_rotate(view, augment, rng)
        boxes = view.boxes(data.boxes[objects])
        view = changes.random_crop_with_instance(view, boxes, augment, rng)
        if augment.jitter_scale:
            view = changes.large_scale_jitter(view, augment, rng)
            size = changes.fitted(view.size, room)
        else:
            shorts = self.resize.shorts
            scale = sampler.scale_index(self.seed, epoch, index, len(shorts))
            size = transforms.shortest_edge_sizes(
                *view.size, shorts[int(scale)], self.resize.max_size
            )
            size = changes.fitted((int(size[0]), int(size[1])), room)
        if size != view.size:
            view = transforms.resize(view, size)
        if sampler.is_flipped(self.seed, epoch, index, self.flip_prob):
            view = transforms.hflip(view)
        try:
            outlines = transforms.draw_view(data.segmentations, objects.tolist(), old, view)
        except rasterize.InvalidRLE as error:
            raise self.damaged(objects, error) from None
        return Scene(view, outlines, data.labels[objects])
