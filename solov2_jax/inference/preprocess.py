"""A picture -> the network's input: resized, in its channel order, padded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.data.buckets import STRIDE, Bucket, assign_buckets, round_up
from solov2_jax.data.images import read_values
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.data.transforms import resize_image, shortest_edge_sizes


@dataclass(frozen=True)
class InputOptions:
    """How an image becomes the network's input; see `configs/base.py`."""

    channel_order: str  # of three channels
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    min_size: int
    max_size: int
    # Padded shapes to choose from, a compilation each; results do not depend on them.
    # (): each image's own multiples of 32.
    buckets: tuple[Bucket, ...]
    pixels: PixelFormat = RGB  # of the images


def default_buckets(min_size: int, max_size: int) -> tuple[Bucket, ...]:
    """Returns a landscape and a portrait shape that hold every image.

    After the resize the short side is at most `min_size`, the long one `max_size`.
    """
    short, long = (round_up(side, STRIDE) for side in (min_size, max_size))
    return tuple(dict.fromkeys([(short, long), (long, short)]))


def load_image(
    image: np.ndarray | str | os.PathLike[str], name: str, pixels: PixelFormat = RGB
) -> np.ndarray:
    """Returns the values [H, W, C] of a path or of an array, RGB uint8 unless `pixels` says
    otherwise, or raises."""
    if isinstance(image, str | os.PathLike):
        return read_values(image, pixels)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"{name} is a {type(image).__name__}; give a path or a numpy array, {pixels.describe()}"
        )
    if pixels.channels == 1 and image.ndim == 2:
        image = image[..., None]
    fits = image.ndim == 3 and image.shape[2] == pixels.channels
    if not fits or image.dtype != np.uint8 and not pixels.value_range:
        raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be {pixels.describe()}")
    if not image.size:
        raise ValueError(f"{name} is {image.shape}: it has no pixels")
    return image


def padded_shape(
    rows: int, columns: int, name: str, options: InputOptions
) -> tuple[Bucket, Bucket]:
    """Returns (height, width) of an image after the resize and after the padding.

    Args:
      name: of the image, for the message.
    """
    size = shortest_edge_sizes(rows, columns, options.min_size, options.max_size)
    height, width = (int(v) for v in size)
    shape = (round_up(height, STRIDE), round_up(width, STRIDE))
    if options.buckets:
        sizes = np.array([[height, width]])
        names = np.array([name])
        chosen = assign_buckets(sizes, options.buckets, names, "input.buckets_test")
        shape = options.buckets[int(chosen[0])]
    return (height, width), shape


def make_example(
    image: np.ndarray | str | os.PathLike[str], image_id: int, options: InputOptions
) -> dict[str, np.ndarray]:
    """Returns one image as a batch of evaluation has it, but without the batch axis.

    Args:
      image: RGB uint8 [H, W, 3], or as `options.pixels` says, or a path.
    """
    is_path = isinstance(image, str | os.PathLike)
    name = os.fspath(image) if is_path else f"image {image_id}"
    image = load_image(image, name, options.pixels)
    rows, columns = image.shape[:2]
    (height, width), shape = padded_shape(rows, columns, name, options)
    pixels = options.pixels
    if not pixels.is_rgb:
        image = pixels.scaled(image, name)
    padded = np.zeros((*shape, pixels.channels), pixels.dtype)
    resized = resize_image(image, height, width)
    if options.channel_order == "BGR" and pixels.channels == 3:
        resized = resized[..., ::-1]
    padded[:height, :width] = resized
    return {
        "image": padded,
        "image_size": np.array([height, width], np.int32),
        "original_size": np.array([rows, columns], np.int32),
        "image_id": np.array(image_id, np.int64),
    }


def make_batches(
    examples: Sequence[Mapping[str, np.ndarray]], batch_size: int
) -> list[dict[str, np.ndarray]]:
    """Returns at most `batch_size` examples, those of one padded shape together.

    Every batch is filled up, because a smaller one would need another compilation; the
    padding repeats an image under the id -1.
    """
    groups: dict[tuple[int, ...], list[Mapping[str, np.ndarray]]] = {}
    for example in examples:
        groups.setdefault(example["image"].shape, []).append(example)
    batches = []
    for group in groups.values():
        padding = {**group[-1], "image_id": np.array(-1)}
        rows = group + [padding] * (batch_size - len(group))
        batches.append({key: np.stack([row[key] for row in rows]) for key in padding})
    return batches
