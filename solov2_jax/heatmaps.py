"""Heatmaps of key points, made on the device: FCPose's targets.

A person of an image of 800 x 1344 has heatmaps of 2 x 17 x 400 x 672 values at stride 2,
37 MB; the reference makes them for all persons, in the data loader. Here a batch carries
the points, and maps are made for as few persons at a time as fit.

Shapes: J key points, P persons.
Source: AdelaiDet adet/data/detection_utils.py, HeatmapGenerator.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")

# The reference's defaults [MODEL.FCPOSE.GT_HEATMAP_STRIDE, HEATMAP_SIGMA,
# HEAD_HEATMAP_SIGMA]; the basis maps' stride is fixed there, their sigma the half.
STRIDE, BASIS_STRIDE = 2, 8
SIGMA, HEAD_SIGMA = 1.8, 0.01


@struct.dataclass
class Heatmaps:
    """The reference's three sets for one person."""

    keypoint: Float[Array, "J h2 w2"]  # `keypoint_heatmap`, stride 2
    head: Float[Array, "J h2 w2"]  # `head_heatmap`, 1 in the point's own pixel
    basis: Float[Array, "J h8 w8"]  # `p3_output_list`, stride 8


def person_heatmaps(
    points: Float[Array, "J 3"],
    size: tuple[int, int],
    *,
    sigma: float = SIGMA,
    head_sigma: float = HEAD_SIGMA,
) -> Heatmaps:
    """Returns the maps of one person.

    Args:
      points: x, y in input pixels, and a flag that is above 0 where there is a point.
      size: (h, w) of the padded input, multiples of 32.
      sigma, head_sigma: of the gaussians, in pixels of the map; half of `sigma` at
        stride 8.
    """
    return Heatmaps(
        keypoint=draw_gaussians(points, size, STRIDE, sigma),
        head=draw_gaussians(points, size, STRIDE, head_sigma),
        basis=draw_gaussians(points, size, BASIS_STRIDE, sigma / 2),
    )


def draw_gaussians(
    points: Float[Array, "J 3"], size: tuple[int, int], stride: int, sigma: float
) -> Float[Array, "J a b"]:
    """Returns a map per key point: a gaussian around its pixel, cut off as a square.

    The square reaches round(3 sigma) + 1 pixels. A point outside of the map, or
    without the flag, gives zeros. A point's pixel is the integer part of its place, so
    that one less than a pixel left of the map counts as inside, as in the reference.
    """
    h, w = size[0] // stride, size[1] // stride
    window = _window(sigma)
    reach = len(window) // 2
    pixel = jnp.trunc(points[:, :2] / stride).astype(jnp.int32)
    inside = _inside(pixel, (h, w)) & (points[:, 2] > 0)
    dy = jnp.arange(h)[None] - pixel[:, 1:] + reach  # [J, h]
    dx = jnp.arange(w)[None] - pixel[:, :1] + reach
    rows = (dy >= 0) & (dy < len(window)) & inside[:, None]
    columns = (dx >= 0) & (dx < len(window))
    table = jnp.asarray(window)
    last = len(window) - 1
    picked = table[jnp.clip(dy, 0, last)[:, :, None], jnp.clip(dx, 0, last)[:, None]]
    return jnp.where(rows[:, :, None] & columns[:, None], picked, 0.0)


def _window(sigma: float) -> Float[np.ndarray, "k k"]:
    """Returns the gaussian's values, made in float64 as there, as float32."""
    reach = int(np.round(3 * sigma)) + 1
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    square = x[None] ** 2 + x[:, None] ** 2
    with np.errstate(under="ignore"):
        return np.exp(-square / (2 * sigma**2)).astype(np.float32)


def _inside(pixel: Int[Array, "J 2"], size: tuple[int, int]) -> Bool[Array, "J"]:
    x, y = pixel[:, 0], pixel[:, 1]
    return (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])


def map_persons(
    function: Callable[[Heatmaps], T],
    points: Float[Array, "P J 3"],
    size: tuple[int, int],
    *,
    together: int = 1,
    sigma: float = SIGMA,
    head_sigma: float = HEAD_SIGMA,
) -> T:
    """Returns `function` of every person's maps, stacked; few maps exist at a time.

    Args:
      function: from one person's maps to something small, as a loss.
      together: persons whose maps exist at the same time.
    """

    def one(person: Float[Array, "J 3"]) -> T:
        maps = person_heatmaps(person, size, sigma=sigma, head_sigma=head_sigma)
        return function(maps)

    return jax.lax.map(one, points, batch_size=together)


def image_heatmap(
    points: Float[Array, "P J 3"], size: tuple[int, int], stride: int, sigma: float
) -> Float[Array, "J a b"]:
    """Returns the maximum over the persons of an image, zeros without any.

    One person's maps exist at a time.
    """
    start = jnp.zeros((points.shape[1], size[0] // stride, size[1] // stride))

    def add(image: Array, person: Array) -> tuple[Array, None]:
        return jnp.maximum(image, draw_gaussians(person, size, stride, sigma)), None

    return jax.lax.scan(add, start, points)[0]


def draw_exact_gaussians(
    points: Float[Array, "*n 3"], size: tuple[int, int], stride: int, sigma: float
) -> Float[Array, "*n a b"]:
    """Returns a map per key point like `draw_gaussians`, around the point's exact place.

    The reference's peak is the point's pixel, which loses up to half a pixel of the map;
    a network that learns this one can be asked for parts of a pixel. Points without the flag
    give zeros.
    """
    h, w = size[0] // stride, size[1] // stride
    reach = int(np.round(3 * sigma)) + 1

    def along(place: Array, length: int) -> Array:
        pixels = jnp.arange(length).reshape((1,) * place.ndim + (-1,))
        distance = pixels - (place[..., None] / stride - 0.5)
        value = jnp.exp(-jnp.square(distance) / (2 * sigma**2))
        return jnp.where(jnp.abs(distance) <= reach, value, 0.0)

    rows = along(points[..., 1], h) * (points[..., 2:] > 0)
    return rows[..., :, None] * along(points[..., 0], w)[..., None, :]
