"""Group normalisation of many small levels: together on a CPU, one by one elsewhere.

A CPU has one set of operations for all levels that way. Elsewhere passes over memory are what
it costs: the cells of all levels in one float32 array, and the products with them, move seven
times what the levels hold.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.platforms import PlatformOp


def group_norm_levels(
    xs: Sequence[Float[Array, "B _ _ C"]],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    groups: int,
    epsilon: float = 1e-5,
    extents: Sequence[Int[Array, "B 2"]] = (),
) -> list[Float[Array, "B _ _ C"]]:
    """Returns `ops.group_norm` of each level; `extents`, see `ops`, are theirs."""
    return _group_norm_levels(list(xs), scale, bias, list(extents), groups, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _group_norm_levels(xs, scale, bias, extents, groups: int, epsilon: float) -> list[jax.Array]:
    return _forward(xs, scale, bias, extents, groups=groups, epsilon=epsilon)


def _group_norm_levels_fwd(xs, scale, bias, extents, groups, epsilon):
    ys = _forward(xs, scale, bias, extents, groups=groups, epsilon=epsilon)
    return ys, (xs, scale, bias, extents)


def _group_norm_levels_bwd(groups, epsilon, residuals, grads):
    return (*_backward(*residuals, grads, groups=groups, epsilon=epsilon), None)


_group_norm_levels.defvjp(_group_norm_levels_fwd, _group_norm_levels_bwd)


@functools.partial(jax.jit, static_argnames=("groups", "epsilon"))
def _together(
    xs: Sequence[Float[Array, "B _ _ C"]],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    extents: Sequence[Int[Array, "B 2"]],
    groups: int,
    epsilon: float,
) -> list[Float[Array, "B _ _ C"]]:
    """Computes on the cells of all levels together.

    The statistics of L levels with N cells in all are products with a matrix [L, N].
    """
    b, c = xs[0].shape[0], xs[0].shape[-1]
    sizes = [x.shape[1] * x.shape[2] for x in xs]
    is_of_level = np.repeat(np.arange(len(xs)), sizes) == np.arange(len(xs))[:, None]
    if not extents:
        shares = np.float32(is_of_level / np.reshape(sizes, (-1, 1)))  # [L, N]
        shares = jnp.broadcast_to(shares, (b, *shares.shape))
    else:
        pairs = list(zip(xs, extents, strict=True))
        own = [ops.inside(e, *x.shape[1:3]).reshape(b, -1) for x, e in pairs]
        counts = jnp.stack([e[:, 0] * e[:, 1] for e in extents], axis=1)
        is_own = is_of_level[None] & jnp.concatenate(own, axis=1)[:, None]
        shares = is_own / counts[..., None].astype(jnp.float32)

    def grouped_mean(x):  # [B, N, C] -> [B, L, C], equal within a group
        dims = (((2,), (1,)), ((0,), (0,)))
        mean = lax.dot_general(shares, x, dims, precision=lax.Precision.HIGHEST)
        mean = mean.reshape(b, len(xs), groups, c // groups)
        return jnp.broadcast_to(mean.mean(-1, keepdims=True), mean.shape).reshape(b, -1, c)

    levels = [x.astype(jnp.float32) for x in xs]
    levels = [x - ops.group_pilot(x, groups)[:, None, None] for x in levels]
    cells = jnp.concatenate([x.reshape(b, -1, c) for x in levels], axis=1)
    mean = grouped_mean(cells)
    variance = grouped_mean(jnp.square(cells)) - jnp.square(mean)
    factor = scale[None, None] * lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    results = []
    for i, x in enumerate(levels):
        normed = (x - mean[:, i, None, None]) * factor[:, i, None, None]
        results.append((normed + bias[None, None, None]).astype(xs[i].dtype))
    return results


def _one_by_one(xs, scale, bias, extents, groups: int, epsilon: float) -> list[jax.Array]:
    own = extents or [None] * len(xs)
    norm = functools.partial(ops.group_norm, groups=groups, epsilon=epsilon)
    return [norm(x, scale, bias, extent=e) for x, e in zip(xs, own, strict=True)]


def _grads_of(form, xs, scale, bias, extents, grads, groups: int, epsilon: float):
    """Returns the gradients by JAX's rules: compiled with the forward pass, it is shared."""
    norm = functools.partial(form, extents=extents, groups=groups, epsilon=epsilon)
    return jax.vjp(norm, xs, scale, bias)[1](grads)


_forward = PlatformOp("group_norm_levels", _together, _one_by_one, portable=_together)
_backward = PlatformOp(
    "group_norm_levels_grads",
    functools.partial(_grads_of, _together),
    functools.partial(_grads_of, _one_by_one),
)
