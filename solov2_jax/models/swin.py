"""Swin transformers: attention within windows, every second time within shifted ones.

Source: torchvision/models/swin_transformer.py, without stochastic depth. Windows that reach
beyond the map see zeros there, as in torchvision and in Microsoft's detectors; timm differs
where a side is no multiple of the window.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from solov2_jax import ops
from solov2_jax.models.backbone import LEVELS, Backbone
from solov2_jax.models.dense import Dense, LayerNorm, PatchStem, attention, gelu, narrow_init

EPSILON = 1e-5


def relative_positions(window: int) -> np.ndarray:
    """Returns int32 [n, n], n = window ** 2: which entry of a table of (2 window - 1) ** 2
    belongs to each pair of a query and a key of a window."""
    y, x = np.divmod(np.arange(window**2), window)
    dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return np.asarray(dy * (2 * window - 1) + dx, np.int32)


class WindowAxis:
    """One axis of a map cut into windows.

    Shifted windows begin `window - shift` rows before the map. Rows that are there are those
    of the map, and zeros up to a multiple of the window.

    Args:
      size: of the array.
      extent: of each image's own map, None: the array's.
      shift: of the windows, 0 where a map is not larger than a window.
    """

    def __init__(self, size: int, extent: Int[Array, "B"] | None, window: int, shift: int):
        own = jnp.asarray([size]) if extent is None else extent
        whole = -(-own // window) * window
        self.size, self.before = size, window - shift if shift and size > window else 0
        self.windows = -(-(self.before + -(-size // window) * window) // window)
        # Images whose windows are not shifted; none where the array is the map.
        self.is_small = None if extent is None or not self.before else whole <= window
        start = jnp.full(own.shape, self.before)
        start = start if self.is_small is None else jnp.where(self.is_small, 0, start)
        rows = jnp.arange(self.windows * window)[None] - start[:, None]
        self.there: Bool[Array, "B L"] = (rows >= 0) & (rows < whole[:, None])

    def cut(self, x: jax.Array, axis: int) -> jax.Array:
        """Returns the rows of all windows."""
        padding = [(0, 0)] * x.ndim
        length = self.there.shape[1]
        padding[axis] = (self.before, length - self.size)
        x = jnp.pad(x, padding)
        shifted = jax.lax.slice_in_dim(x, 0, length, axis=axis)
        if self.is_small is None:
            return shifted
        return self._choose(jax.lax.slice_in_dim(x, self.before, None, axis=axis), shifted)

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """Returns the map's rows of what `cut` returned."""
        shifted = jax.lax.slice_in_dim(x, self.before, self.before + self.size, axis=axis)
        if self.is_small is None:
            return shifted
        return self._choose(jax.lax.slice_in_dim(x, 0, self.size, axis=axis), shifted)

    def _choose(self, small: jax.Array, large: jax.Array) -> jax.Array:
        assert self.is_small is not None
        return jnp.where(self.is_small.reshape(-1, *(1,) * (large.ndim - 1)), small, large)


class WindowAttention(nn.Module):
    """Attention within windows, with a bias for each pair of places."""

    heads: int
    window: int
    shift: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        b, h, w, c = x.shape
        n = self.window
        sides = (None, None) if extent is None else (extent[:, 0], extent[:, 1])
        rows, columns = (WindowAxis(*a, n, self.shift) for a in zip((h, w), sides, strict=True))
        x = columns.cut(rows.cut(ops.zero_outside(x, extent), 1), 2)
        high, wide = rows.windows, columns.windows
        x = x.reshape(b, high, n, wide, n, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b * high * wide, n * n, c)
        there = rows.there[:, :, None] & columns.there[:, None]
        there = there.reshape(-1, high, n, wide, n).transpose(0, 1, 3, 2, 4)
        there = jnp.broadcast_to(there, (b, high, wide, n, n)).reshape(-1, n * n)
        table = self.param("table", narrow_init, ((2 * n - 1) ** 2, self.heads))
        bias = table[relative_positions(n).ravel()].reshape(n * n, n * n, self.heads)
        q, k, v = (Dense(c, dtype=self.dtype, name=name)(x) for name in ("q", "k", "v"))
        y = attention(q, k, v, self.heads, there, bias.transpose(2, 0, 1))
        y = y.reshape(b, high, wide, n, n, c).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(b, high * n, wide * n, c)
        y = columns.join(rows.join(y, 1), 2)
        return Dense(c, dtype=self.dtype, name="proj")(y)


class SwinBlock(nn.Module):
    """Attention within windows, then two layers with GELU between; each added to its input."""

    heads: int
    window: int
    shift: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        attend = WindowAttention(self.heads, self.window, self.shift, self.dtype, name="attn")
        x = x + attend(LayerNorm(EPSILON, name="ln1")(x), extent)
        y = LayerNorm(EPSILON, name="ln2")(x)
        y = gelu(Dense(4 * channels, dtype=self.dtype, name="fc1")(y))
        return x + Dense(channels, dtype=self.dtype, name="fc2")(y)


class PatchMerging(nn.Module):
    """Patches of 2 x 2, a norm and a layer without a bias."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ D"]:
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
        x = LayerNorm(EPSILON, name="ln")(x.reshape(b, h // 2, w // 2, 4 * c))
        return Dense(self.features, use_bias=False, dtype=self.dtype, name="fc")(x)


class Swin(Backbone):
    """Image to {"res2": ..., "res5": ...}; the defaults are Swin-T.

    Attributes:
      depths, heads: blocks of each stage, and their heads.
      width: channels of the first stage; each next one has twice as many.
      window: side of the windows; every second block's begin half of it earlier.
      out_norm: whether a layer norm of its own ends each result.
    """

    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int] = (3, 6, 12, 24)
    width: int = 96
    window: int = 7
    out_norm: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        x = self.cut(PatchStem(self.width, EPSILON, self.dtype, name="stem")(image), 1)
        features, extent = {}, ops.at_stride(extent, 4)
        for i, level in enumerate(LEVELS):
            if i:
                x = PatchMerging(self.width << i, self.dtype, name=f"{level}_down")(x)
                extent = ops.at_stride(extent, 2)
            for n in range(self.depths[i]):
                shift = self.window // 2 if n % 2 else 0
                block = SwinBlock(
                    heads=self.heads[i],
                    window=self.window,
                    shift=shift,
                    dtype=self.dtype,
                    name=f"{level}_{n}",
                )
                x = block(x, extent)
            x = self.cut(x, i + 2)
            features[level] = LayerNorm(EPSILON, name=f"out_ln{i + 2}")(x) if self.out_norm else x
        return features

    def layers(self) -> Sequence[Sequence[str]]:
        """Returns the stem, then each block, with what is before it in a stage."""
        layers: list[tuple[str, ...]] = [("stem*",)]
        for level, depth in zip(LEVELS, self.depths, strict=True):
            blocks = [(f"{level}_{n}/*",) for n in range(depth)]
            layers += [(f"{level}_down/*", *blocks[0]), *blocks[1:]]
        return layers
