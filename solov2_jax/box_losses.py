"""Masks learned from boxes: the box's projections, and neighbours of one colour alike.

Source: Tian et al. 2021, "BoxInst", AdelaiDet adet/modeling/condinst/dynamic_mask_head.py
(compute_project_term, compute_pairwise_term) and condinst.py (get_images_color_similarity).
Differences: both terms are means over the pairs of an object first, there the pairwise term
is one over the pixels of all objects; a pixel beyond the image is nobody's neighbour, there
its own neighbours in the image count; pixels are not cut to whole numbers before their colour
is converted.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from solov2_jax.platforms import PlatformOp, Tuning

DILATION = 2  # mask-feature pixels between neighbours
EPSILON = 1e-5  # in the denominator of a projection's dice
# (rows, columns) to half of a pixel's eight neighbours; to them it is one of the other half.
OFFSETS = ((0, DILATION), (DILATION, -DILATION), (DILATION, 0), (DILATION, DILATION))
# sRGB's primaries in CIE XYZ, and its white, D65 for 2 degrees (IEC 61966-2-1).
_XYZ = np.float32(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_WHITE = np.float32([[0.95047], [1.0], [1.08883]])


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
    boxes: Float[Array, "B P h4 w4"],
    edges: Bool[Array, "B 4 h4 w4"],
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns each mask's projection term, 0..2, and its pairwise term.

    Args:
      boxes: 1 in the box of each mask's object, else 0.
      edges: `color_edges` of the images.
    """
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


@jax.custom_vjp
def box_loss(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    edges: Bool[Array, "B 4 h4 w4"],
    pair_instance: Int[Array, "B P"],
    pair_weight: Float[Array, "B P"],
    factors: Float[Array, "2"],
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """Returns the weighted sum over pairs of both terms, times their factors and added, and
    each sum without its factor (no gradient).

    The masks of a few pairs are made at a time, and their gradient with them.

    Args:
      masks: the filled boxes.
      pair_weight: 0 of pairs that are not looked at.
      factors: of the projection and of the pairwise term.
    """
    return _box_loss_fwd(kernels, mask_feat, masks, edges, pair_instance, pair_weight, factors)[0]


def _box_loss_fwd(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    edges: Bool[Array, "B 4 h4 w4"],
    pair_instance: Int[Array, "B P"],
    pair_weight: Float[Array, "B P"],
    factors: Float[Array, "2"],
) -> tuple[tuple[Float[Array, ""], Float[Array, "2"]], Sequence[Array]]:
    loss, terms, grad_kernels, grad_feat = _box_sums(
        kernels, mask_feat, masks, edges, pair_instance, pair_weight, factors
    )
    return (loss, terms), (grad_kernels, grad_feat)


def _box_loss_bwd(
    residuals: Sequence[Array], cotangents: tuple[Float[Array, ""], Float[Array, "2"]]
) -> tuple[Array, Array, None, None, None, None, None]:
    grad_kernels, grad_feat = (g * cotangents[0].astype(g.dtype) for g in residuals)
    return grad_kernels, grad_feat, None, None, None, None, None


box_loss.defvjp(_box_loss_fwd, _box_loss_bwd)


@jax.named_scope("box_loss")
def _box_sums_in_chunks(
    kernels: Float[Array, "B P E"],
    mask_feat: Float[Array, "B h4 w4 E"],
    masks: UInt8[Array, "B G h4 w4"],
    edges: Bool[Array, "B 4 h4 w4"],
    pair_instance: Int[Array, "B P"],
    pair_weight: Float[Array, "B P"],
    factors: Float[Array, "2"],
    *,
    tuning: Tuning,
) -> tuple[Float[Array, ""], Float[Array, "2"], Float[Array, "B P E"], Float[Array, "B h4 w4 E"]]:
    """Returns `box_loss`'s two results, and the gradients of kernels and features."""
    b, num_pairs, _ = kernels.shape
    pixels = b * mask_feat.shape[1] * mask_feat.shape[2] * (len(OFFSETS) + 1)
    size = max(1, min(num_pairs, tuning.dice_logits // pixels))
    missing = -num_pairs % size
    # The pairs that count first: the chunks of the others are left out where that saves time.
    order = jnp.argsort(pair_weight <= 0, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, missing)))
    real = jnp.arange(num_pairs + missing)[None] < num_pairs
    weight = jnp.take_along_axis(pair_weight, order, axis=1) * real
    instance = jnp.take_along_axis(pair_instance, order, axis=1)
    sorted_kernels = jnp.take_along_axis(kernels, order[..., None], axis=1)

    def chunk_loss(kernels, feat, instance, weight):
        logits = jnp.einsum("bpe,bhwe->bphw", kernels, feat, preferred_element_type=jnp.float32)
        boxes = jnp.take_along_axis(masks, instance[:, :, None, None], axis=1)
        terms = mask_terms(logits, boxes.astype(jnp.float32), edges)
        sums = jnp.stack([jnp.sum(weight * term) for term in terms])
        return jnp.sum(factors * sums), sums

    gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

    def body(i, carry):
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

        loss, sums, grad_kernels, grad_feat = carry
        (value, terms), grads = gradient(cut(sorted_kernels), mask_feat, cut(instance), cut(weight))
        put = jax.lax.dynamic_update_slice_in_dim
        grad_kernels = put(grad_kernels, grads[0].astype(jnp.float32), i * size, axis=1)
        return loss + value, sums + terms, grad_kernels, grad_feat + grads[1]

    zeros = jnp.zeros(sorted_kernels.shape, jnp.float32), jnp.zeros(mask_feat.shape, jnp.float32)
    carry = jnp.float32(0), jnp.zeros(2, jnp.float32), *zeros
    last = (num_pairs + missing) // size
    if len(tuning.slot_parts) > 1:  # the host may wait for the number
        last = (jnp.max(jnp.sum(weight > 0, axis=1)) + size - 1) // size
    loss, sums, sorted_grads, grad_feat = jax.lax.fori_loop(0, last, body, carry)
    grad_kernels = jnp.zeros(kernels.shape, jnp.float32)
    grad_kernels = grad_kernels.at[jnp.arange(b)[:, None], order].add(
        sorted_grads * real[..., None]
    )
    return loss, sums, grad_kernels.astype(kernels.dtype), grad_feat.astype(mask_feat.dtype)


_box_sums = PlatformOp.tuned("box_sums", _box_sums_in_chunks)
