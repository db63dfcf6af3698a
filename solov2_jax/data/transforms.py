"""Resize, flip, turn, crop and rotation, which compose into one affine map of an image.

`Affine` says where the points of the original are; `AffineImage` is a picture with its
map. Outlines, boxes and key points follow by the map, once, at the end.

Coordinates are continuous: pixel (0, 0) covers 0..1, as in polygons and boxes.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.pixel_format import Planes
from solov2_jax.rle import Size

_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def shortest_edge_sizes(
    heights: np.ndarray | int, widths: np.ndarray | int, short: np.ndarray | int, max_size: int
) -> np.ndarray:
    """Returns (height, width) after the resize, int32 [..., 2].

    The shorter side becomes `short`, unless the longer would exceed `max_size`.
    Source: detectron2's ResizeShortestEdge.get_output_shape. A side is at least 1 here;
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
    """Returns [height, width, C], uint8 or, of others, float32, bilinear and antialiased.

    Source: detectron2 data/transforms/transform.py, ResizeTransform: PIL's filter.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.dtype != np.uint8 or image.shape[2] != 3:
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        return Planes.of(image).resize((width, height), _BILINEAR).array()
    return np.asarray(Image.fromarray(image).resize((width, height), _BILINEAR))


@dataclasses.dataclass(frozen=True)
class Affine:
    """Where the points of an original image are in the image made from it."""

    original: Size  # (height, width)
    size: Size  # (height, width) of the new image
    matrix: np.ndarray  # float64 [2, 3], (x, y, 1) of the original -> (x, y)
    # Left and right have changed places: of key points, and of classes, if any, that
    # have sides.
    mirrored: bool = False
    only_resized: bool = True  # and mirrored: neither cropped nor rotated

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Returns where points (x, y) of the original are, float64 [..., 2]."""
        linear, shift = self.matrix[:, :2], self.matrix[:, 2]
        if linear[0, 1] == 0 == linear[1, 0]:
            return xy * linear.diagonal() + shift
        return xy @ linear.T + shift

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Returns boxes (x0, y0, x1, y1) around the moved corners, cut to the image,
        float32 [n, 4].

        Source: detectron2's transform_instance_annotations. There a box of four integers is
        cut to integers again after the resize; not here.
        """
        corners = self.points(boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2))
        moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)
        return np.clip(moved, 0, [*self.size[::-1]] * 2).astype(np.float32)

    def resized(self, size: Size, box: tuple[float, ...] | None = None) -> "Affine":
        """Returns the map to the image, or its part (x0, y0, x1, y1), at another size."""
        x0, y0, x1, y1 = box or (0.0, 0.0, float(self.size[1]), float(self.size[0]))
        sx, sy = size[1] / (x1 - x0), size[0] / (y1 - y0)
        step = np.array([[sx, 0, -x0 * sx], [0, sy, -y0 * sy]])
        return self.then(step, size, only_resized=self.only_resized and box is None)

    def flipped(self) -> "Affine":
        """Returns the map to the image with left and right exchanged."""
        step = np.array([[-1.0, 0, self.size[1]], [0, 1, 0]])
        moved = self.then(step, self.size, self.only_resized)
        return dataclasses.replace(moved, mirrored=not self.mirrored)

    def then(self, step: np.ndarray, size: Size, only_resized: bool = False) -> "Affine":
        """Returns this map followed by one more, [2, 3]."""
        matrix = step[:, :2] @ self.matrix
        matrix[:, 2] += step[:, 2]
        return dataclasses.replace(self, size=size, matrix=matrix, only_resized=only_resized)

    def inverse(self) -> np.ndarray:
        """Returns where the new image's points come from, float64 [2, 3]."""
        linear = np.linalg.inv(self.matrix[:, :2])
        return np.concatenate([linear, -(linear @ self.matrix[:, 2])[:, None]], axis=1)

    def move_nearest(self, values: np.ndarray) -> np.ndarray:
        """Returns the original's values in the new image, by nearest neighbour, uint8
        [h, w]; zero outside of the original."""
        picture, (height, width) = Image.fromarray(values), self.size
        if self.only_resized:
            moved = np.asarray(picture.resize((width, height), _NEAREST))
            return moved[:, ::-1] if self.mirrored else moved
        return np.asarray(_transform(picture, self.size, self.inverse(), _NEAREST))


@dataclasses.dataclass(frozen=True)
class AffineImage:
    """A picture and its map; a last resize and flip may be in the map only."""

    picture: Image.Image | Planes  # RGB where it is PIL's; not mirrored
    affine: Affine

    @property
    def size(self) -> Size:
        """(height, width) that the map leads to."""
        return self.affine.size

    def write(self, out: np.ndarray, bgr: bool = False) -> None:
        """Writes the image into [H, W, C], uint8 or float32, with zeros beyond it.

        PIL turns the channels around where it packs its pixels, for less than a copy by
        numpy costs; and the picture is never an array at its own size.
        """
        picture, (h, w) = self.picture, self.size
        if picture.size != (w, h):
            picture = picture.resize((w, h), _BILINEAR)
        if self.affine.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if isinstance(picture, Planes):
            image = picture.array()
            out[:h, :w] = image[..., ::-1] if bgr else image
        else:
            pixels = picture.tobytes("raw", "BGR" if bgr else "RGB")
            out[:h, :w] = np.frombuffer(pixels, np.uint8).reshape(h, w, 3)
        out[h:] = 0
        out[:h, w:] = 0

    def pixels(self) -> np.ndarray:
        """Returns the image, uint8 [h, w, 3], or [h, w, C] as its planes are."""
        if isinstance(self.picture, Planes):
            first = self.picture.channels[0]
            kind = np.uint8 if first.mode == "L" else np.float32
            image = np.empty((*self.size, len(self.picture.channels)), kind)
        else:
            image = np.empty((*self.size, 3), np.uint8)
        self.write(image)
        return image


def _transform(picture: Any, size: Size, back: np.ndarray, resampling: Image.Resampling) -> Any:
    """Returns a picture of `size`; `back` says where its points come from, [2, 3]."""
    coefficients = back.ravel().tolist()
    return picture.transform((size[1], size[0]), Image.Transform.AFFINE, coefficients, resampling)


def affine_image(picture: Image.Image | Planes) -> AffineImage:
    """Returns the picture as it is."""
    size = picture.height, picture.width
    return AffineImage(picture, Affine(size, size, np.eye(2, 3)))


def rotate(view: AffineImage, degrees: float) -> AffineImage:
    """Returns the picture rotated counter-clockwise, large enough to hold its corners;
    what was outside is black.

    Source: detectron2's RotationTransform, with `expand`.
    """
    h, w = view.size
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    width = max(int(np.rint(h * abs(s) + w * abs(c))), 1)
    height = max(int(np.rint(h * abs(c) + w * abs(s))), 1)
    linear = np.array([[c, s], [-s, c]])
    shift = np.array([width, height]) / 2 - linear @ (np.array([w, h]) / 2)
    back = np.concatenate([linear.T, -(linear.T @ shift)[:, None]], axis=1)
    step = np.concatenate([linear, shift[:, None]], axis=1)
    picture = _transform(view.picture, (height, width), back, _BILINEAR)
    return AffineImage(picture, view.affine.then(step, (height, width)))


_TURNS = {
    1: (Image.Transpose.ROTATE_90, [[0, 1], [-1, 0]]),
    2: (Image.Transpose.ROTATE_180, [[-1, 0], [0, -1]]),
    3: (Image.Transpose.ROTATE_270, [[0, -1], [1, 0]]),
}


def turn(view: AffineImage, quarters: int) -> AffineImage:
    """Returns the picture turned counter-clockwise by quarters of a full turn, pixel by
    pixel."""
    if not quarters % 4:
        return view
    transpose, linear = _TURNS[quarters % 4]
    picture = view.picture.transpose(transpose)
    size = picture.height, picture.width
    # The turn around the middle: what it leads to the negative side comes back.
    corner = np.minimum(np.array(linear) @ [view.size[1], view.size[0]], 0)
    step = np.concatenate([np.array(linear, float), -corner[:, None].astype(float)], axis=1)
    return AffineImage(picture, view.affine.then(step, size))


def crop(view: AffineImage, box: tuple[int, int, int, int]) -> AffineImage:
    """Returns the part (x0, y0, x1, y1) of the picture."""
    x0, y0, x1, y1 = box
    if box == (0, 0, view.size[1], view.size[0]):
        return view
    step = np.array([[1.0, 0, -x0], [0, 1, -y0]])
    return AffineImage(view.picture.crop(box), view.affine.then(step, (y1 - y0, x1 - x0)))


def resize(
    view: AffineImage, size: Size, box: tuple[float, float, float, float] | None = None
) -> AffineImage:
    """Returns the picture, or the part (x0, y0, x1, y1) of it, at another size."""
    picture = view.picture.resize((size[1], size[0]), _BILINEAR, box)
    return AffineImage(picture, view.affine.resized(size, box))


@dataclasses.dataclass(frozen=True)
class Keypoints:
    """The J key points of a data set's A objects, which move with their image."""

    names: tuple[str, ...]
    mirrored: np.ndarray  # int [J]: point j of the mirrored image is mirrored[j]
    points: np.ndarray  # float32 [A, J, 3], x, y in pixels, and 0 not annotated,
    # 1 hidden, 2 visible

    def __len__(self) -> int:
        return len(self.names)

    def moved(self, objects: np.ndarray, affine: Affine) -> np.ndarray:
        """Returns the points of objects in the image that a map leads to, float32 [n, J, 3].

        Left and right change places in a mirrored image. A point that leaves the image is
        no longer annotated; such points are zeros.
        Source: detectron2 data/detection_utils.py, transform_keypoint_annotations.
        """
        points = self.points[objects].astype(np.float64)
        points[..., :2] = affine.points(points[..., :2])
        if affine.mirrored:
            points = points[:, self.mirrored]
        return clear_outside(points, affine.size).astype(np.float32)


def clear_outside(points: np.ndarray, size: Size) -> np.ndarray:
    """Returns key points [..., 3], zeros where they are not annotated or lie outside of an
    image of this size; changes its argument."""
    inside = ((points[..., :2] >= 0) & (points[..., :2] <= size[::-1])).all(axis=-1)
    points[~inside | (points[..., 2] == 0)] = 0
    return points


def hide_points(points: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Returns key points [..., 3], those in front of which something now is, `cover` bool
    [h, w], as hidden."""
    points, (h, w) = points.copy(), cover.shape
    x, y = (np.clip(points[..., i].astype(int), 0, n - 1) for i, n in ((0, w), (1, h)))
    points[..., 2][cover[y, x] & (points[..., 2] == 2)] = 1
    return points
