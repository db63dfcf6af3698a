"""3x3 convolution at stride 1 by Winograd's minimal filtering F(4x4, 3x3), for CPUs.

A tile of 4x4 outputs takes 36 products for each pair of channels instead of 144. The
products are one batched matrix product; the transforms around it are additions.

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


def transform_filter(kernel: Float[Array, "3 3 C D"]) -> Float[Array, "36 C D"]:
    """Returns the kernel as `convolve` takes it: G g G^T of every pair of channels."""
    flat = kernel.reshape(9, -1)
    return _dot(_FILTER_2D, flat).reshape(36, *kernel.shape[2:])


class _Direction(NamedTuple):
    data: tuple[tuple[float, ...], ...]
    product: lax.DotDimensionNumbers
    output: tuple[tuple[float, ...], ...]


_FORWARD = _Direction(_DATA, _PRODUCT, _OUTPUT)
_BACK = _Direction(_DATA_BACK, _PRODUCT_BACK, _OUTPUT_BACK)


def convolve(xs: Sequence[jax.Array], weights: Float[Array, "36 C D"]) -> list[jax.Array]:
    """Returns the convolution, padded by one pixel, of arrays [B, h, w, C] each.

    Args:
      weights: of `transform_filter`.
    """
    return _convolve(xs, weights, _FORWARD)


def input_grad(grads: Sequence[jax.Array], weights: Float[Array, "36 C D"]) -> list[jax.Array]:
    """Returns the gradients of `convolve`'s inputs, of those of its outputs."""
    return _convolve(grads, weights, _BACK)


def filter_grad(xs: list[jax.Array], grads: list[jax.Array]) -> Float[Array, "3 3 C D"]:
    """Returns the gradient of the kernel, of inputs [B, h, w, C] and outputs' grads."""
    total = None
    if sum(count_tiles(x.shape) for x in xs) <= _WHOLE_TILES:
        x = jnp.concatenate([_tiles(_DATA, _padded(x)) for x in xs], axis=1)
        g = jnp.concatenate([_tiles(_GRAD, _whole_tiles(g)) for g in grads], axis=1)
        total = lax.dot_general(x, g, _OUTER)
    else:
        for x, g in zip(xs, grads, strict=True):
            part = _filter_grad_strips(x, g)
            total = part if total is None else total + part
    assert total is not None, "at least one input"
    return _dot(_FILTER_2D.T, total.reshape(36, -1)).reshape(3, 3, *total.shape[1:])


def _convolve(xs, weights, way: _Direction):
    strip = _strip_tiles(xs[0].shape[-1], weights.size // 36)
    if sum(count_tiles(x.shape) for x in xs) > max(_WHOLE_TILES, strip * 5 // 4):
        return [_convolve_strips(x, weights, way, strip) for x in xs]
    if len(xs) == 1:
        (x,) = xs
        b, h, w, _ = x.shape
        product = lax.dot_general(_tiles(way.data, _padded(x)), weights, way.product)
        return [_outputs(way.output, product, b, -(-h // 4))[:, :h, :w]]
    return _convolve_together(xs, weights, way)


def _convolve_together(xs, weights, way: _Direction):
    """One product for the tiles of all inputs."""
    tiles = [_tiles(way.data, _padded(x)) for x in xs]
    product = lax.dot_general(jnp.concatenate(tiles, axis=1), weights, way.product)
    # Put apart only after the transform, which leaves the least to copy.
    m = product.reshape(6, 6, *product.shape[1:])
    rows = _stack(way.output, [m[i] for i in range(6)], axis=2)  # [6, T, 4, D]
    both = _stack(way.output, [rows[j] for j in range(6)], axis=2)  # [T, 4, 4, D]
    results, start = [], 0
    for x, tile in zip(xs, tiles, strict=True):
        b, h, w, _ = x.shape
        part = both[start : start + tile.shape[1]]
        part = part.reshape(b, -(-h // 4), -(-w // 4), 4, 4, -1).swapaxes(2, 3)
        part = part.reshape(b, -(-h // 4) * 4, -(-w // 4) * 4, -1)
        results.append(part[:, :h, :w])
        start += tile.shape[1]
    return results


def _convolve_strips(x, weights, way: _Direction, tiles: int):
    """Strips of tile rows, one after the other, each with its halo of two rows."""
    b, h, w, _ = x.shape
    rows, strips = _strips(x.shape, tiles)
    padded = _padded(x, 4 * rows * strips)

    def strip(i):
        part = _cut(padded, i, strips, rows, halo=2)
        product = lax.dot_general(_tiles(way.data, part), weights, way.product)
        return _outputs(way.output, product, 1, rows)[0]

    y = lax.map(strip, jnp.arange(b * strips))  # [b * strips, 4 * rows, 4 * tw, D]
    return y.reshape(b, 4 * rows * strips, *y.shape[2:])[:, :h, :w]


def _filter_grad_strips(x, g):
    """Returns the sums of the 36 outer products over all tiles: [36, C, D]."""
    rows, strips = _strips(x.shape, STRIP_TILES)
    x, g = _padded(x, 4 * rows * strips), _whole_tiles(g, 4 * rows * strips)

    def strip(i, total):
        data = _tiles(_DATA, _cut(x, i, strips, rows, halo=2))
        grad = _tiles(_GRAD, _cut(g, i, strips, rows, halo=0))
        return total + lax.dot_general(data, grad, _OUTER)

    total = jnp.zeros((36, x.shape[-1], g.shape[-1]), x.dtype)
    return lax.fori_loop(0, x.shape[0] * strips, strip, total)


def _dot(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns a small constant matrix times x, in full precision."""
    return jnp.dot(jnp.asarray(matrix, x.dtype), x, precision="highest")


def count_tiles(shape: Sequence[int]) -> int:
    """Returns how many 4x4 tiles cover the planes of an array [B, h, w, C]."""
    return shape[0] * -(-shape[1] // 4) * -(-shape[2] // 4)


def _strip_tiles(channels: int, pairs: int) -> int:
    """Returns how many tiles a strip should have, for `pairs` = C D of the product."""
    least = _WORK_FOR_CORES // (channels * pairs)
    return min(max(STRIP_TILES, least), MAX_STRIP_TILES)


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


def _cut(x: jax.Array, i: jax.Array, strips: int, rows: int, halo: int) -> jax.Array:
    """Returns strip i of all images' strips: [1, 4 * rows + halo, _, _]."""
    start = (i // strips, i % strips * 4 * rows, 0, 0)
    return lax.dynamic_slice(x, start, (1, 4 * rows + halo, *x.shape[2:]))


def _padded(x: jax.Array, height: int = 0) -> jax.Array:
    """Returns x with a border of one zero, its height (or the given) and width whole
    tiles."""
    _, h, w, _ = x.shape
    down, right = (height or -(-h // 4) * 4) - h, -(-w // 4) * 4 - w
    return jnp.pad(x, ((0, 0), (1, 1 + down), (1, 1 + right), (0, 0)))


def _whole_tiles(g: jax.Array, height: int = 0) -> jax.Array:
    """Returns g padded with zeros to whole tiles, or to the given height."""
    _, h, w, _ = g.shape
    down, right = (height or -(-h // 4) * 4) - h, -(-w // 4) * 4 - w
    return jnp.pad(g, ((0, 0), (0, down), (0, right), (0, 0)))


def _tiles(matrix, x: jax.Array) -> jax.Array:
    """Returns M d M^T of every tile d, for a matrix M [6, 6] or [6, 4]: [36, T, C].

    Tiles are 4 pixels apart; those of 6 pixels overlap, and x has two pixels more.
    """
    side = len(matrix[0])
    b, h, w, c = x.shape
    tall, wide = (h - side + 4) // 4, (w - side + 4) // 4
    rows = _stack(matrix, [_every_fourth(x, 1, i, tall) for i in range(side)], axis=0)
    columns = [_every_fourth(rows, 3, j, wide) for j in range(side)]
    return _stack(matrix, columns, axis=1).reshape(36, b * tall * wide, c)


def _outputs(matrix, product: Float[Array, "36 T D"], b: int, tall: int) -> jax.Array:
    """Returns M m M^T of every tile m, put together: [B, h, w, D]."""
    _, tiles, d = product.shape
    m = product.reshape(6, 6, b, tall, tiles // (b * tall), d)
    rows = _stack(matrix, [m[i] for i in range(6)], axis=3)  # [6, b, tall, 4, wide, d]
    both = _combine(matrix, [rows[j] for j in range(6)], axis=4)
    return both.reshape(b, 4 * tall, -1, d)


def _every_fourth(x: jax.Array, axis: int, start: int, count: int) -> jax.Array:
    return lax.slice_in_dim(x, start, start + 4 * count - 3, 4, axis)


def _stack(matrix, parts, axis: int) -> jax.Array:
    """Returns `_combine`, kept apart from what follows.

    Without the barrier XLA fuses both phases of a transform into one, which computes
    each of 36 results from 36 inputs anew and takes many times longer to compile.
    """
    return lax.optimization_barrier(_combine(matrix, parts, axis))


def _combine(matrix, parts, axis: int) -> jax.Array:
    """Returns matrix times parts, stacked along `axis`."""
    results = []
    for row in matrix:
        terms = [part if c == 1 else c * part for c, part in zip(row, parts, strict=True) if c != 0]
        results.append(functools.reduce(jnp.add, terms))
    return jnp.stack(results, axis)
