"""Resizing and flipping images and boxes, as the reference's loader does.

Pictures moved by affine maps, and the outlines and points that move with them.

Coordinates are continuous: pixel (0, 0) covers 0..1, as in polygons and boxes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from solov2_jax.data import rasterize
from solov2_jax.data.outlines import Segmentations
from solov2_jax.data.rasterize import Size, Spans


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


_BILINEAR = Image.Resampling.BILINEAR


@dataclasses.dataclass(frozen=True)
class AffineImage:
    """A picture, and where the original's points are in it."""

    picture: Image.Image  # RGB
    matrix: np.ndarray  # float64 [2, 3], (x, y, 1) of the original -> (x, y) here
    # Left and right have changed places: of keypoints, and of classes, if any, that
    # have sides.
    mirrored: bool = False

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.picture.height, self.picture.width

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Returns where points (x, y) of the original are, float64 [..., 2]."""
        return xy @ self.matrix[:, :2].T + self.matrix[:, 2]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Returns boxes around the moved corners, cut to the picture, float64 [n, 4].

        Args:
          boxes: (x0, y0, x1, y1) in the original.
        """
        corners = self.points(boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2))
        found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)
        return np.clip(found, 0, [*self.size[::-1]] * 2)


def affine_image(picture: Image.Image) -> AffineImage:
    """Returns the unmoved view."""
    return AffineImage(picture, np.eye(2, 3))


def _then(view: AffineImage, picture: Image.Image, step: np.ndarray) -> AffineImage:
    """Returns the view after one more map [2, 3], which gave this picture."""
    linear, shift = step[:, :2], step[:, 2]
    moved = linear @ view.matrix
    moved[:, 2] += shift
    return dataclasses.replace(view, picture=picture, matrix=moved)


def rotate(view: AffineImage, degrees: float) -> AffineImage:
    """Returns the picture rotated counter-clockwise, large enough to hold its corners;
    what was outside is black.

    Source: detectron2 data/transforms/transform.py, RotationTransform, with `expand`.
    """
    h, w = view.size
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    width = max(int(np.rint(h * abs(s) + w * abs(c))), 1)
    height = max(int(np.rint(h * abs(c) + w * abs(s))), 1)
    linear = np.array([[c, s], [-s, c]])
    shift = np.array([width, height]) / 2 - linear @ (np.array([w, h]) / 2)
    # PIL asks where a target pixel comes from.
    back = np.concatenate([linear.T, -(linear.T @ shift)[:, None]], axis=1)
    picture = view.picture.transform(
        (width, height), Image.Transform.AFFINE, back.ravel().tolist(), _BILINEAR
    )
    return _then(view, picture, np.concatenate([linear, shift[:, None]], axis=1))


def crop(view: AffineImage, box: tuple[int, int, int, int]) -> AffineImage:
    """Returns the part (x0, y0, x1, y1) of the picture."""
    step = np.array([[1.0, 0, -box[0]], [0, 1, -box[1]]])
    return _then(view, view.picture.crop(box), step)


def resize(
    view: AffineImage, size: Size, box: tuple[float, float, float, float] | None = None
) -> AffineImage:
    """Returns the picture, or the part (x0, y0, x1, y1) of it, at another size."""
    h, w = view.size
    x0, y0, x1, y1 = box or (0.0, 0.0, float(w), float(h))
    sx, sy = size[1] / (x1 - x0), size[0] / (y1 - y0)
    step = np.array([[sx, 0, -x0 * sx], [0, sy, -y0 * sy]])
    picture = view.picture.resize((size[1], size[0]), _BILINEAR, (x0, y0, x1, y1))
    return _then(view, picture, step)


def hflip(view: AffineImage) -> AffineImage:
    """Returns the picture with left and right exchanged."""
    picture = view.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    step = np.array([[-1.0, 0, view.size[1]], [0, 1, 0]])
    moved = _then(view, picture, step)
    return dataclasses.replace(moved, mirrored=not view.mirrored)


def draw_view(
    segmentations: Segmentations,
    indices: Sequence[int],
    old_size: Size,
    view: AffineImage,
) -> Spans:
    """Returns the masks of objects in a view.

    The points of polygons are moved, then drawn; run lengths are drawn in the original
    and moved by nearest neighbour.

    Args:
      indices: of the objects; `owner` counts them.
      old_size: of the original.
    """
    polygons: list[np.ndarray] = []
    drawn: list[tuple[int, int]] = []
    pieces = []
    for position, index in enumerate(indices):
        outline = segmentations.polygons(index)
        if outline:
            parts = [clipped(p.reshape(-1, 2), old_size) for p in outline]
            parts = [view.points(p).ravel() for p in parts if len(p) > 2]
            drawn += [(position, len(parts))] if parts else []
            polygons += parts
            continue
        runs = segmentations.run_lengths(index)
        found = rasterize.spans_of_rle(runs, position, old_size)
        pieces.append(_move(found, position, old_size, view))
    if polygons:
        pieces.append(rasterize.draw_polygons(polygons, drawn, view.size))
    return rasterize.concatenate_spans(pieces)


def clipped(points: np.ndarray, size: Size) -> np.ndarray:
    """Returns the part of a polygon within the picture, float64 [m, 2].

    What annotators drew beyond the border must not come into sight by a rotation.
    Source: Sutherland and Hodgman 1974.
    """
    for axis, limit, sign in (
        (0, 0, -1.0),
        (0, size[1], 1.0),
        (1, 0, -1.0),
        (1, size[0], 1.0),
    ):
        beyond = sign * (points[:, axis] - limit) > 0
        if not beyond.any():
            continue
        after = np.roll(points, -1, axis=0)
        crossing = beyond != np.roll(beyond, -1)
        run = np.where(crossing, after[:, axis] - points[:, axis], 1)
        share = (limit - points[:, axis]) / run
        met = points + share[:, None] * (after - points)
        met[:, axis] = limit
        both = np.stack([points, met], axis=1).reshape(-1, 2)
        points = both[np.stack([~beyond, crossing], axis=1).ravel()]
        if not len(points):
            break
    return points


def _move(found: Spans, owner: int, old_size: Size, view: AffineImage) -> Spans:
    """Returns the mask of one object of the original in a view."""
    crop = rasterize.spans_to_crop(found)
    whole = np.zeros(old_size, np.uint8)
    if crop is not None:
        h, w = crop.pixels.shape
        whole[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
    linear = np.linalg.inv(view.matrix[:, :2])
    back = np.concatenate([linear, -(linear @ view.matrix[:, 2])[:, None]], axis=1)
    mask = Image.fromarray(whole).transform(
        (view.size[1], view.size[0]),
        Image.Transform.AFFINE,
        back.ravel().tolist(),
        Image.Resampling.NEAREST,
    )
    return rasterize.spans_from_pixels(np.asarray(mask), owner)
