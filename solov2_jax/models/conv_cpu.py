"""Convolutions in the forms that are fast on a CPU, and their gradients.

XLA's own filter gradient is 3 to 25 times slower there than its forward pass, so
`conv2d_cpu_grads` has hand-written ones:

* 1x1: matrix products, forward and backward;
* wide 3x3 at stride 1: Winograd's minimal filtering, forward and backward;
* everything else: XLA's convolution forward and for the input's gradient, and one
  matrix product per filter tap for the filter's.

`benchmarks/README.md` has the measurements behind the choice.

Winograd's F(4x4, 3x3): a tile of 4x4 outputs takes 36 products for each pair of
channels instead of 144. The products are one batched matrix product; the transforms
around it are additions.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2015,
equations 12 to 19, for the points 0, +-2/3, +-3/2 and infinity. Their 0, +-1, +-2 round
more than twice as much: with these the error is about 1e-6 of the result's spread,
which float32 bears and bfloat16 does not.

Shapes: T tiles, C and D channels; a plane is one image of one level.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from solov2_jax import ops

# With fewer channels (on either side, and their product) or tiles, the transforms cost
# more than the products they save. A kernel transformed once needs fewer tiles.
WINOGRAD_MIN_CHANNELS = 64
WINOGRAD_MIN_PAIRS = 128 * 128
WINOGRAD_MIN_TILES = 64
TRANSFORMED_MIN_TILES = 16
# For the filter's gradient, where XLA's own form is far slower.
WINOGRAD_GRAD_MIN_CHANNELS = 64
WINOGRAD_GRAD_MIN_TILES = 32

Plane = Float[Array, "_ _ _ _"]  # [B, h, w, channels]
Levels = Sequence[Plane]  # of one batch, with a size of their own each
Kernel = Float[Array, "k k C D"]
Matrix = Sequence[Sequence[float | int]]  # a small constant one


def conv2d_cpu(xs: Levels, kernel: Kernel, stride: int) -> list[Plane]:
    """Returns `ops.conv2d` of each level, in the form that is fastest on a CPU."""
    if kernel.shape[0] == 1:
        return [_pointwise(x[:, ::stride, ::stride], kernel[0, 0]) for x in xs]
    if uses_winograd(xs, kernel, stride):
        return winograd_conv(xs, winograd_filter(kernel))
    return [ops.conv2d(x, kernel, stride) for x in xs]


def conv2d_cpu_grads(
    xs: Levels, kernel: Kernel, stride: int, grads: Levels
) -> tuple[list[Plane], Kernel]:
    """Returns the gradients of the levels and of the kernel, of those of the results."""
    if kernel.shape[0] == 1:
        return _pointwise_grads(xs, kernel, stride, grads)
    if uses_winograd(xs, kernel, stride):
        weights = winograd_filter(kernel)
        return winograd_input_grad(grads, weights), winograd_filter_grad(xs, grads)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dxs = [
        ops.conv2d(_spread(g, stride, *x.shape[1:3]), flipped)
        for x, g in zip(xs, grads, strict=True)
    ]
    if uses_winograd_for_filter_grad(xs, kernel, stride):
        return dxs, winograd_filter_grad(xs, grads)
    taps = [_tap_filter_grad(x, g, kernel.shape[0], stride) for x, g in zip(xs, grads, strict=True)]
    return dxs, functools.reduce(jnp.add, taps)


def uses_winograd(
    xs: Levels, kernel: Kernel, stride: int, min_tiles: int = WINOGRAD_MIN_TILES
) -> bool:
    """Returns whether Winograd's form is fastest, forward and for the input's gradient."""
    pairs = kernel.shape[2] * kernel.shape[3]
    wide = min(kernel.shape[2:]) >= WINOGRAD_MIN_CHANNELS and pairs >= WINOGRAD_MIN_PAIRS
    return wide and _has_tiles(xs, kernel, stride, min_tiles)


def uses_winograd_for_filter_grad(xs: Levels, kernel: Kernel, stride: int) -> bool:
    """Returns whether Winograd's form is fastest for the filter's gradient."""
    wide = min(kernel.shape[2:]) >= WINOGRAD_GRAD_MIN_CHANNELS
    return wide and _has_tiles(xs, kernel, stride, WINOGRAD_GRAD_MIN_TILES)


def _has_tiles(xs: Levels, kernel: Kernel, stride: int, min_tiles: int) -> bool:
    enough = sum(count_tiles(x.shape) for x in xs) >= min_tiles
    float32 = xs[0].dtype == jnp.float32
    return kernel.shape[0] == 3 and stride == 1 and enough and float32


def _pointwise(x: Float[Array, "*n C"], matrix: Float[Array, "C D"]) -> Float[Array, "*n D"]:
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


def _spread(g: Plane, stride: int, h: int, w: int) -> Plane:
    """Returns planes [h, w] of zeros with `g` at every stride-th pixel."""
    if stride == 1:
        return g
    pad = [
        (0, size - (n - 1) * stride - 1, stride - 1)
        for size, n in zip((h, w), g.shape[1:3], strict=True)
    ]
    return lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *pad, (0, 0, 0)])


def _pointwise_grads(
    xs: Levels, kernel: Kernel, stride: int, grads: Levels
) -> tuple[list[Plane], Kernel]:
    dxs, dw = [], jnp.zeros(kernel.shape[2:], kernel.dtype)
    for x, g in zip(xs, grads, strict=True):
        dxs.append(_spread(_pointwise(g, kernel[0, 0].T), stride, *x.shape[1:3]))
        dw += _outer(x[:, ::stride, ::stride], g)
    return dxs, dw[None, None]


def _outer(x: Plane, g: Plane) -> Float[Array, "C D"]:
    """Returns the sum over pixels of x g^T, as a product of two plain matrices."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tap_filter_grad(x: Plane, g: Plane, k: int, stride: int) -> Kernel:
    """Returns the kernel's gradient by one product per filter tap.

    XLA's own form takes 3 to 25 times as long.
    """
    pad = k // 2
    _, oh, ow, _ = g.shape
    xp = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def tap(i, j):
        rows = slice(i, i + (oh - 1) * stride + 1, stride)
        cols = slice(j, j + (ow - 1) * stride + 1, stride)
        return _outer(xp[:, rows, cols], g)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(k)]) for i in range(k)])


# --- Winograd's minimal filtering F(4x4, 3x3) ---------------------------------------

# Tiles that are transformed together: their 36 matrices stay in the cache between the
# transform and the product. A larger input is gone through in strips of tile rows.
STRIP_TILES = 192
# With few channels strips are larger, because XLA computes a product [T, C] x [C, D] on
# one core unless T C^2 D is about 2^31 (measured, C from 64 to 512).
MAX_STRIP_TILES, _WORK_FOR_CORES = 1024, 2**31
# Inputs with fewer tiles in all are not cut.
_WHOLE_TILES = 512

_A, _B = 2 / 3, 3 / 2  # the points; their product is 1
_A2, _B2 = _A**2, _B**2
_S = _A2 + _B2
# Data, filter and output transforms; a row of the last makes one of 4 outputs of 6.
_DATA = (
    (1, 0, -_S, 0, 1, 0),
    (0, -_B, -_B2, _A, 1, 0),
    (0, _B, -_B2, -_A, 1, 0),
    (0, -_A, -_A2, _B, 1, 0),
    (0, _A, -_A2, -_B, 1, 0),
    (0, 1, 0, -_S, 0, 1),
)
_NA, _NB = 1 / (2 * _A2 * (_A2 - _B2)), 1 / (2 * _B2 * (_B2 - _A2))
_FILTER = (
    (1, 0, 0),
    (_NA, _NA * _A, _NA * _A2),
    (_NA, -_NA * _A, _NA * _A2),
    (_NB, _NB * _B, _NB * _B2),
    (_NB, -_NB * _B, _NB * _B2),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, _A, -_A, _B, -_B, 0),
    (0, _A2, _A2, _B2, _B2, 0),
    (0, _A**3, -(_A**3), _B**3, -(_B**3), 1),
)
_GRAD = tuple(zip(*_OUTPUT, strict=True))
# Both axes at once, as a matrix product: [36, 9].
_FILTER_2D = np.kron(_FILTER, _FILTER).astype(np.float32)
# The input's gradient is a convolution with the flipped kernel. The points are closed
# under inversion, and a flipped filter's value at a point is a multiple of the filter's
# at its inverse: the transformed filter serves both directions, with these transforms.
_INVERSE = (5, 3, 4, 1, 2, 0)
_MULTIPLE = (1, -_A2, -_A2, -_B2, -_B2, 1)  # of the filter's value at each point
_DATA_BACK = tuple(tuple(m * c for c in _DATA[i]) for i, m in zip(_INVERSE, _MULTIPLE, strict=True))
_OUTPUT_BACK = tuple(tuple(row[i] for i in _INVERSE) for row in _OUTPUT)
_PRODUCT = (((2,), (1,)), ((0,), (0,)))  # [36, T, C] x [36, C, D]
_PRODUCT_BACK = (((2,), (2,)), ((0,), (0,)))  # [36, T, D] x [36, C, D]
_OUTER = (((1,), (1,)), ((0,), (0,)))  # [36, T, C] x [36, T, D]


@jax.jit
def winograd_filter(kernel: Float[Array, "3 3 C D"]) -> Float[Array, "36 C D"]:
    """Returns the kernel as `winograd_conv` takes it: G g G^T of every pair of channels."""
    flat = kernel.reshape(9, -1)
    return _matrix_times(_FILTER_2D, flat).reshape(36, *kernel.shape[2:])


class _Direction(NamedTuple):
    data: Matrix
    product: lax.DotDimensionNumbers
    output: Matrix


_FORWARD = _Direction(_DATA, _PRODUCT, _OUTPUT)
_BACK = _Direction(_DATA_BACK, _PRODUCT_BACK, _OUTPUT_BACK)


@jax.jit
def winograd_conv(xs: Levels, weights: Float[Array, "36 C D"]) -> list[Plane]:
    """Returns the convolution, padded by one pixel, of arrays [B, h, w, C] each.

    Args:
      weights: of `winograd_filter`.
    """
    return _convolve(xs, weights, _FORWARD)


@jax.jit
def winograd_input_grad(grads: Levels, weights: Float[Array, "36 C D"]) -> list[Plane]:
    """Returns the gradients of `winograd_conv`'s inputs, of those of its outputs."""
    return _convolve(grads, weights, _BACK)


@jax.jit
def winograd_filter_grad(xs: Levels, grads: Levels) -> Float[Array, "3 3 C D"]:
    """Returns the gradient of the kernel, of inputs [B, h, w, C] and outputs' grads."""
    if sum(count_tiles(x.shape) for x in xs) <= _WHOLE_TILES:
        x = jnp.concatenate([_tiles(_DATA, _padded(x)) for x in xs], axis=1)
        g = jnp.concatenate([_tiles(_GRAD, _whole_tiles(g)) for g in grads], axis=1)
        total = lax.dot_general(x, g, _OUTER)
    else:
        total = functools.reduce(jnp.add, map(_filter_grad_strips, xs, grads))
    return _matrix_times(_FILTER_2D.T, total.reshape(36, -1)).reshape(3, 3, *total.shape[1:])


def _convolve(xs: Levels, weights: Float[Array, "36 C D"], direction: _Direction) -> list[Plane]:
    strip = _strip_tiles(xs[0].shape[-1], weights.size // 36)
    if sum(count_tiles(x.shape) for x in xs) > max(_WHOLE_TILES, strip * 5 // 4):
        return [_convolve_strips(x, weights, direction, strip) for x in xs]
    if len(xs) == 1:
        (x,) = xs
        b, h, w, _ = x.shape
        product = lax.dot_general(_tiles(direction.data, _padded(x)), weights, direction.product)
        return [_outputs(direction.output, product, b, -(-h // 4))[:, :h, :w]]
    return _convolve_together(xs, weights, direction)


def _convolve_together(
    xs: Levels, weights: Float[Array, "36 C D"], direction: _Direction
) -> list[Plane]:
    """One product for the tiles of all inputs."""
    tiles = [_tiles(direction.data, _padded(x)) for x in xs]
    product = lax.dot_general(jnp.concatenate(tiles, axis=1), weights, direction.product)
    # Put apart only after the transform, which leaves the least to copy.
    m = product.reshape(6, 6, *product.shape[1:])
    rows = _stack(direction.output, [m[i] for i in range(6)], axis=2)  # [6, T, 4, D]
    both = _stack(direction.output, [rows[j] for j in range(6)], axis=2)  # [T, 4, 4, D]
    results, start = [], 0
    for x, tile in zip(xs, tiles, strict=True):
        b, h, w, _ = x.shape
        part = both[start : start + tile.shape[1]]
        part = part.reshape(b, -(-h // 4), -(-w // 4), 4, 4, -1).swapaxes(2, 3)
        part = part.reshape(b, -(-h // 4) * 4, -(-w // 4) * 4, -1)
        results.append(part[:, :h, :w])
        start += tile.shape[1]
    return results


def _convolve_strips(
    x: Plane, weights: Float[Array, "36 C D"], direction: _Direction, tiles: int
) -> Plane:
    """Strips of tile rows, one after the other, each with its halo of two rows."""
    b, h, w, _ = x.shape
    rows, strips = _strips(x.shape, tiles)
    padded = _padded(x, 4 * rows * strips)

    def strip(i):
        part = _cut(padded, i, strips, rows, halo=2)
        product = lax.dot_general(_tiles(direction.data, part), weights, direction.product)
        return _outputs(direction.output, product, 1, rows)[0]

    y = lax.map(strip, jnp.arange(b * strips))  # [b * strips, 4 * rows, 4 * tw, D]
    return y.reshape(b, 4 * rows * strips, *y.shape[2:])[:, :h, :w]


def _filter_grad_strips(x: Plane, g: Plane) -> Float[Array, "36 C D"]:
    """Returns the sums of the 36 outer products over all tiles: [36, C, D]."""
    rows, strips = _strips(x.shape, STRIP_TILES)
    x, g = _padded(x, 4 * rows * strips), _whole_tiles(g, 4 * rows * strips)

    def strip(i, total):
        data = _tiles(_DATA, _cut(x, i, strips, rows, halo=2))
        grad = _tiles(_GRAD, _cut(g, i, strips, rows, halo=0))
        return total + lax.dot_general(data, grad, _OUTER)

    total = jnp.zeros((36, x.shape[-1], g.shape[-1]), x.dtype)
    return lax.fori_loop(0, x.shape[0] * strips, strip, total)


def _matrix_times(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns a small constant matrix times x, in full precision."""
    return jnp.dot(jnp.asarray(matrix, x.dtype), x, precision="highest")


def count_tiles(shape: Sequence[int]) -> int:
    """Returns how many 4x4 tiles cover the planes of an array [B, h, w, C]."""
    return shape[0] * -(-shape[1] // 4) * -(-shape[2] // 4)


def _strip_tiles(channels: int, pairs: int) -> int:
    """Returns how many tiles a strip should have, for `pairs` = C D of the product."""
    enough = _WORK_FOR_CORES // (channels * pairs)
    return min(max(STRIP_TILES, enough), MAX_STRIP_TILES)


def _strips(shape: Sequence[int], tiles: int) -> tuple[int, int]:
    """Returns tile rows of a strip, about `tiles`, and strips of an image.

    Every strip has the same number of rows. Strips that end where the image does are
    preferred: nothing has to be cut off, which costs a copy of the result.
    """
    tall, wide = -(-shape[1] // 4), -(-shape[2] // 4)
    for rows in range(1, tall + 1):
        if tall % rows == 0 and 0.8 <= rows * wide / tiles <= 1.5:
            return rows, tall // rows
    strips = -(-tall // max(1, round(tiles / wide)))
    rows = -(-tall // strips)
    return rows, -(-tall // rows)


def _cut(x: Plane, i: jax.Array, strips: int, rows: int, halo: int) -> Plane:
    """Returns strip i of all images' strips: [1, 4 * rows + halo, _, _]."""
    start = (lax.div(i, strips), lax.rem(i, strips) * 4 * rows, 0, 0)
    return lax.dynamic_slice(x, start, (1, 4 * rows + halo, *x.shape[2:]))


def _padded(x: Plane, height: int = 0) -> Plane:
    """Returns x with a border of one zero, padded to whole tiles or to `height`."""
    _, h, w, _ = x.shape
    down, right = (height or -(-h // 4) * 4) - h, -(-w // 4) * 4 - w
    return jnp.pad(x, ((0, 0), (1, 1 + down), (1, 1 + right), (0, 0)))


def _whole_tiles(g: Plane, height: int = 0) -> Plane:
    """Returns g padded with zeros to whole tiles, or to `height`."""
    _, h, w, _ = g.shape
    down, right = (height or -(-h // 4) * 4) - h, -(-w // 4) * 4 - w
    return jnp.pad(g, ((0, 0), (0, down), (0, right), (0, 0)))


def _tiles(matrix: Matrix, x: Plane) -> Float[Array, "36 T C"]:
    """Returns M d M^T of every tile d, for a matrix M [6, 6] or [6, 4]: [36, T, C].

    Tiles are 4 pixels apart; those of 6 pixels overlap, and x has two pixels more.
    """
    side = len(matrix[0])
    b, h, w, c = x.shape
    tall, wide = (h - side + 4) // 4, (w - side + 4) // 4
    rows = _stack(matrix, [_every_fourth(x, 1, i, tall) for i in range(side)], axis=0)
    columns = [_every_fourth(rows, 3, j, wide) for j in range(side)]
    return _stack(matrix, columns, axis=1).reshape(36, b * tall * wide, c)


def _outputs(matrix: Matrix, product: Float[Array, "36 T D"], b: int, tall: int) -> Plane:
    """Returns M m M^T of every tile m, put together: [B, h, w, D]."""
    _, tiles, d = product.shape
    m = product.reshape(6, 6, b, tall, tiles // (b * tall), d)
    rows = _stack(matrix, [m[i] for i in range(6)], axis=3)  # [6, b, tall, 4, wide, d]
    both = _combine(matrix, [rows[j] for j in range(6)], axis=4)
    return both.reshape(b, 4 * tall, -1, d)


def _every_fourth(x: jax.Array, axis: int, start: int, count: int) -> jax.Array:
    return lax.slice_in_dim(x, start, start + 4 * count - 3, 4, axis)


def _stack(matrix: Matrix, parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Returns `_combine`, kept apart from what follows.

    Without the barrier XLA fuses both phases of a transform into one, which computes
    each of 36 results from 36 inputs anew and takes many times longer to compile.
    """
    return lax.optimization_barrier(_combine(matrix, parts, axis))


def _combine(matrix: Matrix, parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Returns matrix times parts, stacked along `axis`."""
    results = []
    for row in matrix:
        terms = [part if c == 1 else c * part for c, part in zip(row, parts, strict=True) if c != 0]
        results.append(functools.reduce(jnp.add, terms))
    return jnp.stack(results, axis)
