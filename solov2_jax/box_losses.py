"""Masks learned from boxes: the box's projections, and neighbours of one colour alike.

Source: Tian et al. 2021, "BoxInst", AdelaiDet adet/modeling/condinst/dynamic_mask_head.py
(compute_project_term, compute_pairwise_term) and condinst.py (get_images_color_similarity).
Differences: both terms are means over the pairs of an object first, there the pairwise term
is one over the pixels of all objects; a pixel beyond the image is nobody's neighbour, there
its own neighbours in the image count; pixels are not cut to whole numbers before their colour
is converted.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

DILATION = 2  # mask-feature pixels between neighbours
EPSILON = 1e-5  # in the denominator of a projection's dice
# (rows, columns) to half of a pixel's eight neighbours; to them it is one of the other half.
OFFSETS = ((0, DILATION), (DILATION, -DILATION), (DILATION, 0), (DILATION, DILATION))
# sRGB's primaries in CIE XYZ, and its white, D65 for 2 degrees (IEC 61966-2-1).
_XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    np.float32,
)
_WHITE = np.array([[0.95047], [1.0], [1.08883]], np.float32)


def rgb_to_lab(rgb: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Returns CIE L*a*b* of sRGB values 0..255.

    Source: skimage.color.rgb2lab.
    """
    c = rgb.astype(jnp.float32) / 255.0
    # The larger argument keeps the power's gradient and value finite where it is not taken.
    linear = jnp.where(c > 0.04045, ((jnp.maximum(c, 0.04045) + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = jnp.einsum("...c,dc->...d", linear, _XYZ / _WHITE, precision="highest")
    f = jnp.where(xyz > 0.008856, jnp.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = jnp.moveaxis(f, -1, 0)
    return jnp.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


@jax.named_scope("color_edges")
def color_edges(
    image: Num[Array, "B h w C"],
    image_size: Int[Array, "B 2"],
    *,
    bgr: bool,
    threshold: float,
) -> Bool[Array, "B 4 h4 w4"]:
    """Returns which neighbours, at each of `OFFSETS`, have one colour and lie in the image.

    Args:
      image: 0..255. With three channels colours; else the lightness of each channel, and the
        distance is the root mean square over them.
      bgr: the channels are blue, green, red.
      threshold: least exp(-d / 2), d the distance in L*a*b*.
    """
    b, h, w, channels = image.shape
    blocks = image.astype(jnp.float32).reshape(b, h // 4, 4, w // 4, 4, channels)
    small = jnp.mean(blocks, axis=(2, 4))
    if channels == 3:
        color = rgb_to_lab(small[..., ::-1] if bgr else small)
    else:
        grey = jnp.broadcast_to(small[..., None], (*small.shape, 3))
        color = rgb_to_lab(grey)[..., 0] / math.sqrt(channels)
    # As the mask of the image that the reference reads at every fourth pixel from 2 on.
    rows, columns = (4 * jnp.arange(n // 4)[None] + 2 for n in (h, w))
    height, width = image_size[:, :1], image_size[:, 1:]
    inside = (rows < height)[:, :, None] & (columns < width)[:, None, :]

    def alike(offset: tuple[int, int]) -> Array:
        other = jnp.stack([_shifted(c, offset) for c in jnp.moveaxis(color, -1, 0)], axis=-1)
        distance = jnp.sqrt(jnp.sum(jnp.square(color - other), axis=-1))
        return (jnp.exp(-0.5 * distance) >= threshold) & inside & _shifted(inside, offset)

    return jnp.stack([alike(offset) for offset in OFFSETS], axis=1)


def _shifted(x: Array, offset: tuple[int, int]) -> Array:
    """Returns x at (row + dy, column + dx) of the last two axes, zero beyond them."""
    dy, dx = offset
    h, w = x.shape[-2:]
    pad = [(0, 0)] * (x.ndim - 2) + [(0, dy), (max(-dx, 0), max(dx, 0))]
    return jnp.pad(x, pad)[..., dy : dy + h, max(dx, 0) : max(dx, 0) + w]


def mask_terms(
    logits: Float[Array, "B P h4 w4"],
    instance: Int[Array, "B P"],
    of_images: tuple[UInt8[Array, "B G h4 w4"], Bool[Array, "B 4 h4 w4"]],
    inside: Bool[Array, "B h4 w4"] | None = None,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns each mask's projection term, 0..2, and its pairwise term: `pair_loss`'s terms.

    Args:
      instance: of each mask, which object's it is.
      of_images: the objects' filled boxes, and `color_edges`.
      inside: see `pair_loss`, which has made the logits beyond it small: that suffices here.
    """
    del inside
    masks, edges = of_images
    boxes = jnp.take_along_axis(masks, instance[:, :, None, None], axis=1).astype(jnp.float32)
    soft = jax.nn.sigmoid(logits)
    projection = jnp.zeros(logits.shape[:2], jnp.float32)
    for axis in (2, 3):
        x, t = jnp.max(soft, axis), jnp.max(boxes, axis)
        squares = jnp.sum(x * x, -1) + jnp.sum(t * t, -1) + EPSILON
        projection += 1.0 - 2.0 * jnp.sum(x * t, -1) / squares

    # -log(p q + (1 - p) (1 - q)) of the logits a, b: s(a) + s(b) - s(a + b), s the softplus.
    plus = jax.nn.softplus(logits)
    total = weights = jnp.zeros(logits.shape[:2], jnp.float32)
    for i, offset in enumerate(OFFSETS):
        differ = plus + _shifted(plus, offset)
        differ -= jax.nn.softplus(logits + _shifted(logits, offset))
        # Each pixel of the box has the neighbour, and is one of the neighbour's.
        weight = edges[:, None, i] * (boxes + _shifted(boxes, offset))
        total += jnp.sum(weight * differ, axis=(2, 3))
        weights += jnp.sum(weight, axis=(2, 3))
    return projection, total / jnp.maximum(weights, 1.0)
