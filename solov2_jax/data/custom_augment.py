"""The user's own augmentations, `augment.custom`: found, called, and what they return checked."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from solov2_jax.data import rasterize
from solov2_jax.data.albumentations_adapter import adapt, is_transform
from solov2_jax.data.augment import Sample
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.io import InputError
from solov2_jax.rle import Size

Augmentation = Callable[[Sample], Sample]


@functools.lru_cache(maxsize=64)
def custom_function(path: str) -> Augmentation:
    """Returns what a path of `augment.custom` names; each process imports it once.

    A transform of albumentations becomes a function of samples.
    """
    # Here: a worker loads it only where there is a function of the user's.
    from solov2_jax.user_code import check_call, import_object

    try:
        function: Any = import_object(path, "augment.custom")
    except InputError as error:
        if "No module named 'albumentations'" not in str(error):
            raise
        fix = 'Install the library by pip install "solov2_jax[albumentations]".'
        raise InputError(f"{error} {fix}") from error
    if is_transform(function):
        return adapt(function)
    if isinstance(function, type):
        raise InputError(
            f"augment.custom: {path} is a class; name a function that takes a Sample and "
            "returns it changed, or an object of the class that is called so."
        )
    check_call(function, ("sample",), f"augment.custom: {path}")
    augmentation: Any = function
    return augmentation


def apply_custom(
    sample: Sample,
    paths: Sequence[str],
    *,
    room: Size,
    num_classes: int,
    where: str,
    pixels: PixelFormat = RGB,
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
            from solov2_jax.user_code import failure

            raise InputError(
                f"augment.custom: {path} failed for {where} ({failure(error)}); correct it."
            ) from error
        if wrong := _wrong_sample(changed, room, num_classes, pixels):
            raise InputError(f"augment.custom: {path} returned, for {where}, {wrong}.")
        if changed.boxes.shape == boxes.shape and (changed.boxes == boxes).all():
            changed.boxes = rasterize.bounding_boxes(changed.outlines(), len(changed.labels))
        sample = changed
    return sample


def try_first_image(maker: Any) -> None:
    """Makes the first image with objects of a `BatchMaker`, so that what fails does so before
    a run."""
    schedule, num_objects = maker.schedule, maker.dataset.objects_per_image
    step = int(np.argmax(num_objects[schedule.image[:, 0]] > 0))
    alone = schedule.part(slice(step, step + 1), slice(0, 1))
    dataclasses.replace(maker, schedule=alone)(0)


_KINDS = {np.uint8: ("uint8", "u1"), np.float32: ("float32", "f4")}


def _wrong_sample(sample: Any, room: Size, num_classes: int, pixels: PixelFormat) -> str:
    """Returns what is wrong with the value that a custom augmentation returned, or ""."""
    if not isinstance(sample, Sample):
        return f"a {type(sample).__name__}; return the Sample that it got, changed"
    arrays = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)[:4]}
    n, image = len(np.atleast_1d(sample.labels)), sample.image
    size: Any = image.shape[:2] if isinstance(image, np.ndarray) else ()
    wanted = {
        "image": (*_KINDS[pixels.dtype], (*size, pixels.channels)),
        "masks": ("bool", "b1", (n, *size)),
        "boxes": ("float", "f", (n, 4)),
        "labels": ("int", "i", (n,)),
    }
    if sample.keypoints is not None:
        arrays["keypoints"] = sample.keypoints
        wanted["keypoints"] = ("float", "f", (n, *np.shape(sample.keypoints)[1:2], 3))
    if sample.has_mask is not None:
        arrays["has_mask"] = sample.has_mask
        wanted["has_mask"] = ("bool", "b1", (n,))
    for name, (kind, code, shape) in wanted.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            return f"`{name}` of type {type(array).__name__}; it must be a numpy array"
        if not array.dtype.str[1:].startswith(code) or array.shape != shape:
            return (
                f"`{name}` {array.dtype} {list(array.shape)}; it must be {kind} {list(shape)}, "
                f"as there are {n} labels and the image is {list(size)}"
            )
        if code[0] == "f" and not np.isfinite(array).all():
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
