"""Primitives with torch's semantics, in forms that are fast forward and backward.

Gathers differentiate into scatters, which XLA runs slowly; here resizes are slices
(factor 2) or products with a small matrix (any other size).

`extent`, where a function takes it, makes one compiled shape serve images of any smaller
size: (height, width) of each image's own map at the top left of the array, int32 [B, 2].
The result within it is that of an array of exactly that size, whatever finite values the
rest of the array holds; None: the map is the whole array.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

# Of the coarsest features: padded sides are multiples of it, as `data.buckets.STRIDE` says to
# processes without JAX.
STRIDE = 32


def inside(extent: Int[Array, "B 2"], h: int, w: int) -> Bool[Array, "B h w"]:
    """Returns which pixels of arrays [h, w] belong to each image's own map."""
    rows = jnp.arange(h)[None, :, None] < extent[:, 0, None, None]
    return rows & (jnp.arange(w)[None, None, :] < extent[:, 1, None, None])


def at_stride(extent: Int[Array, "B 2"] | None, stride: int) -> Int[Array, "B 2"] | None:
    """Returns the extent of a map at `stride`, a power of two, rounded up.

    A shift: for a division XLA writes the signs' cases out in every kernel that uses it.
    """
    if extent is None:
        return None
    return lax.shift_right_logical(extent + (stride - 1), stride.bit_length() - 1)


def dynamic_conv(
    kernels: Float[Array, "B P E"], features: Float[Array, "B h w E"]
) -> Float[Array, "B P h w"]:
    """Returns the mask logits: the dynamic 1x1 convolution of each image by its own kernels.

    Source: AdelaiDet adet/modeling/solov2/solov2.py, `F.conv2d(seg_preds, kernel_preds)`,
    image by image there.
    """
    return jnp.einsum("bpe,bhwe->bphw", kernels, features, preferred_element_type=jnp.float32)


def zero_outside(
    x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None
) -> Float[Array, "B h w C"]:
    """Returns `x` with 0 beyond each image's own map: what a convolution pads it with."""
    if extent is None:
        return x
    return jnp.where(inside(extent, *x.shape[1:3])[..., None], x, 0)


def padded_extent(image_size: Int[Array, "B 2"]) -> Int[Array, "B 2"]:
    """Returns (height, width) of images that are padded to multiples of `STRIDE`."""
    shift = STRIDE.bit_length() - 1
    return lax.shift_right_logical(image_size + (STRIDE - 1), shift) * STRIDE


def logits_inside(
    logits: Float[Array, "B n h w"], inside: Bool[Array, "B h w"] | None
) -> Float[Array, "B n h w"]:
    """Returns masks' logits with a probability of 0, and no gradient, beyond each image's own
    map; `inside` as the function of this name returns it, None: it is the whole array."""
    return logits if inside is None else jnp.where(inside[:, None], logits, -1e4)


def normalize_image(
    image: Num[Array, "B h w c"],
    image_size: Int[Array, "B 2"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "B h w c"]:
    """Returns (image - mean) / std in float32, and 0 beyond each image's size.

    Args:
      image: pixel values 0..255 of c channels, padded at the right and bottom.
      image_size: (height, width) before padding.

    Source: adet/modeling/solov2/solov2.py, SOLOv2.preprocess_image: normalise first,
    pad second, so that a padded pixel is the mean colour.
    """
    shift, scale = (np.asarray(c, np.float32)[None, None, None] for c in (mean, std))
    return zero_outside((image.astype(jnp.float32) - shift) / scale, image_size)


def coord_grid(h: int, w: int) -> np.ndarray:
    """Returns (x, y) at every cell, -1 to 1 with the ends included: float32 [h, w, 2].

    A single row or column is -1, as torch.linspace gives.
    Source: adet/modeling/solov2/solov2.py, SOLOv2InsHead.forward.
    """
    x, y = np.linspace(-1, 1, w), np.linspace(-1, 1, h)
    return np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)


def coord_grid_within(extent: Int[Array, "B 2"], h: int, w: int) -> Float[Array, "B h w 2"]:
    """Returns `coord_grid` of each image's own map, at the top left of [h, w]."""

    def axis(size: Int[Array, "B"], length: int) -> Float[Array, "B _"]:
        intervals = size[:, None] - 1
        steps = 2 * jnp.arange(length)[None] - intervals  # one rounding: the division's
        return jnp.where(intervals > 0, steps / jnp.maximum(intervals, 1), -1.0)

    y, x = axis(extent[:, 0], h)[:, :, None], axis(extent[:, 1], w)[:, None]
    return jnp.stack(jnp.broadcast_arrays(x, y), axis=-1)


@functools.lru_cache(maxsize=256)
def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Returns the float32 matrix [size_out, size_in] of a bilinear resize of one axis.

    Half-pixel centres, edges clamped, never antialiased.
    Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    # One rounding, as the fused multiply-add in torch's kernel has.
    source = np.float32(scale * (np.arange(size_out) + 0.5) - 0.5)
    source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    weight = source - low.astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def bilinear_matrix_within(
    size_in: Int[Array, "B"], size_out: Int[Array, "B"], columns: int, rows: int
) -> Float[Array, "B rows columns"]:
    """Returns `bilinear_matrix(size_in, size_out)` at the top left of [rows, columns].

    For sizes below 2048 it is equal in every bit. Rows beyond `size_out` are weights of
    columns within `size_in` too.
    """
    scale = size_in.astype(jnp.float32) / size_out.astype(jnp.float32)
    # The product has one rounding there. Here the scale's upper 12 bits (Veltkamp's
    # splitting) times a half integer of 12 bits is exact, and so is what is taken from it.
    spread = scale * 4097.0
    upper = (spread - (spread - scale))[:, None]
    middle = (jnp.arange(rows, dtype=jnp.float32) + 0.5)[None]
    source = jnp.maximum((upper * middle - 0.5) + (scale[:, None] - upper) * middle, 0.0)
    last = size_in[:, None] - 1
    low = jnp.minimum(jnp.floor(source).astype(jnp.int32), last)
    high = jnp.minimum(low + 1, last)
    weight = (source - low.astype(jnp.float32))[..., None]
    # Beyond `size_out` the source may lie beyond the last column.
    weight = jnp.minimum(weight, 1.0)
    column = jnp.arange(columns)[None, None]
    at_low, at_high = column == low[..., None], column == high[..., None]
    return jnp.where(at_low, 1 - weight, 0.0) + jnp.where(at_high, weight, 0.0)


def resize_bilinear(
    x: Float[Array, "B h w C"],
    size: tuple[int, int],
    extent: Int[Array, "B 2"] | None = None,
    extent_out: Int[Array, "B 2"] | None = None,
) -> Float[Array, "B H W C"]:
    """Returns `x` at `size`, as `bilinear_matrix` does along each axis, computed in float32.

    Args:
      extent_out: of the result, beside `extent`; None: `size`.
    """
    (b, h, w, _), dtype = x.shape, x.dtype
    x = x.astype(jnp.float32)
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    if extent is not None:
        if extent_out is None:
            extent_out = jnp.broadcast_to(jnp.array(size, jnp.int32)[None], (b, 2))
        rows, columns = (
            bilinear_matrix_within(extent[:, i], extent_out[:, i], x.shape[1 + i], size[i])
            for i in range(2)
        )
        x = dot("bgh,bhwc->bgwc", rows, x)
        return dot("bgw,bhwc->bhgc", columns, x).astype(dtype)
    if h != size[0]:
        x = dot("gh,bhwc->bgwc", jnp.asarray(bilinear_matrix(h, size[0])), x)
    if w != size[1]:
        x = dot("gw,bhwc->bhgc", jnp.asarray(bilinear_matrix(w, size[1])), x)
    return x.astype(dtype)


def conv2d(
    x: Float[Array, "B h w C"], kernel: Float[Array, "k k C D"], stride: int = 1
) -> Float[Array, "B _ _ D"]:
    """Returns the convolution of `x`, padded by k // 2 on every side.

    Source: torch.nn.Conv2d. "SAME" padding would shift stride-2 convolutions by a pixel.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _neighbours(
    x: jax.Array, axis: int, extent: Int[Array, "B 2"] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns, for every element, the ones before and after it; ends are repeated."""
    size = x.shape[axis]
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    last = lax.slice_in_dim(x, size - 1, size, axis=axis)
    before = lax.concatenate([first, lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
    after = lax.concatenate([lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
    if extent is not None:
        shape = [1] * x.ndim
        shape[axis] = size
        end = extent[:, axis - 1].reshape(-1, *[1] * (x.ndim - 1)) - 1
        after = jnp.where(jnp.arange(size).reshape(shape) == end, x, after)
    return before, after


def _upsample2x_axis(x: jax.Array, axis: int, extent: Int[Array, "B 2"] | None = None) -> jax.Array:
    before, after = _neighbours(x, axis, extent)
    parts = [0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after]
    return _interleave(parts, axis)


def _upsample4x_axis(x: jax.Array, axis: int, extent: Int[Array, "B 2"] | None = None) -> jax.Array:
    before, after = _neighbours(x, axis, extent)
    parts = [share * before + (1 - share) * x for share in (0.375, 0.125)]
    parts += [(1 - share) * x + share * after for share in (0.125, 0.375)]
    return _interleave(parts, axis)


def _interleave(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    shape = parts[0].shape
    sides = (*shape[:axis], len(parts) * shape[axis], *shape[axis + 1 :])
    return jnp.stack(parts, axis + 1).reshape(sides)


def upsample2x_bilinear(
    x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
) -> Float[Array, "B 2*h 2*w C"]:
    """Returns `resize_bilinear(x, (2 * h, 2 * w))`, by shifts and no gather."""
    return _upsample2x_axis(_upsample2x_axis(x, 1, extent), 2, extent)


def upsample4x_bilinear(
    x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
) -> Float[Array, "B 4*h 4*w C"]:
    """Returns `resize_bilinear(x, (4 * h, 4 * w))`, by shifts and no gather."""
    return _upsample4x_axis(_upsample4x_axis(x, 1, extent), 2, extent)


def upsample2x_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    """Returns `x` with each pixel repeated 2x2.

    Source: detectron2/modeling/backbone/fpn.py, FPN.forward (top-down path).
    """
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def downsample2x_bilinear(x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ C"]:
    """Returns `x` halved bilinearly: the mean of 2x2 when both sides are even.

    Source: F.interpolate(scale_factor=0.5) in adet/modeling/solov2/solov2.py,
    split_feats; an odd side is floored, and sampled with the given scale factor.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def max_pool_3x3_stride2(x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ C"]:
    """Returns the 3x3 maximum at stride 2, padded by one with -inf.

    Within an even extent no result looks beyond it.

    Source: detectron2/modeling/backbone/resnet.py, BasicStem.forward.
    """
    for axis in (1, 2):
        out = (x.shape[axis] + 1) // 2
        pad = [(0, 0, 0)] * 4
        pad[axis] = (1, 2 * out - x.shape[axis], 0)
        padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), pad)
        x = functools.reduce(
            jnp.maximum,
            (lax.slice_in_dim(padded, i, i + 2 * out - 1, 2, axis) for i in range(3)),
        )
    return x


@functools.partial(jax.jit, static_argnames=("groups", "epsilon"))
def group_norm(
    x: Float[Array, "B h w C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    groups: int,
    epsilon: float = 1e-5,
    extent: Int[Array, "B 2"] | None = None,
) -> Float[Array, "B h w C"]:
    """Returns group normalisation, statistics in float32 over (h, w, C / groups).

    Sums per channel come first and are grouped afterwards: one pass over `x` whose
    innermost axis stays the channels. One value of the group is taken off before: E[x^2] -
    E[x]^2 of what is left keeps its digits where a mean is many times the spread.
    """
    b, h, w, c = x.shape
    x32 = x.astype(jnp.float32)
    pixels = h * w if extent is None else (extent[:, 0] * extent[:, 1])[:, None, None]

    def grouped_mean(counted):  # [B, h, w, C] -> [B, C], equal within a group
        total = counted.sum((1, 2)).reshape(b, groups, c // groups)
        mean = total.sum(-1, keepdims=True) / (pixels * (c // groups))
        return jnp.broadcast_to(mean, total.shape).reshape(b, c)

    rest = x32 - group_pilot(x32, groups)[:, None, None]
    counted = zero_outside(rest, extent)
    mean = grouped_mean(counted)
    variance = grouped_mean(jnp.square(counted)) - jnp.square(mean)
    factor = scale[None] * lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    normed = (rest - mean[:, None, None]) * factor[:, None, None]
    return (normed + bias[None, None, None]).astype(x.dtype)


def group_pilot(x: Float[Array, "B h w C"], groups: int) -> Float[Array, "B C"]:
    """Returns one value of each group, off the border, where padding makes others unlike."""
    b, h, w, c = x.shape
    of_group = x[:, min(1, h - 1), min(1, w - 1), :: c // groups]
    values = jnp.broadcast_to(of_group[..., None], (b, groups, c // groups)).reshape(b, c)
    return lax.stop_gradient(values)
