"""Convolutions: one function that picks the fastest correct form for the platform.

On GPU and TPU it is `lax.conv_general_dilated`. On the CPU each form comes with a
hand-written gradient, because XLA's own filter gradient is 3 to 25 times slower there
than its forward pass:

* 1x1: matrix products, forward and backward;
* wide 3x3 at stride 1: Winograd's minimal filtering, forward and backward;
* everything else: XLA's convolution forward and for the input's gradient, and one
  matrix product per filter tap for the filter's.

`benchmarks/README.md` has the measurements behind the choice.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from solov2_jax.models import winograd

# With fewer channels (on either side, and their product) or tiles, the transforms cost
# more than the products they save. A kernel transformed once needs fewer tiles.
WINOGRAD_MIN_CHANNELS = 64
WINOGRAD_MIN_PAIRS = 128 * 128
WINOGRAD_MIN_TILES = 64
PREPARED_MIN_TILES = 16
# Of the filter's gradient, where XLA's own form is far slower.
WINOGRAD_GRAD_MIN_CHANNELS = 64
WINOGRAD_GRAD_MIN_TILES = 32

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

_portable = contextvars.ContextVar("portable", default=False)

# A kernel [k, k, C, D], or the same transformed for Winograd's form: [36, C, D].
Kernel = Float[Array, "k k C D"] | Float[Array, "36 C D"]


@contextlib.contextmanager
def portable_forms() -> Iterator[None]:
    """Traces convolutions as `lax.conv_general_dilated` whatever the platform.

    For programs that run elsewhere: trace a function of its own inside, because a
    jitted function that was traced outside keeps its form.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _portable.get()


def conv2d(x: Float[Array, "B h w C"], kernel: Kernel, stride: int = 1) -> Float[Array, "B _ _ D"]:
    """Returns the convolution of `x`, padded by k // 2 on every side (as torch does).

    "SAME" padding would shift stride-2 convolutions by a pixel.
    """
    return conv2d_levels([x], kernel, stride)[0]


def conv2d_levels(xs: Sequence[jax.Array], kernel: Kernel, stride: int = 1) -> list[jax.Array]:
    """Returns `conv2d` of each array with one kernel, in one product where possible."""
    if kernel.ndim == 3:
        return winograd.convolve(list(xs), kernel)
    if _on_cpu():
        return _conv2d_cpu(list(xs), kernel, stride)
    return [_lax_conv(x, kernel, stride) for x in xs]


def transform_kernel(
    kernel: Float[Array, "k k C D"], xs: Sequence[jax.Array], stride: int = 1
) -> Kernel:
    """Returns the kernel in the form that `conv2d_levels(xs, ...)` is fastest with.

    For kernels that stay the same from call to call: the result has no gradient form.
    """
    if not _on_cpu():
        return kernel
    wide = _is_winograd(xs, kernel, stride, min_tiles=PREPARED_MIN_TILES)
    return winograd.transform_filter(kernel) if wide else kernel


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
    if _is_winograd(xs, kernel, stride):
        return winograd.convolve(xs, winograd.transform_filter(kernel))
    return [_lax_conv(x, kernel, stride) for x in xs]


def _conv2d_cpu_fwd(xs, kernel, stride):
    return _conv2d_cpu(xs, kernel, stride), (xs, kernel)


def _conv2d_cpu_bwd(stride, residuals, grads):
    xs, kernel = residuals
    if kernel.shape[0] == 1:
        return _pointwise_grads(xs, kernel, stride, grads)
    if _is_winograd(xs, kernel, stride):
        weights = winograd.transform_filter(kernel)
        return winograd.input_grad(grads, weights), winograd.filter_grad(xs, grads)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dxs = [
        _lax_conv(_spread(g, stride, *x.shape[1:3]), flipped, 1)
        for x, g in zip(xs, grads, strict=True)
    ]
    if _is_winograd_grad(xs, kernel, stride):
        return dxs, winograd.filter_grad(xs, grads)
    taps = [_tap_filter_grad(x, g, kernel.shape[0], stride) for x, g in zip(xs, grads, strict=True)]
    return dxs, functools.reduce(jnp.add, taps)


def _is_winograd(xs, kernel, stride, min_tiles=WINOGRAD_MIN_TILES):
    """Whether Winograd's form is the fastest, forward and for the input's gradient."""
    pairs = kernel.shape[2] * kernel.shape[3]
    wide = min(kernel.shape[2:]) >= WINOGRAD_MIN_CHANNELS and pairs >= WINOGRAD_MIN_PAIRS
    return wide and _has_tiles(xs, kernel, stride, min_tiles)


def _is_winograd_grad(xs, kernel, stride):
    """Whether it is the fastest for the filter's gradient."""
    wide = min(kernel.shape[2:]) >= WINOGRAD_GRAD_MIN_CHANNELS
    return wide and _has_tiles(xs, kernel, stride, WINOGRAD_GRAD_MIN_TILES)


def _has_tiles(xs, kernel, stride, least):
    enough = sum(winograd.count_tiles(x.shape) for x in xs) >= least
    float32 = xs[0].dtype == jnp.float32
    return kernel.shape[0] == 3 and stride == 1 and enough and float32


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
