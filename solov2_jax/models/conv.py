"""Convolutions: one function that picks the fastest correct form for the platform.

On GPU and TPU it is `lax.conv_general_dilated`. On the CPU XLA's own filter gradient
is 3 to 25 times slower than its forward pass, so there each form comes with a
hand-written gradient:

* 1x1: matrix products, forward and backward;
* 3x3 at stride 1: XLA's convolution forward and for the input's gradient, and
  Winograd's minimal filtering for the filter's gradient;
* everything else: the same, with one matrix product per filter tap.

Winograd's source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
2015, equations 12 to 19, F(4x4, 3x3). Its rounding error is about 1e-5 relative, which
float32 bears and bfloat16 does not.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# With fewer channels or pixels, the transforms cost more than the products they save.
WINOGRAD_MIN_CHANNELS = 64
WINOGRAD_MIN_PIXELS = 512

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: Float[Array, "B h w C"], kernel: Float[Array, "k k C D"], stride: int = 1
) -> Float[Array, "B _ _ D"]:
    """Returns the convolution of `x`, padded by k // 2 on every side (as torch does).

    "SAME" padding would shift stride-2 convolutions by a pixel.
    """
    return conv2d_levels([x], kernel, stride)[0]


def conv2d_levels(
    xs: list[jax.Array], kernel: Float[Array, "k k C D"], stride: int = 1
) -> list[jax.Array]:
    """Returns `conv2d` of each array with one kernel, in one product where possible."""
    if jax.default_backend() == "cpu":
        return _conv2d_cpu(xs, kernel, stride)
    return [_lax_conv(x, kernel, stride) for x in xs]


def _lax_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=_DIMENSIONS,
    )


# --- CPU, forward and gradients --------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d_cpu(xs, kernel, stride):
    if kernel.shape[0] == 1:
        return [_dot(x[:, ::stride, ::stride], kernel[0, 0]) for x in xs]
    return [_lax_conv(x, kernel, stride) for x in xs]


def _conv2d_cpu_fwd(xs, kernel, stride):
    return _conv2d_cpu(xs, kernel, stride), (xs, kernel)


def _conv2d_cpu_bwd(stride, residuals, grads):
    xs, kernel = residuals
    if kernel.shape[0] == 1:
        return _pointwise_grads(xs, kernel, stride, grads)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dxs = [
        _lax_conv(_spread(g, stride, *x.shape[1:3]), flipped, 1)
        for x, g in zip(xs, grads, strict=True)
    ]
    if _is_winograd(xs, kernel, stride):
        return dxs, _winograd_filter_grad(xs, grads)
    taps = [
        _tap_filter_grad(x, g, kernel.shape[0], stride)
        for x, g in zip(xs, grads, strict=True)
    ]
    return dxs, functools.reduce(jnp.add, taps)


def _is_winograd(xs, kernel, stride):
    pixels = sum(math.prod(x.shape[:3]) for x in xs)
    large = min(kernel.shape[2:]) >= WINOGRAD_MIN_CHANNELS
    large = large and pixels >= WINOGRAD_MIN_PIXELS
    return large and kernel.shape[0] == 3 and stride == 1 and xs[0].dtype == jnp.float32


_conv2d_cpu.defvjp(_conv2d_cpu_fwd, _conv2d_cpu_bwd)


def _dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


def _spread(g: jax.Array, stride: int, h: int, w: int) -> jax.Array:
    """Puts `g` at every stride-th pixel of an [h, w] plane of zeros."""
    if stride == 1:
        return g
    pad = [
        (0, size - (n - 1) * stride - 1, stride - 1)
        for size, n in zip((h, w), g.shape[1:3], strict=True)
    ]
    return lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *pad, (0, 0, 0)])


def _pointwise_grads(xs, kernel, stride, grads):
    dxs, dw = [], jnp.zeros(kernel.shape[2:], kernel.dtype)
    for x, g in zip(xs, grads, strict=True):
        dxs.append(_spread(_dot(g, kernel[0, 0].T), stride, *x.shape[1:3]))
        dw += _outer(x[:, ::stride, ::stride], g)
    return dxs, dw[None, None]


def _outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns sum over pixels of x g^T: [C, D], as plain two-dimensional matrices."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())))


def _tap_filter_grad(x, g, k, stride):
    """One product per filter tap: what XLA's own form does 3 to 25 times slower."""
    pad = k // 2
    _, oh, ow, _ = g.shape
    xp = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def tap(i, j):
        rows = slice(i, i + (oh - 1) * stride + 1, stride)
        cols = slice(j, j + (ow - 1) * stride + 1, stride)
        return _outer(xp[:, rows, cols], g)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(k)]) for i in range(k)])


# --- Winograd: the filter gradient from 6x6 input tiles and 4x4 gradient tiles ------

_INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
          (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
           (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0),
           (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))  # fmt: skip


def _combine(matrix, parts):
    """Returns [sum_j matrix[i][j] * parts[j] for i], skipping zeros."""
    rows = []
    for coefficients in matrix:
        terms = [
            part if c == 1 else -part if c == -1 else c * part
            for c, part in zip(coefficients, parts, strict=True)
            if c != 0
        ]
        rows.append(functools.reduce(jnp.add, terms))
    return rows


def _transpose(matrix):
    return tuple(zip(*matrix, strict=True))


def _blocks(x: jax.Array, before: int, tiles: tuple[int, int], extra: int) -> jax.Array:
    """Zero-pads and cuts into 4x4 blocks: [B, th + extra, 4, tw + extra, 4, C]."""
    b, h, w, c = x.shape
    th, tw = tiles[0] + extra, tiles[1] + extra
    pad = [(0, 0), (before, 4 * th - h - before), (before, 4 * tw - w - before), (0, 0)]
    return jnp.pad(x, pad).reshape(b, th, 4, tw, 4, c)


def _num_tiles(x: jax.Array) -> tuple[int, int]:
    return -(-x.shape[1] // 4), -(-x.shape[2] // 4)


def _input_tiles(x: jax.Array) -> jax.Array:
    """Returns B^T d B of every 6x6 tile: [36, tiles, C]."""
    th, tw = _num_tiles(x)
    xb = _blocks(x, 1, (th, tw), 1)
    rows = [xb[:, :th, i] for i in range(4)] + [xb[:, 1:, i] for i in range(2)]
    r = _phase(_INPUT, rows)  # [6, B, th, tw + 1, 4, C]
    cols = [r[:, :, :, :tw, i] for i in range(4)] + [r[:, :, :, 1:, i] for i in (0, 1)]
    return _phase(_INPUT, cols, axis=1).reshape(36, -1, x.shape[-1])


def _grad_tiles(g: jax.Array) -> jax.Array:
    """Returns A g A^T of every 4x4 tile: [36, tiles, D]."""
    gb = _blocks(g, 0, _num_tiles(g), 0)
    r = _phase(_transpose(_OUTPUT), [gb[:, :, i] for i in range(4)])
    r = _phase(_transpose(_OUTPUT), [r[:, :, :, :, i] for i in range(4)], axis=1)
    return r.reshape(36, -1, g.shape[-1])


def _phase(matrix, parts, axis=0):
    """Returns `_combine` stacked along `axis`, kept apart from what follows.

    Without the barrier XLA fuses both phases of a transform into one, which computes
    each of 36 results from 36 inputs anew and takes many times longer to compile.
    """
    return lax.optimization_barrier(jnp.stack(_combine(matrix, parts), axis))


_BATCH_OUTER = (((1,), (1,)), ((0,), (0,)))  # [36, T, C] x [36, T, D]


def _winograd_filter_grad(xs: list[jax.Array], grads: list[jax.Array]) -> jax.Array:
    x = jnp.concatenate([_input_tiles(x) for x in xs], axis=1)
    g = jnp.concatenate([_grad_tiles(g) for g in grads], axis=1)
    m = lax.dot_general(x, g, _BATCH_OUTER).reshape(6, 6, x.shape[-1], -1)
    back = _transpose(_FILTER)
    cols = _phase(back, [m[:, j] for j in range(6)], axis=1)  # [6, 3, C, D]
    return _phase(back, [cols[i] for i in range(6)])
