"""Augmentations of training images: the built-in ones and the user's own.

First what changes the picture and where its points are, functions of (view, settings,
random generator): colours, turns, rotation, crop, scale. Then, on the finished `Sample`,
other images are joined (`join.py`), the picture is made worse (`degrade.py`) and the
functions of `augment.custom` are called (`custom_augment.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from solov2_jax.data import rasterize
from solov2_jax.data.pixel_format import Planes
from solov2_jax.data.rasterize import Spans
from solov2_jax.data.transforms import AffineImage, crop, resize, rotate
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
    vflip_prob: float = 0.0
    turn_prob: float = 0.0
    scale: tuple[float, ...] = ()  # (), or (lowest, highest) times the planned size
    hue: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: float = 2.0  # input pixels, at most
    noise: float = 0.0  # standard deviation, of 255, at most
    jpeg_prob: float = 0.0
    jpeg_quality: tuple[int, ...] = (40, 90)  # (lowest, highest)
    cutout_prob: float = 0.0
    cutout_size: tuple[float, ...] = (0.05, 0.25)  # (lowest, highest) share of the short side
    cutout_holes: int = 3  # at most
    mosaic_prob: float = 0.0
    mixup_prob: float = 0.0
    user: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # for `custom`

    @property
    def active(self) -> bool:
        """Whether anything may happen."""
        moves = self.rotate_prob or self.crop_size or self.jitter_scale or self.scale
        recolors = self.brightness or self.contrast or self.saturation or self.hue
        turns = self.vflip_prob or self.turn_prob
        return bool(moves or turns or recolors or self.degrades or self.adds_objects)

    @property
    def changes_size(self) -> bool:
        """Whether an image may get another size than the resize gives it."""
        moves = self.rotate_prob or self.crop_size or self.scale or self.turn_prob
        return bool(moves or self.jitter_scale or self.adds_objects)

    @property
    def joins(self) -> int:
        """How many of the augmentations are on that join several images."""
        return sum(p > 0 for p in (self.paste_prob, self.mosaic_prob, self.mixup_prob))

    @property
    def degrades(self) -> bool:
        """Whether the finished picture may be made worse."""
        return bool(self.blur_prob or self.noise or self.jpeg_prob or self.cutout_prob)

    @property
    def adds_objects(self) -> bool:
        """Whether an image may get more objects than are annotated, or other pixels than
        moved ones."""
        return self.joins > 0 or bool(self.custom)


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

    # uint8 [h, w, 3], RGB; [h, w, C] as `data.channels` says, and float32, 0..255, where
    # `data.value_range` is declared.
    image: Any = _Pixels()
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
    # bool [n]: False of an object whose mask is only its box. None: all have one.
    has_mask: np.ndarray | None = None
    user: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys below `config.user`

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
    RandomContrast, RandomSaturation: factors around 1. Grey is PIL's here; of pictures
    that are not 8-bit RGB, the contrast is that around the mean of all channels.
    """
    picture = view.picture
    if isinstance(picture, Planes):
        strengths = augment.brightness, augment.contrast, 0.0  # as many draws as below
        brightness, contrast, _ = (rng.uniform(1 - s, 1 + s) for s in strengths)
        if augment.brightness or augment.contrast:
            picture = picture.enhance(brightness, contrast)
        return dataclasses.replace(view, picture=picture)
    for strength, kind in (
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ):
        factor = rng.uniform(1 - strength, 1 + strength)
        if strength:
            picture = kind(picture).enhance(factor)
    if augment.hue:
        picture = shift_hue(picture, rng.uniform(-augment.hue, augment.hue))
    return dataclasses.replace(view, picture=picture)


def shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    """Returns the picture with every hue moved around the circle by so many full turns."""
    hue, saturation, value = picture.convert("HSV").split()
    moved = hue.point([(v + round(turns * 256)) % 256 for v in range(256)])
    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")


def random_turn(augment: Augment, rng: np.random.Generator) -> tuple[int, bool]:
    """Returns quarter turns, 0 to 3, and whether the image is mirrored besides.

    Upside down is half a turn and mirrored: so key points change sides, as they must.
    """
    turned, quarters = rng.random() < augment.turn_prob, int(rng.integers(1, 4))
    upside_down = bool(rng.random() < augment.vflip_prob)
    return (quarters if turned else 0) + 2 * upside_down, upside_down


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
    return random_scale(view, augment.jitter_scale, augment.jitter_size, rng)


def random_scale(
    view: AffineImage, bounds: Sequence[float], target: Sequence[int], rng: np.random.Generator
) -> AffineImage:
    """Returns the picture at a random number of times what fits into `target`, (height,
    width), cut to that at a random place where it is larger.

    Args:
      bounds: (lowest, highest) of the number.
    """
    h, w = view.size
    factor = rng.uniform(bounds[0], bounds[1]) * min(target[0] / h, target[1] / w)
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
