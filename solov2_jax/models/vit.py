"""DINOv2's vision transformer with a simple feature pyramid.

Source: facebookresearch/dinov2, vision_transformer.py, without registers; timm's
vit_small_patch14_dinov2, whose resampling of the positions (bicubic, antialiased) is used; the
pyramid of Li et al., "Exploring plain vision transformer backbones", arXiv 2203.16527.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.backbone import Backbone
from solov2_jax.models.dense import (
    Dense,
    LayerNorm,
    add_channels,
    attention,
    gelu,
    narrow_init,
    scale_channels,
)

PATCH, STRIDE = 14, 16


def _cubic(x: jax.Array) -> jax.Array:
    """Returns Keys' kernel with a = -0.5."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def bicubic_matrix_within(
    size_in: int, size_out: Int[Array, "B"], rows: int
) -> Float[Array, "B rows columns"]:
    """Returns the matrix of an antialiased bicubic resize of one axis, in its first rows.

    Source: torch.nn.functional.interpolate(mode="bicubic", antialias=True).
    """
    scale = size_in / size_out.astype(jnp.float32)[:, None, None]
    centres = scale * (jnp.arange(rows, dtype=jnp.float32)[None, :, None] + 0.5)
    places = jnp.arange(size_in, dtype=jnp.float32)[None, None] + 0.5
    weights = _cubic((places - centres) / jnp.maximum(scale, 1.0))
    total = jnp.sum(weights, -1, keepdims=True)  # at least a half, in a row that is there
    return weights / jnp.where(total > 0.25, total, 1.0)


class TokenStem(nn.Module):
    """Patches of 14 x 14 pixels of the image at 7/8 of its size, and where they are.

    A bilinear resize by 7/8 makes 14 pixels of 16, and no pixel of others: patches of 16 x 16
    with the kernel that takes the resize in.

    Attributes:
      grid: side of the square of positions.
    """

    features: int
    grid: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None
    ) -> tuple[Float[Array, "B 1 C"], Float[Array, "B _ _ C"]]:
        """Returns the class token and those of the patches.

        Args:
          extent: of the tokens.
        """
        b, h, w, channels = image.shape
        h, w, c = h // STRIDE, w // STRIDE, self.features
        patches = Patches14(c, self.dtype, name="conv1")(image)
        cls = self.param("cls", narrow_init, (1, c))
        position = self.param("position", narrow_init, (1 + self.grid**2, c))
        sizes = jnp.asarray([[h, w]]) if extent is None else extent
        down = bicubic_matrix_within(self.grid, sizes[:, 0], h)
        along = bicubic_matrix_within(self.grid, sizes[:, 1], w)
        square = position[1:].reshape(self.grid, self.grid, c)
        exact = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
        rows = exact(down, square, (((2,), (0,)), ((), ())))  # [B, h, grid, C]
        places = exact(along, rows, (((2,), (2,)), ((0,), (0,)))).transpose(0, 2, 1, 3)
        first = jnp.broadcast_to((cls + position[:1])[None], (b, 1, c)).astype(self.dtype)
        return first, patches + places.astype(self.dtype)


class Patches14(nn.Module):
    """The patches of `TokenStem`, with the original's kernel [14, 14, c, C]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ C"]:
        b, h, w, c = x.shape
        kernel = self.param("kernel", narrow_init, (PATCH, PATCH, c, self.features))
        resize = jnp.asarray(ops.bilinear_matrix(STRIDE, PATCH))  # [14, 16]
        exact = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
        wide = exact(resize, kernel, (((0,), (0,)), ((), ())))  # [16, 14, c, C]
        wide = exact(resize, wide, (((0,), (1,)), ((), ()))).transpose(1, 0, 2, 3)
        n = STRIDE
        patches = x.astype(self.dtype).reshape(b, h // n, n, w // n, n, c)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)
        wide = wide.reshape(-1, self.features).astype(self.dtype)
        y = lax.dot_general(patches, wide, (((3,), (0,)), ((), ())))
        return add_channels(y, self.param("bias", nn.initializers.zeros, (self.features,)))


class TokenBlock(nn.Module):
    """Attention to all tokens, then two layers with GELU; each scaled and added to its input."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], there: jax.Array | None = None
    ) -> Float[Array, "B N C"]:
        c = x.shape[-1]
        y = LayerNorm(name="ln1")(x)
        q, k, v = (Dense(c, dtype=self.dtype, name=name)(y) for name in ("q", "k", "v"))
        y = Dense(c, dtype=self.dtype, name="proj")(attention(q, k, v, self.heads, there))
        x = x + scale_channels(y, self.param("gamma1", nn.initializers.constant(1e-5), (c,)))
        y = gelu(Dense(4 * c, dtype=self.dtype, name="fc1")(LayerNorm(name="ln2")(x)))
        y = Dense(c, dtype=self.dtype, name="fc2")(y)
        return x + scale_channels(y, self.param("gamma2", nn.initializers.constant(1e-5), (c,)))


class Enlarge(nn.Module):
    """Transposed convolution of 2 x 2 at stride 2: each pixel becomes four."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w D"]:
        b, h, w, _ = x.shape
        four = Dense(4 * self.features, dtype=self.dtype, name="fc")(x)
        four = four.reshape(b, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return four.reshape(b, 2 * h, 2 * w, self.features)


class ViT(Backbone):
    """Image to {"res2": ..., "res5": ...} of C / 4, C / 2, C and C channels; DINOv2's ViT-S/14.

    The last tokens, at stride 16, are enlarged by four and two, and halved. Every token looks
    at all others: memory grows with the square of the picture's area.

    Attributes:
      depth, width, heads: blocks, channels of the tokens, and heads of the attention.
      grid: side of the square of positions; they are resampled to the picture's.
    """

    depth: int = 12
    width: int = 384
    heads: int = 6
    grid: int = 37

    @nn.compact
    def __call__(
        self, image: Float[Array, "B h w c"], extent: Int[Array, "B 2"] | None = None
    ) -> dict[str, jax.Array]:
        """Returns the features; `extent`, see `ops`, is of multiples of 32."""
        b = len(image)
        extent = ops.at_stride(extent, STRIDE)
        stem = TokenStem(self.width, self.grid, self.dtype, name="stem")
        first, patches = stem(image, extent)
        h, w = patches.shape[1:3]
        x = jnp.concatenate([first, patches.reshape(b, h * w, self.width)], 1)
        x, there = self.cut(x, 1), None
        if extent is not None:
            own = ops.inside(extent, h, w).reshape(b, h * w)
            there = jnp.concatenate([jnp.ones((b, 1), bool), own], 1)
        ends = {blocks[-1]: stage for stage, blocks in enumerate(self._stages(), start=2)}
        for n in range(self.depth):
            x = TokenBlock(self.heads, self.dtype, name=f"block_{n}")(x, there)
            x = self.cut(x, ends[n]) if n in ends else x
        x = LayerNorm(name="ln")(x)
        tokens = x[:, 1:].reshape(b, h, w, self.width)
        self.sow("intermediates", "tokens", tokens)
        enlarge = functools.partial(Enlarge, dtype=self.dtype)
        y = enlarge(self.width // 2, name="pyramid_res2_0")(tokens)
        y = gelu(LayerNorm(name="ln_pyramid")(y))
        halved = tokens.reshape(b, h // 2, 2, w // 2, 2, self.width)
        return {
            "res2": enlarge(self.width // 4, name="pyramid_res2_1")(y),
            "res3": enlarge(self.width // 2, name="pyramid_res3")(tokens),
            "res4": tokens,
            "res5": jnp.max(jnp.max(halved, 4), 2),
        }

    def _stages(self) -> list[range]:
        """Returns the blocks in four parts."""
        each = math.ceil(self.depth / 4)
        parts = [range(i * each, min((i + 1) * each, self.depth)) for i in range(4)]
        return [part for part in parts if len(part)]

    def stages(self) -> Sequence[Sequence[str]]:
        """Returns the stem, then a quarter of the blocks at a time."""
        parts = [tuple(f"block_{n}/*" for n in part) for part in self._stages()]
        parts[-1] = (*parts[-1], "ln/*")
        return [("stem*",), *parts]

    def layers(self) -> Sequence[Sequence[str]]:
        """Returns the stem, then each block.

        Source: the layer-wise rates of the pyramid's paper.
        """
        return [("stem*",), *((f"block_{n}/*",) for n in range(self.depth))]
