"""Convolutions: one function that picks the fastest correct form for the platform.

On GPU and TPU that is `ops.conv2d`, XLA's own; on a CPU see `conv_cpu.py`.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
from jaxtyping import Array, Float

from solov2_jax import ops
from solov2_jax.models import conv_cpu

_portable = contextvars.ContextVar("portable", default=False)

# A kernel [k, k, C, D], or the same transformed for Winograd's form: [36, C, D].
Kernel = Float[Array, "k k C D"] | Float[Array, "36 C D"]


@contextlib.contextmanager
def portable_forms() -> Iterator[None]:
    """Traces convolutions as `ops.conv2d` whatever the platform.

    For programs that run elsewhere: trace a function of its own inside, because a
    jitted function that was traced outside keeps its form.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


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
    if _on_cpu():
        return conv_cpu.conv2d_cpu(list(xs), kernel.astype(xs[0].dtype), stride)
    return [ops.conv2d(x, kernel.astype(x.dtype), stride) for x in xs]


def transform_kernel(
    kernel: Float[Array, "k k C D"], xs: Sequence[jax.Array], stride: int = 1
) -> Kernel:
    """Returns the kernel in the form that `conv2d_levels(xs, ...)` is fastest with.

    For kernels that stay the same from call to call: the result has no gradient form.
    """
    fewest = conv_cpu.TRANSFORMED_MIN_TILES
    if _on_cpu() and conv_cpu.uses_winograd(xs, kernel, stride, min_tiles=fewest):
        return conv_cpu.winograd_filter(kernel)
    return kernel.astype(xs[0].dtype)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _portable.get()
