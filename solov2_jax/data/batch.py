"""The dataset mapper: one padded batch of a schedule, read, moved, rasterised, placed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data import augment as changes
from solov2_jax.data import join, rasterize, sampler, transforms
from solov2_jax.data.augment import Augment, Outlines, Sample
from solov2_jax.data.buckets import Bucket, Resize
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.custom_augment import apply_custom
from solov2_jax.data.degrade import degrade
from solov2_jax.data.images import open_sized
from solov2_jax.data.outlines import MIN_BOX_SIDE
from solov2_jax.data.pixel_format import Planes
from solov2_jax.data.rasterize import stride4_masks
from solov2_jax.data.shared_memory import New, in_memory
from solov2_jax.data.transforms import Affine, AffineImage, Keypoints
from solov2_jax.rle import Size

ArrayDict = dict[str, np.ndarray]

_UNUSED = np.random.default_rng(0)  # until a sample meets custom augmentations


# Makes a further uint8 [h, w] of an image, moved as the image is; pickled into workers.
PixelMap = Callable[[CocoDataset, int, Affine], np.ndarray]


@dataclasses.dataclass(frozen=True)
class EvalBatchMaker:
    """Makes batch t of an evaluation's schedule."""

    dataset: CocoDataset
    schedule: sampler.BatchSchedule
    resize: Resize  # with one size
    bgr: bool

    def batch_bytes(self, height: int, width: int) -> int:
        """Returns what `new` is asked for, for a batch of this padded shape."""
        return self.schedule.image.shape[1] * height * width * self.pixel_bytes

    @property
    def pixel_bytes(self) -> int:
        """Of a pixel of the batch's images."""
        pixels = self.dataset.pixels
        return pixels.channels * np.dtype(pixels.dtype).itemsize

    def new_images(self, height: int, width: int, new: New) -> np.ndarray:
        """Returns room for a batch's images, [B, H, W, C] of the data set's type."""
        shape = self.schedule.image.shape[1], height, width, self.pixel_bytes
        return new(shape).view(self.dataset.pixels.dtype)

    def read(self, index: int) -> Image.Image | Planes:
        """Returns an image as it is on disk, upright, RGB or as the data set declares."""
        data = self.dataset
        height, width = int(data.heights[index]), int(data.widths[index])
        file = data.annotation_file
        return open_sized(data.path(index), height, width, file, pixels=data.pixels)

    def write_pixels(self, view: AffineImage, out: np.ndarray) -> None:
        """Writes an image into [H, W, C], with zeros beyond it."""
        view.write(out, self.bgr)

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        """Returns image, image_size, image_id and original_size for one step."""
        h, w = self.schedule.buckets[self.schedule.bucket[step]]
        b = self.schedule.image.shape[1]
        batch = {
            "image": self.new_images(h, w, new),
            "image_size": np.tile(np.array([h, w], np.int32), (b, 1)),
            "image_id": np.full(b, -1, np.int32),
            "original_size": np.tile(np.array([h, w], np.int32), (b, 1)),
        }
        for row, index in enumerate(self.schedule.image[step].tolist()):
            if index < 0:
                batch["image"][row] = 0
                continue
            view = transforms.affine_image(self.read(index))
            affine = view.affine.resized(self.resize.size(view.size))
            self.write_pixels(AffineImage(view.picture, affine), batch["image"][row])
            batch["image_size"][row] = affine.size
            batch["image_id"][row] = self.dataset.image_ids[index]
            batch["original_size"][row] = affine.original
        return batch


@dataclasses.dataclass(frozen=True)
class BatchMaker(EvalBatchMaker):
    """Makes batch t of a training's schedule; its random part is a function of (seed,
    epoch, index).

    Resize, flip, crop, rotation and jitter compose into one affine map, by which picture,
    outlines and key points move. Without augmentation, boxes are the annotated ones, with
    any they are those of the masks, as in the reference where it crops. An image whose
    shape has changed is shrunk until the padded shape of the unchanged image holds it:
    the reference pads a batch to whatever comes.
    """

    images: np.ndarray  # indices of the images that are trained on, increasing
    seed: int
    flip_prob: float
    slots: int  # padded objects per image
    augment: Augment = Augment()
    keypoints: Keypoints | None = None
    pixel_maps: Mapping[str, PixelMap] = dataclasses.field(default_factory=dict)
    join_steps: int = 2**62  # the steps before this one may join images

    @property
    def boxes_only(self) -> bool:
        """Whether some object of the data set has a box and no mask."""
        return not self.dataset.has_mask.all()

    def batch_bytes(self, height: int, width: int) -> int:
        """Returns what `new` is asked for, for a batch of this padded shape."""
        masks = self.schedule.image.shape[1] * self.slots * (height // 4) * (width // 4)
        return super().batch_bytes(height, width) + masks

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        """Returns `Batch`'s fields for one step, for `expand_masks` to finish.

        With key points also `keypoints`, float32 [B, G, J, 3]: x, y in input pixels and
        the flag, zeros on padding; each of `pixel_maps` is uint8 [B, h, w], 0 on padding.
        Where some object has a box only, also `has_mask`, bool [B, G].
        `left_out` is how many objects had no slot, int [].

        Args:
          new: makes the large arrays.
        """
        h, w = self.schedule.buckets[self.schedule.bucket[step]]
        b, g = self.schedule.image.shape[1], self.slots
        batch = {
            "image": self.new_images(h, w, new),
            "image_size": np.zeros((b, 2), np.int32),
            "boxes": np.zeros((b, g, 4), np.float32),
            "labels": np.zeros((b, g), np.int32),
            "centers": np.zeros((b, g, 2), np.float32),
            "masks": new((b * g, h // 4, w // 4)),
            "valid": np.zeros((b, g), bool),
            "image_id": np.zeros(b, np.int32),
        }
        if self.boxes_only:
            batch["has_mask"] = np.zeros((b, g), bool)
        if self.keypoints is not None:
            batch["keypoints"] = np.zeros((b, g, len(self.keypoints), 3), np.float32)
        batch |= {name: np.zeros((b, h, w), np.uint8) for name in self.pixel_maps}
        num_masks = left_out = 0
        for row in range(b):
            index, epoch = int(self.schedule.image[step, row]), int(self.schedule.epoch[step, row])
            batch["image_id"][row] = self.dataset.image_ids[index]
            of_row = {k: v[row] for k, v in batch.items() if k != "masks"}
            of_row["masks"] = batch["masks"][num_masks:]
            num_valid, without_slot = self.fill_row(of_row, index, epoch, step < self.join_steps)
            num_masks, left_out = num_masks + num_valid, left_out + without_slot
        return batch | {"masks": batch["masks"][:num_masks], "left_out": np.array(left_out)}

    def fill_row(
        self, row: ArrayDict, index: int, epoch: int, may_join: bool = True
    ) -> tuple[int, int]:
        """Writes an image with its objects into a batch's row; returns how many objects
        it has there, and how many found no slot.

        Args:
          may_join: whether other images may be joined to it at this step.
        """
        room = row["image"].shape[0], row["image"].shape[1]
        rng = sampler.random_generator(self.seed, sampler.LOOK, epoch, index)
        view = self.view(
            index,
            rng,
            scale=int(sampler.scale_index(self.seed, epoch, index, len(self.resize.shorts))),
            flip=sampler.is_flipped(self.seed, epoch, index, self.flip_prob),
            room=room,
        )
        sample = self.sample(view, index)
        for name, pixel_map in self.pixel_maps.items():
            row[name][: view.size[0], : view.size[1]] = pixel_map(self.dataset, index, view.affine)
        if self.augment.adds_objects or self.augment.degrades:
            sample = self.augmented(sample, index, epoch, room=room, may_join=may_join)
        if sample.view:
            self.write_pixels(sample.view, row["image"])
        else:
            h, w = sample.size
            row["image"][:] = 0
            row["image"][:h, :w] = sample.image[..., ::-1] if self.bgr else sample.image
        row["image_size"][:] = sample.size
        return self.write_objects(row, sample)

    def view(
        self, index: int, rng: np.random.Generator, *, scale: int, flip: bool, room: Size | None
    ) -> AffineImage:
        """Returns an image as it is augmented, its last resize and flip only in the map.

        Args:
          scale: which size of `resize.shorts`.
          room: (height, width) that the image is shrunk to fit into, if need be.
        """
        augment = self.augment
        view, size, flip = self.look(index, rng, scale=scale, flip=flip)
        size = changes.fitted(size, room) if room else size
        if augment.scale and not augment.jitter_scale:
            # By the size without the shrinking: the map's last resize is this one.
            view = changes.random_scale(view, augment.scale, size, rng)
            size = view.size
        affine = view.affine.resized(size)
        return AffineImage(view.picture, affine.flipped() if flip else affine)

    def look(
        self, index: int, rng: np.random.Generator, *, scale: int, flip: bool
    ) -> tuple[AffineImage, Size, bool]:
        """Returns an image as it is augmented, the (height, width) that it is to have, and
        whether it is to be mirrored; args as of `view`."""
        augment, data = self.augment, self.dataset
        view = transforms.affine_image(self.read(index))
        if augment.active:
            view = changes.color_jitter(view, augment, rng)
            if augment.turn_prob or augment.vflip_prob:
                quarters, mirror = changes.random_turn(augment, rng)
                view, flip = transforms.turn(view, quarters), flip != mirror
            view = changes.random_rotate(view, augment, rng)
            boxes = view.affine.boxes(data.boxes[data.start[index] : data.start[index + 1]])
            view = changes.random_crop_with_instance(view, boxes, augment, rng)
        if augment.jitter_scale:
            view = changes.large_scale_jitter(view, augment, rng)
        size = view.size if augment.jitter_scale else self.resize.size(view.size, scale)
        return view, size, flip

    def sample(self, view: AffineImage, index: int) -> Sample:
        """Returns an image with its objects, in the json's order, moved as the image is."""
        data, affine = self.dataset, view.affine
        objects = np.arange(data.start[index], data.start[index + 1])
        outlines = rasterize.draw_spans(data.segmentations, objects.tolist(), affine)
        if self.augment.active:
            boxes = rasterize.bounding_boxes(outlines, len(objects))
        else:
            boxes = affine.boxes(data.boxes[objects])
        return Sample(
            image=view,
            masks=Outlines(outlines, len(objects), view.size),
            boxes=boxes,
            labels=data.labels[objects],
            keypoints=None if self.keypoints is None else self.keypoints.moved(objects, affine),
            rng=_UNUSED,
            has_mask=data.has_mask[objects] if self.boxes_only else None,
        )

    def augmented(
        self, sample: Sample, index: int, epoch: int, *, room: Size, may_join: bool
    ) -> Sample:
        """Returns the sample with other images joined to it, if it is its turn, made worse,
        and as the custom augmentations leave it."""
        augment, data = self.augment, self.dataset
        if may_join and augment.joins:
            sample = self.joined(sample, index, epoch, room)
        if augment.degrades:
            rng = sampler.random_generator(self.seed, sampler.DEGRADE, epoch, index)
            sample = degrade(sample, augment, rng)
        sample.rng = sampler.random_generator(self.seed, sampler.CUSTOM, epoch, index)
        sample.user = augment.user
        return apply_custom(
            sample,
            augment.custom,
            room=room,
            num_classes=len(data.class_names),
            where=str(data.file_names[index]),
            pixels=data.pixels,
        )

    def joined(self, sample: Sample, index: int, epoch: int, room: Size) -> Sample:
        """Returns the sample as mosaic, copy and paste, and mixup leave it."""
        augment, canvas = self.augment, sample.size
        rng = sampler.random_generator(self.seed, sampler.MOSAIC, epoch, index)
        if rng.random() < augment.mosaic_prob:
            canvas = augment.jitter_size if augment.jitter_scale else room
            sample = self.mosaic(index, epoch, (canvas[0], canvas[1]), rng)
            canvas = sample.size
        rng = sampler.random_generator(self.seed, sampler.PASTE, epoch, index)
        if rng.random() < augment.paste_prob:
            guest = self.guest(rng, sampler.GUEST, epoch, index)
            h, w = augment.jitter_size if augment.jitter_scale else canvas
            sample = join.copy_paste(sample, guest, (h, w), rng)
        rng = sampler.random_generator(self.seed, sampler.MIXUP, epoch, index)
        if rng.random() < augment.mixup_prob:
            sample = join.mixup(sample, self.guest(rng, sampler.MIXED, epoch, index, room), rng)
        return sample

    def guest(
        self,
        rng: np.random.Generator,
        purpose: int,
        epoch: int,
        index: int,
        room: Size | None = None,
    ) -> Sample:
        """Returns another training image, drawn from `rng`, as it looks for this host.

        Args:
          purpose: the stream of its look.
          index: of the host.
        """
        guest = int(self.images[rng.integers(len(self.images))])
        look = sampler.random_generator(self.seed, purpose, epoch, index, guest)
        view = self.view(
            guest,
            look,
            scale=int(look.integers(len(self.resize.shorts))),
            flip=bool(look.random() < self.flip_prob),
            room=room,
        )
        return self.sample(view, guest)

    def mosaic(self, index: int, epoch: int, canvas: Size, rng: np.random.Generator) -> Sample:
        """Returns the image and up to three others, each a part of a canvas (height, width),
        its outlines drawn once, at the size that it has there."""
        samples, corners = [], []
        for place, part in enumerate(join.quadrants(canvas, rng)):
            drawn = index if not place else int(self.images[rng.integers(len(self.images))])
            look = sampler.random_generator(self.seed, sampler.TILE, epoch, index, place)
            scale = int(look.integers(len(self.resize.shorts)))
            flip = bool(look.random() < self.flip_prob)
            view, planned, flip = self.look(drawn, look, scale=scale, flip=flip)
            size = part[2] - part[0], part[3] - part[1]
            window = join.random_window(view.size, planned, size, look)
            view = transforms.resize(view, size, window)
            affine = view.affine.flipped() if flip else view.affine
            samples.append(self.sample(AffineImage(view.picture, affine), drawn))
            corners.append(part[:2])
        return join.mosaic(samples, corners, canvas)

    def write_objects(self, row: ArrayDict, sample: Sample) -> tuple[int, int]:
        """Writes the objects that have an extent, a pixel and a slot, the largest boxes
        first to get one, in order; returns their number and that of those without a slot.

        Source: detectron2 data/detection_utils.py, filter_empty_instances.
        """
        outlines, boxes, labels = sample.outlines(), sample.boxes, sample.labels
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = np.flatnonzero((sides > MIN_BOX_SIDE).all(axis=1))
        without_slot = max(len(keep) - self.slots, 0)
        if without_slot:
            largest = np.argsort(-sides[keep].prod(axis=1), kind="stable")
            keep = keep[np.sort(largest[: self.slots])]
        if len(keep) < len(labels):
            outlines = rasterize.select_spans(outlines, keep, len(labels))
        centers, present = rasterize.mass_centers(outlines, len(keep))
        num_valid, keep = int(present.sum()), keep[present]
        row["masks"][:num_valid] = 0
        slot = np.cumsum(present) - 1
        for i, small in stride4_masks(outlines, sample.size):
            h, w = small.pixels.shape
            row["masks"][slot[i], small.top : small.top + h, small.left : small.left + w] = (
                small.pixels
            )
        row["centers"][:num_valid] = centers[present]
        row["boxes"][:num_valid] = boxes[keep]
        row["labels"][:num_valid] = labels[keep]
        row["valid"][:num_valid] = True
        if sample.has_mask is not None:
            row["has_mask"][:num_valid] = sample.has_mask[keep]
        if sample.keypoints is not None:
            row["keypoints"][:num_valid] = sample.keypoints[keep]
        return num_valid, without_slot


def expand_masks(batch: ArrayDict, *, packed: bool = False) -> ArrayDict:
    """Returns a training batch whose `masks` are [b, g, h, w], zero where `valid` is
    False; one of evaluation as it is.

    Args:
      batch: `masks` are those of the valid objects only, [n, h, w], which are few: all
        others would be made, sent and copied as zeros.
      packed: `mask_bits` [b, g, h, w / 8], 8 pixels a byte, instead of `masks`: of 16 images
        of 800 x 1333 with 96 slots 13 MB for the devices to receive instead of 103 MB.
        `training.loss.unpack_masks` undoes it there.
    """
    if "masks" not in batch:
        return batch
    masks, valid = batch["masks"], batch["valid"]
    name = "mask_bits" if packed else "masks"
    if packed:
        masks = np.packbits(masks, axis=-1)
    full = np.zeros((*valid.shape, *masks.shape[1:]), np.uint8)
    full[valid] = masks
    return {k: v for k, v in batch.items() if k not in ("left_out", "masks")} | {name: full}


def shapes_at(batch: Mapping[str, Any], bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that a batch's arrays have for another padded (height, width).

    Args:
      batch: as `expand_masks` returns it packed, or the same on devices.
    """
    height, width = bucket
    shapes = {name: x.shape for name, x in batch.items()}
    own = shapes["image"][1:3]
    for name, (b, *sides) in shapes.items():
        if name == "mask_bits":
            shapes[name] = (b, sides[0], height // 4, width // 32)
        elif tuple(sides[:2]) == own and (name == "image" or batch[name].dtype == np.uint8):
            shapes[name] = (b, height, width, *sides[2:])
    return shapes
