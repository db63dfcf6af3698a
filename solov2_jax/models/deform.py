"""Deformable convolution, versions 1 and 2: bilinear gathers and one matrix product.

A column holds what the taps of a k x k kernel read for one pixel of the result: each tap
reads between four pixels, at its place in the grid plus an offset that the network predicts.
Columns are gathered row by row of the channels, which XLA does as fast as it copies them, on
every platform; the gradient of the input adds them up again with one scatter per corner.

Source: Dai et al., "Deformable Convolutional Networks", 2017; Zhu et al., "Deformable
ConvNets v2", 2018. Values and gradients are those of torchvision.ops.deform_conv2d.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax.models.grouped import columns_times_kernel

# Columns with more numbers are made one tap after the other, in a k * k-th of the memory.
MAX_COLUMN_NUMBERS = 2**24


@dataclasses.dataclass(frozen=True)
class Deform:
    """How a convolution is deformed.

    Attributes:
      version: 2 has a factor for every tap besides its offset, 1 has not.
      groups: equal parts of the input's channels with offsets of their own.
      bias: whether the convolution has a bias although a norm follows, as PaddleDetection's
        heads have.
    """

    version: int = 2
    groups: int = 1
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """What is the same for all levels: a static argument."""

    size: int  # k
    stride: int
    padding: int
    dilation: int
    groups: int  # of the convolution


def deform_conv2d(
    x: Float[Array, "B h w C"],
    kernel: Float[Array, "k k Cg D"],
    offset: Float[Array, "B H W _"],
    mask: Float[Array, "B H W _"] | None = None,
    **options: Any,
) -> Float[Array, "B H W D"]:
    """Returns `deform_conv2d_levels` of one level."""
    return deform_conv2d_levels([x], kernel, [(offset, mask)], **options)[0]


def deform_conv2d_levels(
    xs: Sequence[Float[Array, "B _ _ C"]],
    kernel: Float[Array, "k k Cg D"],
    offsets: Sequence[tuple[Float[Array, "B _ _ _"], Float[Array, "B _ _ _"] | None]],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
) -> list[Float[Array, "B _ _ D"]]:
    """Returns the deformable convolution of each level; pixels outside of it are zero.

    Args:
      kernel: of C / groups input channels.
      offsets: (offset, mask) of each level. The offset is (y, x) in pixels of the level for
        each tap, row by row, of each deformable group: 2 k k channels a group. Their number
        says how many deformable groups there are. The mask is a factor for each tap, k k
        channels a group; None: 1.
      padding: at every side; None: dilation * (k // 2), which keeps the size at stride 1.

    Raises:
      ValueError: for channels or sizes that do not fit together.

    Source: torchvision.ops.deform_conv2d, in NHWC and HWIO.
    """
    k = kernel.shape[0]
    geometry = _Geometry(
        size=k,
        stride=stride,
        padding=dilation * (k // 2) if padding is None else padding,
        dilation=dilation,
        groups=groups,
    )
    for x, (offset, mask) in zip(xs, offsets, strict=True):
        _check(x, kernel, offset, mask, geometry)
    moved = [offset for offset, _ in offsets]
    masks = None if offsets[0][1] is None else [mask for _, mask in offsets]
    return _deform_conv2d(list(xs), kernel, moved, masks, geometry)


def _check(x, kernel, offset, mask, geometry: _Geometry) -> None:
    k, channels = geometry.size, x.shape[-1]
    deform_groups, rest = divmod(offset.shape[-1], 2 * k * k)
    if rest or not deform_groups or channels % deform_groups:
        raise ValueError(
            f"offset has {offset.shape[-1]} channels: give 2 * {k} * {k} for each of some "
            f"groups that divide {channels} channels"
        )
    if mask is not None and mask.shape[-1] != deform_groups * k * k:
        raise ValueError(f"mask has {mask.shape[-1]} channels, not {deform_groups * k * k}")
    if kernel.shape[2] * geometry.groups != channels or kernel.shape[3] % geometry.groups:
        raise ValueError(
            f"kernel {kernel.shape} does not fit {channels} channels in {geometry.groups} groups"
        )
    sides = [
        (n + 2 * geometry.padding - geometry.dilation * (k - 1) - 1) // geometry.stride + 1
        for n in x.shape[1:3]
    ]
    if list(offset.shape[1:3]) != sides:
        raise ValueError(f"offset is {offset.shape[1:3]} large, the result {tuple(sides)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _deform_conv2d(xs, kernel, offsets, masks, geometry: _Geometry) -> list[jax.Array]:
    return _forward(xs, kernel, offsets, masks, geometry)


def _deform_conv2d_fwd(xs, kernel, offsets, masks, geometry):
    return _forward(xs, kernel, offsets, masks, geometry), (xs, kernel, offsets, masks)


def _deform_conv2d_bwd(geometry, residuals, grads):
    xs, kernel, offsets, masks = residuals
    return _backward(xs, kernel, offsets, masks, grads, geometry)


_deform_conv2d.defvjp(_deform_conv2d_fwd, _deform_conv2d_bwd)

# Shapes below: T taps, G deformable groups, N pixels of the results over levels and images,
# R rows of C / G channels: one per pixel of the inputs and deformable group.


class _Places(NamedTuple):
    """Where the N pixels of the results lie: int32 [N] each.

    `top` and `left` are those of the first tap, `base` is the first row (of R / G) of the
    pixel's image, `height` and `width` are its level's.
    """

    top: jax.Array
    left: jax.Array
    base: jax.Array
    height: jax.Array
    width: jax.Array


def _pixels(xs: Sequence[jax.Array], offsets: Sequence[jax.Array], geometry: _Geometry) -> _Places:
    levels, rows = [], 0
    for x, offset in zip(xs, offsets, strict=True):
        (b, h, w, _), sides = x.shape, offset.shape[:3]
        image, row, column = (
            lax.broadcasted_iota(jnp.int32, sides, axis).reshape(-1) for axis in range(3)
        )
        level = _Places(
            top=row * geometry.stride - geometry.padding,
            left=column * geometry.stride - geometry.padding,
            base=rows + image * (h * w),
            height=jnp.full_like(row, h),
            width=jnp.full_like(row, w),
        )
        levels.append(level)
        rows += b * h * w
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *levels)


def _join(levels: Sequence[jax.Array], last: int) -> jax.Array:
    """Returns the pixels of all levels one after the other, [_, last]."""
    return jnp.concatenate([x.reshape(-1, last) for x in levels])


def _part(joined: jax.Array, likes: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns what `_join` joined, with the first three sides of `likes`."""
    parts, start = [], 0
    for like in likes:
        count = like.shape[0] * like.shape[1] * like.shape[2]
        parts.append(joined[start : start + count].reshape(*like.shape[:3], -1))
        start += count
    return parts


def _taps(offsets: Sequence[jax.Array], masks: Sequence[jax.Array] | None, geometry, pixels):
    """Returns (y, x, factor), float32 [T, N, G] each: where a tap reads, and its factor.

    `y` and `x` are clipped to where nothing is read any more.
    """
    k = geometry.size
    channels = offsets[0].shape[-1]
    groups = channels // (2 * k * k)
    moved = _join(offsets, channels).astype(jnp.float32).reshape(-1, groups, k * k, 2)
    moved = moved.transpose(3, 2, 0, 1)  # [2, T, N, G]
    row, column = np.indices((k, k), np.int32).reshape(2, -1, 1, 1) * geometry.dilation

    def place(n: int, start: jax.Array, step: np.ndarray, length: jax.Array) -> jax.Array:
        grid = (start[None, :, None] + step).astype(jnp.float32)
        high = (length[None, :, None] + 1).astype(jnp.float32)
        return jnp.minimum(jnp.maximum(moved[n] + grid, -2.0), high)

    y = place(0, pixels.top, row, pixels.height)
    x = place(1, pixels.left, column, pixels.width)
    if masks is None:
        return y, x, jnp.ones_like(y)
    factor = _join(masks, groups * k * k).astype(jnp.float32).reshape(-1, groups, k * k)
    return y, x, factor.transpose(2, 0, 1)


def _corners(y: jax.Array, x: jax.Array, pixels: _Places):
    """Returns ((row of R, 1 if it is in the image else 0, dy, dx), ...) of four corners.

    dy and dx are the shares of a corner along each axis: its weight is their product. Arrays
    are [T, N, G] as `y` and `x` are.
    """
    groups = y.shape[2]
    base, height, width = (n[None, :, None] for n in (pixels.base, pixels.height, pixels.width))
    low_y, low_x = jnp.floor(y), jnp.floor(x)
    group = jnp.arange(groups, dtype=jnp.int32)[None, None]
    corners = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        # Of NaN, any number.
        iy, ix = low_y.astype(jnp.int32) + i, low_x.astype(jnp.int32) + j
        inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        at = jnp.clip(iy, 0, height - 1) * width + jnp.clip(ix, 0, width - 1)
        dy, dx = (y - low_y) if i else (low_y + 1 - y), (x - low_x) if j else (low_x + 1 - x)
        corners.append(((base + at) * groups + group, inside.astype(jnp.float32), dy, dx))
    return corners


def _read(rows: Float[Array, "R c"], at: Int[Array, "T N G"]) -> Float[Array, "T N G c"]:
    return rows.at[at].get(mode="promise_in_bounds")


def _columns(rows: jax.Array, corners: Sequence) -> Float[Array, "T N G c"]:
    """Returns what the taps read, in float32, without their factors."""
    parts = [(dy * dx * inside)[..., None] * _read(rows, at) for at, inside, dy, dx in corners]
    return functools.reduce(jnp.add, parts)


def _in_chunks(of_taps, numbers: int, carry, arrays):
    """Returns `lax.scan` of `of_taps(carry, arrays [t, ...])` over taps: all at once, t = T,
    or one at a time where the columns would have too many numbers."""
    taps = arrays[0].shape[0]
    chunk = taps if numbers <= MAX_COLUMN_NUMBERS else 1
    arrays = jax.tree.map(lambda a: a.reshape(taps // chunk, chunk, *a.shape[1:]), arrays)
    if chunk == taps:
        carry, out = of_taps(carry, jax.tree.map(lambda a: a[0], arrays))
        return carry, out
    carry, out = lax.scan(of_taps, carry, arrays)
    return carry, jax.tree.map(lambda a: a.reshape(taps, *a.shape[2:]), out)


def _arrays(xs, kernel, offsets, masks, geometry: _Geometry):
    """Returns (rows [R, c], pixels, (y, x, factor, kernel [T, Cg, D]))."""
    k, channels = geometry.size, xs[0].shape[-1]
    pixels = _pixels(xs, offsets, geometry)
    y, x, factor = _taps(offsets, masks, geometry, pixels)
    kernel = kernel.astype(xs[0].dtype).reshape(k * k, *kernel.shape[2:])
    return _join(xs, channels // y.shape[2]), pixels, (y, x, factor, kernel)


def _forward(xs, kernel, offsets, masks, geometry: _Geometry) -> list[jax.Array]:
    channels = xs[0].shape[-1]
    rows, pixels, arrays = _arrays(xs, kernel, offsets, masks, geometry)
    taps, number, _ = arrays[0].shape

    def of_taps(total, arrays):
        y, x, factor, weights = arrays
        columns = _columns(rows, _corners(y, x, pixels)) * factor[..., None]
        columns = columns.reshape(*columns.shape[:2], channels).astype(rows.dtype)
        return total + columns_times_kernel(columns, weights, geometry.groups), ()

    total = jnp.zeros((number, kernel.shape[-1]), rows.dtype)
    total, _ = _in_chunks(of_taps, taps * number * channels, total, arrays)
    return _part(total, offsets)


def _backward(xs, kernel, offsets, masks, grads, geometry: _Geometry):
    """Returns the gradients of xs, kernel, offsets and masks.

    A tap that reads at y between two rows has the derivative (lower - upper) of what it reads
    along y, where a corner outside of the image is zero, as in torchvision.
    """
    channels = xs[0].shape[-1]
    rows, pixels, arrays = _arrays(xs, kernel, offsets, masks, geometry)
    taps, number, _ = arrays[0].shape
    grad = _join(grads, kernel.shape[-1]).astype(rows.dtype)

    def of_taps(total, arrays):
        y, x, factor, weights = arrays
        corners = _corners(y, x, pixels)
        columns = _columns(rows, corners)
        scaled = (columns * factor[..., None]).reshape(*y.shape[:2], channels)
        product = functools.partial(columns_times_kernel, groups=geometry.groups)
        _, pull_back = jax.vjp(product, scaled.astype(rows.dtype), weights)
        d_columns, d_weights = pull_back(grad)
        d_columns = d_columns.astype(jnp.float32).reshape(*y.shape, -1)
        d_factor = jnp.sum(d_columns * columns, -1)
        d_columns = d_columns * factor[..., None]
        d_y = d_x = jnp.zeros_like(y)
        for n, (at, inside, dy, dx) in enumerate(corners):
            total = total.at[at].add((dy * dx * inside)[..., None] * d_columns)
            along = jnp.sum(d_columns * _read(rows, at), -1) * inside
            d_y += (1 if n >= 2 else -1) * dx * along
            d_x += (1 if n % 2 else -1) * dy * along
        return total, (d_weights, d_y, d_x, d_factor)

    total = jnp.zeros(rows.shape, jnp.float32)
    d_rows, of_taps_grads = _in_chunks(of_taps, taps * number * channels, total, arrays)
    d_weights, d_y, d_x, d_factor = of_taps_grads
    # [T, N, G, ...] -> [N, G, T, ...]
    d_offset = jnp.stack([d_y, d_x], -1).transpose(1, 2, 0, 3).reshape(number, -1)
    d_mask = d_factor.transpose(1, 2, 0).reshape(number, -1)

    def parts(joined, likes, arrays):
        return [p.astype(a.dtype) for p, a in zip(_part(joined, likes), arrays, strict=True)]

    return (
        parts(d_rows.reshape(-1, channels), xs, xs),
        d_weights.reshape(kernel.shape).astype(kernel.dtype),
        parts(d_offset, offsets, offsets),
        None if masks is None else parts(d_mask, offsets, masks),
    )
