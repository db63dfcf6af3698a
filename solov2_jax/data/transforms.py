"""Resizing and flipping images and boxes, as the reference's loader does."""

import numpy as np
from PIL import Image


def shortest_edge_sizes(
    heights: np.ndarray | int,
    widths: np.ndarray | int,
    short: np.ndarray | int,
    max_size: int,
) -> np.ndarray:
    """Returns (height, width) after the resize, int32 [..., 2].

    The shorter side becomes `short`, unless the longer would exceed `max_size`.
    Source: detectron2 data/transforms/augmentation_impl.py,
    ResizeShortestEdge.get_output_shape, in float64 as there. A side is at least 1 here;
    the reference gets 0 for a very thin image, and fails.
    """
    h, w = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    size = np.asarray(short, np.float64)
    scale = size / np.minimum(h, w)
    new_h = np.where(h < w, size, scale * h)
    new_w = np.where(h < w, scale * w, size)
    longest = np.maximum(new_h, new_w)
    shrink = np.where(longest > max_size, max_size / longest, 1.0)
    sizes = np.stack([new_h * shrink + 0.5, new_w * shrink + 0.5], axis=-1)
    return np.maximum(sizes.astype(np.int32), 1)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns uint8 [height, width, 3], bilinear and antialiased.

    Source: detectron2 data/transforms/transform.py, ResizeTransform: PIL's filter.
    """
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def write_image(image: Image.Image, out: np.ndarray, flip: bool, bgr: bool) -> None:
    """Resizes an RGB picture as `resize_image` does, and writes it, maybe mirrored.

    PIL turns the channels around where it packs its pixels, for less than a copy by
    numpy costs; and the picture is never an array at its own size.

    Args:
      out: uint8 [h, w, 3], a part of a batch; its size is that of the resize.
    """
    height, width = out.shape[:2]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = image.tobytes("raw", "BGR" if bgr else "RGB")
    out[...] = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def transform_boxes(
    boxes: np.ndarray,
    old_size: tuple[int, int],
    new_size: tuple[int, int],
    flip: bool,
) -> np.ndarray:
    """Returns boxes of the resized, maybe flipped image, clipped to it, float32 [n, 4].

    Source: detectron2 data/detection_utils.py, transform_instance_annotations. There a
    box of four integers is cut to integers again after the resize; not here.

    Args:
      boxes: (x0, y0, x1, y1) in the original image.
      old_size, new_size: (height, width).
    """
    scale = np.array([new_size[1] / old_size[1], new_size[0] / old_size[0]] * 2)
    out = boxes * scale
    if flip:
        out[:, [0, 2]] = new_size[1] - out[:, [2, 0]]
    limit = [new_size[1], new_size[0]] * 2
    return np.clip(out, 0, limit).astype(np.float32)
