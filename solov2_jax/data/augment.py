"""Augmentations of training images: what may happen, and one image with all of it.

Each is a function of (view, random generator). Their order: colours, rotation, crop,
scale, flip; the outlines are drawn once, at the end, and other images' objects pasted
last.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance

from solov2_jax.data import rasterize
from solov2_jax.data.rasterize import Size, Spans
from solov2_jax.data.transforms import AffineImage, crop, resize, rotate


@dataclasses.dataclass(frozen=True)
class Augment:
    """What may happen beyond the resize and the flip; see `configs/base.py`."""

    rotate_prob: float
    rotate_degrees: float
    crop_size: tuple[float, ...]  # (), or smallest (height, width) over the image's
    crop_objects: bool
    brightness: float
    contrast: float
    saturation: float
    jitter_scale: tuple[float, ...]  # (), or (lowest, highest)
    jitter_size: tuple[int, ...]  # (height, width)
    paste_prob: float

    @property
    def active(self) -> bool:
        """Whether anything may happen."""
        strengths = (self.brightness, self.contrast, self.saturation)
        lists = (self.crop_size, self.jitter_scale)
        return bool(any(map(len, lists)) or any(strengths)) or (
            self.rotate_prob > 0 or self.paste_prob > 0
        )

    def check(self) -> "Augment":
        """Returns itself, or raises naming the config's key."""
        for key in (
            "rotate_prob",
            "paste_prob",
            "brightness",
            "contrast",
            "saturation",
        ):
            value = getattr(self, key)
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{key} is {value}; it must be in 0..1.")
        if self.crop_size and not (
            len(self.crop_size) == 2 and all(0 < v <= 1 for v in self.crop_size)
        ):
            raise ValueError(
                f"augment.crop_size is {self.crop_size}; use (), or two shares of the "
                "image (height, width) in 0..1."
            )
        if self.jitter_scale and not (
            len(self.jitter_scale) == 2 and 0 < self.jitter_scale[0] <= self.jitter_scale[1]
        ):
            raise ValueError(
                f"augment.jitter_scale is {self.jitter_scale}; use (), or (lowest, "
                "highest), positive."
            )
        if len(self.jitter_size) != 2 or min(self.jitter_size) < 1:
            raise ValueError(f"augment.jitter_size is {self.jitter_size}; use (height, width).")
        return self


@dataclasses.dataclass(frozen=True)
class Scene:
    """An augmented image with its objects."""

    view: AffineImage
    outlines: Spans  # `owner` counts the objects
    labels: np.ndarray  # int32 [n]


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


def copy_paste(scene: Scene, other: Scene, rng: np.random.Generator, share: float = 0.5) -> Scene:
    """Returns a scene with some of another's objects on top, at a random place.

    What they hide is cut from the objects below; one that is hidden has no span left.
    Source: Ghiasi et al. 2021, "Simple Copy-Paste", without blending.

    Args:
      other: no larger than `scene`.
      share: of the other's objects, each by itself.
    """
    number = len(other.labels)
    chosen = np.flatnonzero(rng.random(number) < share)
    free = np.array(scene.view.size) - other.view.size
    top, left = (rng.random(2) * (free + 1)).astype(int).tolist()
    cover = np.zeros(scene.view.size, np.uint8)
    pieces = []
    for i in chosen.tolist():
        own = other.outlines.take(np.flatnonzero(other.outlines.owner == i))
        moved = Spans(own.owner, own.column + left, own.top + top, own.bottom + top)
        pieces.append(moved)
        if (crop := rasterize.spans_to_crop(moved)) is not None:
            h, w = crop.pixels.shape
            cover[crop.top : crop.top + h, crop.left : crop.left + w] |= crop.pixels
    canvas = np.array(scene.view.picture)
    patch = np.asarray(other.view.picture)
    h, w = patch.shape[:2]
    hidden = cover[top : top + h, left : left + w].astype(bool)
    canvas[top : top + h, left : left + w][hidden] = patch[hidden]
    below = [_uncovered(scene.outlines, i, cover) for i in range(len(scene.labels))]
    above = [
        dataclasses.replace(piece, owner=np.full(len(piece.owner), len(below) + n))
        for n, piece in enumerate(pieces)
    ]
    return Scene(
        dataclasses.replace(scene.view, picture=Image.fromarray(canvas)),
        rasterize.concatenate_spans([*below, *above]),
        np.concatenate([scene.labels, other.labels[chosen]]),
    )


def _uncovered(outlines: Spans, number: int, cover: np.ndarray) -> Spans:
    """Returns an object's spans without the pixels where `cover` is 1."""
    own = outlines.take(np.flatnonzero(outlines.owner == number))
    crop = rasterize.spans_to_crop(own)
    if crop is None:
        return own
    h, w = crop.pixels.shape
    hidden = cover[crop.top : crop.top + h, crop.left : crop.left + w]
    if not (crop.pixels & hidden).any():
        return own
    left = rasterize.spans_from_pixels(crop.pixels & (1 - hidden), number)
    return Spans(left.owner, left.column + crop.left, left.top + crop.top, left.bottom + crop.top)
