"""Convolutions: one function that picks the fastest correct form for the platform.

On GPU and TPU that is `ops.conv2d`, XLA's own; on a CPU see `conv_cpu.py`. The choice is
made when a program is lowered, see `platforms.py`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from solov2_jax import ops
from solov2_jax.models import conv_cpu
from solov2_jax.platforms import ALIGNED_CHANNELS, MOST_COORDINATES, PlatformOp

# A kernel [k, k, C, D], or the same transformed for Winograd's form: [36, C, D].
Kernel = Float[Array, "k k C D"] | Float[Array, "36 C D"]

_transformed_for = contextvars.ContextVar("transformed_for", default="")


@contextlib.contextmanager
def transformed_for(platform: str) -> Iterator[None]:
    """Traces `transform_kernel` for programs of a platform, such as "cpu" or "gpu"."""
    token = _transformed_for.set(platform)
    try:
        yield
    finally:
        _transformed_for.reset(token)


def conv2d(x: Float[Array, "B h w C"], kernel: Kernel, stride: int = 1) -> Float[Array, "B _ _ D"]:
    """Returns the convolution of `x`, padded by k // 2 on every side (as torch does)."""
    return conv2d_levels([x], kernel, stride)[0]


def conv2d_levels(xs: Sequence[jax.Array], kernel: Kernel, stride: int = 1) -> list[jax.Array]:
    """Returns `conv2d` of each array with one kernel, in one product where possible.

    A float32 kernel is rounded to the arrays' type for each of them, so that its gradients
    add up in float32.
    """
    if kernel.ndim == 3:
        return conv_cpu.winograd_conv(xs, kernel)
    precision = jax.config.values["jax_default_matmul_precision"]
    return _conv2d_levels(list(xs), kernel, stride, precision)


def transform_kernel(
    kernel: Float[Array, "k k C D"], xs: Sequence[jax.Array], stride: int = 1
) -> Kernel:
    """Returns the kernel in the form that `conv2d_levels(xs, ...)` is fastest with.

    On the platform that `transformed_for` names; a kernel in Winograd's form computes in
    that form wherever it goes. For kernels that stay the same from call to call: the result
    has no gradient form.
    """
    fewest = conv_cpu.TRANSFORMED_MIN_TILES
    on_cpu = _transformed_for.get() == "cpu"
    if on_cpu and conv_cpu.uses_winograd(xs, kernel, stride, min_tiles=fewest):
        return conv_cpu.winograd_filter(kernel)
    return kernel.astype(xs[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d_levels(
    xs: list[jax.Array], kernel: jax.Array, stride: int, precision: str | None
) -> list[jax.Array]:
    return _forward(xs, kernel, stride=stride)


def _conv2d_levels_fwd(xs, kernel, stride, precision):
    return _forward(xs, kernel, stride=stride), (xs, kernel)


def _conv2d_levels_bwd(stride, precision, residuals, grads):
    xs, kernel = residuals
    with jax.default_matmul_precision(precision):  # of the forward pass
        return _backward(xs, kernel, grads, stride=stride)


_conv2d_levels.defvjp(_conv2d_levels_fwd, _conv2d_levels_bwd)


def _plain(xs: list[jax.Array], kernel: jax.Array, stride: int) -> list[jax.Array]:
    kernels = [kernel[:, :, channels] for channels in _aligned(kernel)]
    return [_sum_of_parts(_split(x, kernel), kernels, stride) for x in xs]


def _plain_grads(xs: list[jax.Array], kernel: jax.Array, grads: list[jax.Array], stride: int):
    kernels = [kernel[:, :, channels] for channels in _aligned(kernel)]
    dxs, dws = [], []
    for x, grad in zip(xs, grads, strict=True):
        parts = functools.partial(_sum_of_parts, stride=stride)
        _, pull_back = jax.vjp(parts, _split(x, kernel), kernels)
        dx, dw = pull_back(grad)
        # Joined as the input was: what is not asked for of it is not computed.
        dxs.append(jnp.concatenate(dx, axis=-1))
        dws.append(dw)
    sums = (functools.reduce(jnp.add, of_levels) for of_levels in zip(*dws, strict=True))
    return dxs, jnp.concatenate(list(sums), axis=2)


def _aligned(kernel: jax.Array) -> list[slice]:
    """Returns the input channels that are convolved together.

    A few beyond a multiple of `ALIGNED_CHANNELS` are coordinates: by themselves, because a
    GPU's or TPU's units work on the others at full rate only if they are a multiple.
    """
    channels = kernel.shape[2]
    rest = channels % ALIGNED_CHANNELS
    if rest == channels or not 0 < rest <= MOST_COORDINATES:
        return [slice(None)]
    return [slice(0, channels - rest), slice(channels - rest, None)]


def _split(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    return [x[..., channels] for channels in _aligned(kernel)]


def _sum_of_parts(parts: list[jax.Array], kernels: list[jax.Array], stride: int) -> jax.Array:
    pairs = zip(parts, kernels, strict=True)
    ys = [ops.conv2d(x, kernel.astype(x.dtype), stride) for x, kernel in pairs]
    return functools.reduce(jnp.add, ys)


def _on_cpu(xs: list[jax.Array], kernel: jax.Array, stride: int) -> list[jax.Array]:
    return conv_cpu.conv2d_cpu(xs, kernel.astype(xs[0].dtype), stride)


def _grads_on_cpu(xs: list[jax.Array], kernel: jax.Array, grads: list[jax.Array], stride: int):
    dxs, dw = conv_cpu.conv2d_cpu_grads(xs, kernel.astype(xs[0].dtype), stride, grads)
    return dxs, dw.astype(kernel.dtype)


_forward = PlatformOp("conv2d", _on_cpu, _plain)
_backward = PlatformOp("conv2d_grads", _grads_on_cpu, _plain_grads)
