"""Augmentations of training images: the built-in ones and the user's own.

First what changes the picture and where its points are, functions of (view, settings,
random generator): colours, rotation, crop, large-scale jitter. Then, on the finished
`Sample`, other images' objects are pasted and the functions of `augment.custom` called.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import ImageEnhance

from solov2_jax.data import rasterize
from solov2_jax.data.rasterize import Spans
from solov2_jax.data.transforms import AffineImage, clear_outside, crop, resize, rotate
from solov2_jax.io import InputError, import_object, reason
from solov2_jax.rle import Size


@dataclasses.dataclass(frozen=True)
class Augment:
    """What may happen beyond the resize and the flip; see `configs/base.py`."""

    rotate_prob: float = 0.0
    rotate_degrees: float = 30.0
    crop_size: tuple[float, ...] = ()  # (), or smallest (height, width) over the image's
    crop_objects: bool = True
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    jitter_scale: tuple[float, ...] = ()  # (), or (lowest, highest)
    jitter_size: tuple[int, ...] = (1024, 1024)  # (height, width)
    paste_prob: float = 0.0
    custom: tuple[str, ...] = ()  # import paths of functions from Sample to Sample

    @property
    def active(self) -> bool:
        """Whether anything may happen."""
        moves = self.rotate_prob or self.crop_size or self.jitter_scale
        recolors = self.brightness or self.contrast or self.saturation
        return bool(moves or recolors or self.adds_objects)

    @property
    def adds_objects(self) -> bool:
        """Whether an image may get more objects than are annotated, or other pixels than
        moved ones."""
        return self.paste_prob > 0 or bool(self.custom)


@dataclasses.dataclass(frozen=True)
class Outlines:
    """Masks of an image's objects that are no pixels yet."""

    spans: Spans  # `owner` counts the objects
    num_objects: int
    size: Size  # (height, width) of the image

    def pixels(self) -> np.ndarray:
        """Returns the masks, bool [n, h, w]."""
        return rasterize.spans_to_masks(self.spans, self.num_objects, self.size)


class _Pixels:
    """A field of `Sample` whose pixels are made when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, sample: "Sample | None", owner: type | None = None) -> Any:
        if sample is None:
            raise AttributeError(self.name)  # so that the dataclass has no default for it
        value = vars(sample)[self.name]
        if isinstance(value, Outlines | AffineImage):
            value = vars(sample)[self.name] = value.pixels()
        return value

    def __set__(self, sample: "Sample", value: Any) -> None:
        vars(sample)[self.name] = value


@dataclasses.dataclass(eq=False, kw_only=True)
class Sample:
    """One training image with its n objects, at the network's size, before padding.

    It is what a function of `augment.custom` gets and returns: change the fields in
    place, assign new arrays, or return another Sample (`dataclasses.replace`).
    Coordinates are pixels of `image`, (0, 0) its upper left corner.
    """

    image: Any = _Pixels()  # uint8 [h, w, 3], RGB
    masks: Any = _Pixels()  # bool [n, h, w]
    # float32 [n, 4], (x0, y0, x1, y1). Left as they are, they become the masks' boxes.
    boxes: np.ndarray
    labels: np.ndarray  # int32 [n], 0..K-1: the class's place among the sorted ids
    # float32 [n, J, 3]: x, y, and 0 not annotated, 1 hidden, 2 visible; None where the
    # data has none.
    keypoints: np.ndarray | None
    # Draw everything random from it: it is a function of the seed, the epoch and the
    # image, so that a resumed run sees the same.
    rng: np.random.Generator

    @property
    def size(self) -> Size:
        """(height, width) of the image."""
        return self.view.size if self.view else (self.image.shape[0], self.image.shape[1])

    @property
    def view(self) -> AffineImage | None:
        """The picture while it is no array yet."""
        value = vars(self)["image"]
        return value if isinstance(value, AffineImage) else None

    def outlines(self) -> Spans:
        """Returns the masks as spans."""
        value = vars(self)["masks"]
        return value.spans if isinstance(value, Outlines) else rasterize.spans_from_masks(value)


def color_jitter(view: AffineImage, augment: Augment, rng: np.random.Generator) -> AffineImage:
    """Returns the picture with other brightness, contrast and saturation.

    Source: detectron2 data/transforms/augmentation_impl.py, RandomBrightness,
    RandomContrast, RandomSaturation: factors around 1. Grey is PIL's here.
    """
    picture = view.picture
    for strength, kind in (
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ):
        factor = rng.uniform(1 - strength, 1 + strength)
        if strength:
            picture = kind(picture).enhance(factor)
    return dataclasses.replace(view, picture=picture)


def random_rotate(view: AffineImage, augment: Augment, rng: np.random.Generator) -> AffineImage:
    """Returns the picture rotated by an angle within the limit, or as it is."""
    chance, degrees = rng.random(), rng.uniform(-1, 1) * augment.rotate_degrees
    return rotate(view, degrees) if chance < augment.rotate_prob else view


def random_crop_with_instance(
    view: AffineImage, boxes: np.ndarray, augment: Augment, rng: np.random.Generator
) -> AffineImage:
    """Returns a random part of the picture that holds the centre of a random object.

    Source: AdelaiDet adet/data/augmentation.py, RandomCropWithInstance, and
    detectron2's RandomCrop, "relative_range".

    Args:
      boxes: (x0, y0, x1, y1) in the picture, [n, 4].
    """
    share = rng.uniform(augment.crop_size, 1.0)
    pick, place = rng.random(), rng.random(2)
    if not augment.crop_size:
        return view
    sides = np.array(view.size)
    length = np.clip((sides * share + 0.5).astype(int), 1, sides)
    low, high = np.zeros(2, int), sides - length
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    if len(boxes):
        box = boxes[int(pick * len(boxes))]
        center = (box[[1, 0]] + box[[3, 2]]) / 2
        high = np.minimum(high, np.floor(center).astype(int))
        low = np.minimum(np.maximum(np.ceil(center).astype(int) - length, 0), high)
    y0, x0 = low + (place * (high - low + 1)).astype(int)
    window = np.array([x0, y0, x0 + length[1], y0 + length[0]])
    if not augment.crop_objects:
        window = grown(window, boxes)
    x0, y0, x1, y1 = (int(v) for v in window)
    return crop(view, (x0, y0, x1, y1))


def grown(window: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns the smallest window (x0, y0, x1, y1) around this one, in whole pixels,
    whose border cuts no box."""
    while True:
        inside = (np.minimum(boxes[:, 2:], window[2:]) > boxes[:, :2]).all(axis=1)
        inside &= (boxes[:, 2:] > np.maximum(boxes[:, :2], window[:2])).all(axis=1)
        touched = np.concatenate([boxes[inside], window[None]])
        low = np.floor(touched[:, :2].min(axis=0))
        high = np.ceil(touched[:, 2:].max(axis=0))
        larger = np.concatenate([low, high]).astype(int)
        if (larger == window).all():
            return window
        window = larger


def large_scale_jitter(
    view: AffineImage, augment: Augment, rng: np.random.Generator
) -> AffineImage:
    """Returns the picture at a random scale, cut to `jitter_size` at a random place
    where it is larger.

    Source: detectron2 data/transforms/augmentation_impl.py, ResizeScale and
    FixedSizeCrop; what is beyond a smaller picture is padding, as everywhere here.
    """
    h, w = view.size
    target = np.array(augment.jitter_size)
    low, high = augment.jitter_scale
    factor = rng.uniform(low, high) * (target / (h, w)).min()
    scaled = np.maximum(np.rint(np.array([h, w]) * factor), 1).astype(int)
    size = np.minimum(scaled, target)
    y0, x0 = (rng.random(2) * (scaled - size + 1)).astype(int)
    step_y, step_x = h / scaled[0], w / scaled[1]
    right, bottom = (x0 + size[1]) * step_x, (y0 + size[0]) * step_y
    box = (
        *(float(x0 * step_x), float(y0 * step_y)),
        *(float(min(right, w)), float(min(bottom, h))),
    )
    return resize(view, (int(size[0]), int(size[1])), box)


def fitted(size: Size, room: Size) -> Size:
    """Returns a size of the same shape that is not larger than the room."""
    factor = min(1.0, room[0] / size[0], room[1] / size[1])
    height, width = (max(int(v * factor), 1) for v in size)
    return height, width


def copy_paste(
    host: Sample, guest: Sample, canvas: Size, rng: np.random.Generator, share: float = 0.5
) -> Sample:
    """Returns the host with some of the guest's objects on top, at a random place.

    What they hide is cut from the objects below; one that is hidden has no mask left.
    Each object keeps the scale that its image was drawn at; what reaches beyond the
    canvas is cut off. Where pasted objects lie beyond the host's picture, the image grows
    to hold them, black between.
    Source: Ghiasi et al. 2021, "Simple Copy-Paste", without blending.

    Args:
      canvas: (height, width) that the objects are pasted into, at least the host's.
      share: of the guest's objects, each by itself.
    """
    chosen = np.flatnonzero(rng.random(len(guest.labels)) < share)
    free = np.array(canvas) - guest.size
    low, high = np.minimum(free, 0), np.maximum(free, 0)
    top, left = (low + (rng.random(2) * (high - low + 1)).astype(int)).tolist()
    above = rasterize.select_spans(guest.outlines(), chosen, len(guest.labels))
    above = rasterize.shift_spans(above, top, left, canvas)
    size = host.size
    if len(above.owner):
        size = max(size[0], int(above.bottom.max())), max(size[1], int(above.column.max()) + 1)
    image = np.zeros((*size, 3), np.uint8)
    image[: host.size[0], : host.size[1]] = host.image
    cover = np.asarray(rasterize.spans_to_masks(above, len(chosen), size).any(axis=0))
    rows, columns = np.nonzero(cover)
    image[rows, columns] = guest.image[rows - top, columns - left]
    below = rasterize.subtract_cover(host.outlines(), cover)
    num_host, num_objects = len(host.labels), len(host.labels) + len(chosen)
    above = dataclasses.replace(above, owner=above.owner + num_host)
    spans = rasterize.concatenate_spans([below, above])
    keypoints = host.keypoints
    if keypoints is not None and guest.keypoints is not None:
        moved = guest.keypoints[chosen]
        moved[..., :2] += np.array([left, top], np.float32)
        keypoints = np.concatenate([keypoints, clear_outside(moved, size)])
    return dataclasses.replace(
        host,
        image=image,
        masks=Outlines(spans, num_objects, size),
        boxes=rasterize.bounding_boxes(spans, num_objects),
        labels=np.concatenate([host.labels, guest.labels[chosen]]),
        keypoints=keypoints,
    )


Augmentation = Callable[[Sample], Sample]


@functools.lru_cache(maxsize=64)
def custom_function(path: str) -> Augmentation:
    """Returns what a path of `augment.custom` names; each process imports it once."""
    function: Any = import_object(path, "augment.custom")
    if not callable(function):
        raise InputError(
            f"augment.custom: {path!r} is a {type(function).__name__}; name a function "
            "that takes a Sample and returns it changed."
        )
    augmentation: Any = function
    return augmentation


def apply_custom(
    sample: Sample, paths: Sequence[str], *, room: Size, num_classes: int, where: str
) -> Sample:
    """Returns the sample as the functions of `augment.custom` leave it, one after another.

    Args:
      room: (height, width) of the padded shape, the image's size at most.
      where: the image's name, for messages.

    Raises:
      InputError: a function fails, or returns what is no training image.
    """
    for path in paths:
        boxes = sample.boxes.copy()
        try:
            changed = custom_function(path)(sample)
        except Exception as error:
            raise InputError(
                f"augment.custom: {path} failed for {where} ({reason(error)}); correct it."
            ) from error
        if wrong := _wrong_sample(changed, room, num_classes):
            raise InputError(f"augment.custom: {path} returned, for {where}, {wrong}.")
        if changed.boxes.shape == boxes.shape and (changed.boxes == boxes).all():
            changed.boxes = rasterize.bounding_boxes(changed.outlines(), len(changed.labels))
        sample = changed
    return sample


def _wrong_sample(sample: Any, room: Size, num_classes: int) -> str:
    """Returns what is wrong with the value that a custom augmentation returned, or ""."""
    if not isinstance(sample, Sample):
        return f"a {type(sample).__name__}; return the Sample that it got, changed"
    arrays = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)[:4]}
    n, image = len(np.atleast_1d(sample.labels)), sample.image
    size: Any = image.shape[:2] if isinstance(image, np.ndarray) else ()
    wanted = {
        "image": ("uint8", "u1", (*size, 3)),
        "masks": ("bool", "b1", (n, *size)),
        "boxes": ("float", "f", (n, 4)),
        "labels": ("int", "i", (n,)),
    }
    if sample.keypoints is not None:
        arrays["keypoints"] = sample.keypoints
        wanted["keypoints"] = ("float", "f", (n, *np.shape(sample.keypoints)[1:2], 3))
    for name, (kind, code, shape) in wanted.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            return f"`{name}` of type {type(array).__name__}; it must be a numpy array"
        if not array.dtype.str[1:].startswith(code) or array.shape != shape:
            return (
                f"`{name}` {array.dtype} {list(array.shape)}; it must be {kind} {list(shape)}, "
                f"as there are {n} labels and the image is {list(size)}"
            )
        if kind == "float" and not np.isfinite(array).all():
            return f"`{name}` with a value that is not finite"
    if min(size) < 1 or size[0] > room[0] or size[1] > room[1]:
        return (
            f"an image of {size[0]} x {size[1]} (height x width); the padded shape that was "
            f"planned for it holds 1 x 1 to {room[0]} x {room[1]}"
        )
    if (sample.boxes[:, 2:] < sample.boxes[:, :2]).any():
        return "`boxes` whose x1 or y1 is less than x0 or y0"
    if ((sample.labels < 0) | (sample.labels >= num_classes)).any():
        return f"`labels` outside of 0..{num_classes - 1}"
    return ""
