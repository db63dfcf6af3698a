"""Soft masks on the devices -> bool masks on the host, at the images' original sizes.

Masks are enlarged on a canvas whose size is rounded up, so that thousands of differently
sized photographs need a handful of compilations, and come to the host as bits. Images of one
batch that lie on several devices are pasted on them at the same time, by one program.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from solov2_jax.data.buckets import round_up
from solov2_jax.inference.prediction import MaskCrops, PackedMask, Prediction, pack
from solov2_jax.paste import paste_masks
from solov2_jax.stored import StoredFunction
from solov2_jax.structs import Detections

# Sides of canvases are multiples of it. Up to the limit they are square, so that two serve
# a folder of photographs: the masks of one with 640 x 480 pixels are pasted as fast on
# 768 x 768 as on 640 x 512, and each canvas is a program.
CANVAS_DIVISOR, MAX_SQUARE_CANVAS = 256, 1024
# Pixels of the masks of a round: 128 masks of 1024 x 1024, or 16 MiB of bits.
ROUND_PIXELS = 128 * 1024 * 1024
# Masks of one image that take more are held packed, as `MaskCrops`.
PACK_BYTES = 256 << 20

Pasted = tuple[np.ndarray, np.ndarray]  # masks bool [n, H, W] and boxes [n, 4]


class BatchPaste:
    """The masks of a batch, of which the devices have begun with a round of each image's.

    Making one waits for nothing, not for the detections either.

    Args:
      detections: of B images, whose rows are split over the mesh's devices.
      image_size, original_size: (height, width) at the network and of the files, [B, 2].
      wanted: bool [B]; others have no masks.
      threshold: of the soft masks, after they are resized.
      mesh: None: one device has all rows.
    """

    def __init__(
        self,
        detections: Detections,
        image_size: np.ndarray,
        original_size: np.ndarray,
        *,
        wanted: np.ndarray,
        threshold: float,
        mesh: Mesh | None = None,
    ):
        self._detections, self._threshold, self._mesh = detections, threshold, mesh
        devices = 1 if mesh is None else mesh.devices.size
        # [device, row of the device, ...]: row r of every device is pasted at once.
        self._image_size, self._original, self._wanted = (
            x.reshape(devices, -1, *x.shape[1:]) for x in (image_size, original_size, wanted)
        )
        self._slots = detections.scores.shape[1]
        rows = range(self._wanted.shape[1])
        self._first = {row: self._dispatch(row, 0) for row in rows if self._wanted[:, row].any()}

    @property
    def image_size(self) -> np.ndarray:
        """The images' (height, width) at the network, [B, 2]."""
        return self._image_size.reshape(-1, 2)

    def rounds(self, counts: np.ndarray) -> Iterator[tuple[int, Pasted]]:
        """Yields (image, masks and boxes of its next detections) until all were there.

        An image with no detections comes once, with no masks; each has one round but where
        its masks are many and large.

        Args:
          counts: how many valid detections each image has, int [B].
        """
        counts = counts.reshape(self._wanted.shape) * self._wanted
        while self._first:
            row = next(iter(self._first))
            pasted, size = self._first.pop(row), self._round_size(row)
            most = int(counts[:, row].max())
            for start in range(0, max(most, 1), size):
                bits, boxes = pasted
                if start + size < most:  # the devices go on meanwhile
                    pasted = self._dispatch(row, start + size)
                bits, boxes = np.asarray(bits), np.asarray(boxes)
                for device in np.flatnonzero(self._wanted[:, row]).tolist():
                    n = int(np.clip(counts[device, row] - start, 0, size))
                    if n or not start:
                        masks = unpack(bits[device, :n], self._original[device, row])
                        image = device * self._wanted.shape[1] + row
                        yield image, (masks, boxes[device, :n])

    def _canvas(self, row: int) -> tuple[int, int]:
        height, width = self._original[self._wanted[:, row], row].max(axis=0).tolist()
        return canvas_for(height, width)

    def _round_size(self, row: int) -> int:
        return round_size(self._canvas(row), self._slots)

    def _dispatch(self, row: int, start: int) -> tuple[jax.Array, jax.Array]:
        canvas, slots = self._canvas(row), self._round_size(row)
        pasted = _compile_paste(self._mesh, canvas, slots, self._threshold)(
            self._detections.soft_masks,
            self._detections.valid,
            np.int32(row),
            np.int32(start),
            np.int32(self._slots * self._wanted[:, row]),
            np.asarray(self._image_size[:, row], np.int32),
            np.asarray(self._original[:, row], np.int32),
        )
        for array in pasted:
            array.copy_to_host_async()
        return pasted


@dataclass(frozen=True)
class StartedBatch:
    """A batch that the devices compute."""

    detections: Detections
    masks: BatchPaste
    image_ids: np.ndarray  # [B]; -1: padding
    original_size: np.ndarray  # [B, 2]
    skeleton: tuple[tuple[int, int], ...] = ()  # see `Prediction`

    def _moved(self, points: np.ndarray, i: int) -> np.ndarray:
        """Returns key points of the network's input at the image's original size."""
        return scale_points(points, self.masks.image_size[i], self.original_size[i])

    @property
    def images(self) -> list[int]:
        """Rows that are no padding."""
        return np.flatnonzero(self.image_ids != -1).tolist()

    def predictions(self, class_names: tuple[str, ...]) -> list[Prediction]:
        """Returns the images' predictions; waits for them."""
        found = self.detections
        scores, labels, valid = jax.device_get((found.scores, found.labels, found.valid))
        points = None if found.keypoints is None else jax.device_get(found.keypoints)
        counts = valid.sum(axis=1)
        is_large = counts * self.original_size.prod(axis=1, dtype=np.int64) > PACK_BYTES
        boxes: dict[int, list[np.ndarray]] = {i: [] for i in self.images}
        masks: dict[int, list[Any]] = {i: [] for i in self.images}
        for i, (new, new_boxes) in self.masks.rounds(counts):
            nonempty = new_boxes[:, 2] > new_boxes[:, 0]
            boxes[i].append(new_boxes)
            if is_large[i]:
                masks[i] += pack_masks(new[nonempty], new_boxes[nonempty])
            else:
                masks[i].append(new if nonempty.all() else new[nonempty])

        def prediction(i: int) -> Prediction:
            size, of_all = tuple(self.original_size[i].tolist()), joined(boxes.pop(i))
            kept, own = np.flatnonzero(of_all[:, 2] > of_all[:, 0]), masks.pop(i)
            detections = np.flatnonzero(valid[i])[kept]
            return Prediction(
                MaskCrops(own, size) if is_large[i] else joined(own),
                of_all[kept],
                scores[i, detections],
                labels[i, detections],
                int(self.image_ids[i]),
                class_names,
                keypoints=None if points is None else self._moved(points[i, detections], i),
                skeleton=self.skeleton,
            )

        return [prediction(i) for i in self.images]


def paste_image(
    detections: Detections,
    index: int,
    image_size: Sequence[Any] | np.ndarray,
    original_size: Sequence[Any] | np.ndarray,
    threshold: float,
    image_id: int = 0,
    class_names: tuple[str, ...] = (),
    skeleton: tuple[tuple[int, int], ...] = (),
) -> Prediction:
    """Returns the detections of image `index` at its original size.

    Args:
      image_size, original_size: (height, width) at the network and of the file.
      threshold: of the soft masks, after they are resized.
      class_names: of all labels.
      skeleton: of the key points.
    """
    wanted = np.arange(detections.scores.shape[0]) == index
    image_sizes, original_sizes = (
        np.tile(np.asarray(size, np.int32), (len(wanted), 1))
        for size in (image_size, original_size)
    )
    masks = BatchPaste(detections, image_sizes, original_sizes, wanted=wanted, threshold=threshold)
    image_ids = np.where(wanted, image_id, -1)
    started = StartedBatch(detections, masks, image_ids, original_sizes, skeleton)
    (prediction,) = started.predictions(class_names)
    return prediction


def scale_points(points: np.ndarray, size: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Returns key points [n, J, 3] of an image of `size` (height, width) in the original one."""
    factor = np.append(np.asarray(original)[::-1] / np.asarray(size)[::-1], 1.0)
    return (points * factor).astype(np.float32)


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Returns the parts one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pack_masks(masks: np.ndarray, boxes: np.ndarray) -> list[PackedMask]:
    """Returns masks bool [n, H, W], none of them empty, as run lengths of their boxes."""
    packed = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int).tolist(), strict=True):
        crop = pack(mask[y0:y1, x0:x1], y0, x0)
        assert crop is not None, "its box has a pixel"
        packed.append(crop)
    return packed


@functools.lru_cache(maxsize=256)
def _compile_paste(mesh: Mesh | None, canvas: tuple[int, int], slots: int, threshold: float) -> Any:
    """Returns the compiled `_paste_row` of these sizes."""
    static = {"canvas": canvas, "slots": slots, "threshold": threshold}
    run = jax.jit(functools.partial(_paste_row, mesh=mesh, **static))
    if mesh is not None or jax.device_count() > 1:
        return run
    return StoredFunction(run, f"paste {static}")


def start_paste(
    shape: tuple[int, int, int],
    slots: int,
    original_size: np.ndarray,
    wanted: np.ndarray,
    threshold: float,
) -> None:
    """Has the programs of a `BatchPaste` on one device read or compiled by another thread.

    Args:
      shape: (B, height, width) of the padded images.
      slots: detections of an image.
      original_size, wanted: as there.
    """
    b, height, width = shape
    soft_masks = jax.ShapeDtypeStruct((b, slots, height // 4, width // 4), np.float32)
    valid = jax.ShapeDtypeStruct((b, slots), np.bool_)
    number, most, size = (jax.ShapeDtypeStruct(s, np.int32) for s in ((), (1,), (1, 2)))
    for height, width in original_size[wanted].tolist():
        canvas = canvas_for(height, width)
        paste = _compile_paste(None, canvas, round_size(canvas, slots), threshold)
        if isinstance(paste, StoredFunction):
            paste.start(soft_masks, valid, number, number, most, size, size)


def _paste_row(
    soft_masks,
    valid,
    row,
    start,
    most,
    image_size,
    original_size,
    *,
    mesh,
    canvas,
    slots,
    threshold,
):
    """Returns bits [n, slots, H, W8] and boxes [n, slots, 4] of row `row` of n devices.

    Args:
      start: the first of the valid detections; as many follow as there are, of `most` [n].
      image_size, original_size: [n, 2].
    """

    def on_device(soft_masks, valid, row, start, most, image_size, original_size):
        b, d, h4, w4 = soft_masks.shape
        (kept,) = jnp.nonzero(valid[row], size=d, fill_value=0)
        part = row * d + kept[jnp.minimum(start + jnp.arange(slots), d - 1)]
        count = jnp.minimum(jnp.sum(valid[row], dtype=jnp.int32), most[0]) - start
        bits, boxes = paste_masks(
            soft_masks.reshape(b * d, h4, w4),
            part,
            jnp.clip(count, 0, slots),
            image_size[0],
            original_size[0],
            canvas,
            threshold,
        )
        return bits[None], boxes[None]

    if mesh is not None:
        split, same = P("data"), P()
        specs = (split, split, same, same, split, split, split)
        on_device = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False
        )
    return on_device(soft_masks, valid, row, start, most, image_size, original_size)


@functools.partial(jax.jit, static_argnames=("canvas", "threshold"))
def _paste_part(
    soft_masks, index, part, count, image_size, original_size, origin, *, canvas, threshold
):
    """Returns bits and boxes of the first `count` of detections `part` of image `index`."""
    b, d, h4, w4 = soft_masks.shape
    flat = soft_masks.reshape(b * d, h4, w4)
    part = index * d + part
    return paste_masks(flat, part, count, image_size, original_size, canvas, threshold, origin)


def paste_detections(
    soft_masks: jax.Array,
    index: int,
    kept: np.ndarray,
    image_size: Sequence[Any] | np.ndarray,
    original_size: Sequence[Any] | np.ndarray,
    threshold: float,
    canvas: tuple[int, int] | None = None,
    origin: tuple[int, int] | None = None,
) -> Pasted:
    """Returns masks bool [n, H, W] and boxes [n, 4] of one image's detections.

    Args:
      soft_masks: [B, D, h4, w4], on one device.
      index: which image of the batch.
      kept: which of its detections, int [n].
      image_size, original_size: (height, width) at the network and of the file.
      canvas: holds the original size; each is a program. None: its next multiples.
      origin: (row, column) at which the canvas is a part of the original image; the
        masks and boxes are those of the part then.
    """
    height, width = (int(v) for v in original_size)
    if origin is not None and canvas is not None:
        height, width = (
            min(c, int(side) - o) for c, side, o in zip(canvas, original_size, origin, strict=True)
        )
    canvas = canvas or canvas_for(height, width)
    slots = round_size(canvas, soft_masks.shape[1])
    pasted = []
    for start in range(0, max(len(kept), 1), slots):
        part = np.asarray(kept[start : start + slots], np.int32)
        bits, boxes = _paste_part(
            soft_masks,
            np.int32(index),
            np.pad(part, (0, slots - len(part))),
            np.int32(len(part)),
            np.asarray(image_size, np.int32),
            np.asarray(original_size, np.int32),
            None if origin is None else np.asarray(origin, np.int32),
            canvas=canvas,
            threshold=threshold,
        )
        n = len(part)
        pasted.append((unpack(np.asarray(bits)[:n], (height, width)), np.asarray(boxes)[:n]))
    if len(pasted) == 1:
        return pasted[0]
    masks, boxes = zip(*pasted, strict=True)
    return np.concatenate(masks), np.concatenate(boxes)


def unpack(bits: np.ndarray, size: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Returns the masks of bits uint8 [n, H, W8] within `size` (height, width), bool."""
    height, width = (int(v) for v in size)
    return np.unpackbits(bits[:, :height, : -(-width // 8)], axis=2, count=width).view(bool)


def rows_on_one_device(x: jax.Array, index: int) -> tuple[jax.Array, int]:
    """Returns the rows that lie with row `index` on its device, and where it is in them.

    They are on the first of the devices that the rows of `x` are split over.
    """
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    start = max(s for s in shards if s <= index)
    first = next(iter(shards[min(shards)].devices()))
    return jax.device_put(shards[start], first), index - start


def canvas_for(height: int, width: int) -> tuple[int, int]:
    """Returns the canvas (height, width) on which masks of a size are pasted."""
    sides = round_up(height, CANVAS_DIVISOR), round_up(width, CANVAS_DIVISOR)
    longest = max(sides)
    return (longest, longest) if longest <= MAX_SQUARE_CANVAS else sides


def round_size(canvas: tuple[int, int], most: int) -> int:
    """Returns how many masks are pasted in one round: all, fewer on a large canvas."""
    return int(np.clip(ROUND_PIXELS // (canvas[0] * canvas[1]), 1, most))
