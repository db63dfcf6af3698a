"""Convolutions of each channel by itself: XLA's own, or sums of shifted products on a CPU.

There XLA's grouped convolution goes channel by channel, and its gradients are slower still.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from solov2_jax.platforms import PlatformOp


def depthwise_conv2d(
    x: Float[Array, "B h w C"], kernel: Float[Array, "k k 1 C"], stride: int = 1
) -> Float[Array, "B _ _ C"]:
    """Returns the convolution of each channel, padded by k // 2 on every side.

    Source: torch.nn.Conv2d(C, C, k, stride, padding=k // 2, groups=C).
    """
    return _depthwise(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _forward(x, kernel, stride=stride)


def _depthwise_fwd(x, kernel, stride):
    return _forward(x, kernel, stride=stride), (x, kernel)


def _depthwise_bwd(stride, residuals, grad):
    return tuple(_backward(*residuals, grad, stride=stride))


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _plain_grads(x: jax.Array, kernel: jax.Array, grad: jax.Array, stride: int):
    _, pull_back = jax.vjp(functools.partial(_plain, stride=stride), x, kernel)
    return pull_back(grad)


def _taps(x: jax.Array, k: int, stride: int) -> Iterator[jax.Array]:
    """Yields what each tap of the kernel reads, row by row of the kernel."""
    b, h, w, c = x.shape
    pad, rows, columns = k // 2, (h - 1) // stride, (w - 1) // stride
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for i in range(k):
        for j in range(k):
            end = (b, i + rows * stride + 1, j + columns * stride + 1, c)
            yield lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))


def _shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    k, c = kernel.shape[0], x.shape[-1]
    weights = kernel.astype(x.dtype).reshape(k * k, c)
    terms = [tap * weights[n][None, None, None] for n, tap in enumerate(_taps(x, k, stride))]
    return functools.reduce(jnp.add, terms)


def _shifted_grads(x: jax.Array, kernel: jax.Array, grad: jax.Array, stride: int):
    k, c = kernel.shape[0], x.shape[-1]
    # The gradient of the input is the convolution of the output's, spread out to the
    # input's grid, with the kernel turned by 180 degrees.
    rows, columns = x.shape[1] - 1, x.shape[2] - 1
    edges = [(0, 0, 0), *((0, n % stride, stride - 1) for n in (rows, columns)), (0, 0, 0)]
    spread = grad if stride == 1 else lax.pad(grad, jnp.zeros((), grad.dtype), edges)
    dx = _shifted(spread, kernel[::-1, ::-1], 1)
    wide = grad.astype(jnp.float32)
    dk = [jnp.sum(tap * wide, (0, 1, 2), jnp.float32) for tap in _taps(x, k, stride)]
    return dx.astype(x.dtype), jnp.stack(dk).reshape(k, k, 1, c).astype(kernel.dtype)


_forward = PlatformOp("depthwise_conv2d", _shifted, _plain)
_backward = PlatformOp("depthwise_conv2d_grads", _shifted_grads, _plain_grads)
