"""The two heads: class scores and dynamic kernels on grids, and mask features.

Source: adet/modeling/solov2/solov2.py, SOLOv2InsHead and SOLOv2MaskHead.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.deform import Deform
from solov2_jax.models.layers import Conv, ConvTower, GroupNorm, SharedConv, has_bias, prior_bias

# Of the instance head's inputs, as `split_features` gives them.
STRIDES = (8, 8, 16, 32, 32)

Extent = Int[Array, "B 2"] | None  # see `ops`; here the image's, of multiples of 32


def coords_of(x: jax.Array, extent: Extent = None) -> Float[Array, "B h w 2"]:
    """Returns x and y in [-1, 1] over the whole map."""
    b, h, w, _ = x.shape
    if extent is None:
        return jnp.broadcast_to(jnp.asarray(ops.coord_grid(h, w))[None], (b, h, w, 2))
    return ops.coord_grid_within(extent, h, w)


def append_coords(x: jax.Array, xy: Float[Array, "B h w 2"]) -> jax.Array:
    """Returns `x` with coordinates as its last channels: two, or four if it has few bits.

    In bfloat16 a coordinate is off by up to a sixth of a cell of 168 columns. So it is two
    numbers, whose sum has 16 bits; `SharedConv.split_coords` gives both the same weights.
    """
    if x.dtype == jnp.float32:
        return jnp.concatenate([x, xy], axis=-1)
    bits = jnp.finfo(x.dtype)
    # A conversion there and back may be optimised away; this is not.
    upper = lax.reduce_precision(xy, bits.nexp, bits.nmant)
    parts = [x, upper.astype(x.dtype), (xy - upper).astype(x.dtype)]
    return jnp.concatenate(parts, axis=-1)


def split_features(features: dict[str, jax.Array], extent: Extent = None) -> list[jax.Array]:
    """Returns the instance head's five inputs, at `STRIDES`.

    Source: SOLOv2.split_feats: p2 halved, p6 brought to the size of p5.
    """
    p2, p3, p4, p5, p6 = (features[f"p{i}"] for i in range(2, 7))
    of_p5 = ops.at_stride(extent, 32)
    of_p6 = ops.at_stride(of_p5, 2)
    p6 = ops.resize_bilinear(p6, (p5.shape[1], p5.shape[2]), of_p6, of_p5)
    return [ops.downsample2x_bilinear(p2), p3, p4, p5, p6]


class InstanceHead(nn.Module):
    """Maps each level to a grid of class logits and mask kernels.

    All levels share the weights. Only the kernel tower sees coordinates, which are
    resized to the grid like the features. Class logits are computed in float32: at the
    prior, bfloat16 has steps of 0.03.
    """

    num_classes: int
    num_kernels: int = 256
    num_grids: Sequence[int] = (40, 36, 24, 16, 12)
    channels: int = 512
    num_convs: int = 4
    prior_prob: float = 0.01
    dtype: Dtype = jnp.float32
    norm: str = "gn"  # of the towers; see `ConvTower`, also for the next two
    deform: Deform | None = None
    deform_last: bool = False
    keypoint_kernels: int = 0  # numbers of all kernels of a cell's key points

    @nn.compact
    def __call__(
        self, levels: Sequence[jax.Array], extent: Extent = None
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Returns class logits [B, g, g, K], kernels [B, g, g, E] and those of key points,
        [B, g, g, _] or no level at all, per level."""
        grids, with_coords = [], []
        for x, stride, g in zip(levels, STRIDES, self.num_grids, strict=True):
            of_level = ops.at_stride(extent, stride)
            xy = ops.resize_bilinear(coords_of(x, of_level), (g, g), of_level)
            grids.append(ops.resize_bilinear(x, (g, g), of_level))
            with_coords.append(append_coords(grids[-1], xy))
        prior = prior_bias(self.prior_prob)
        tower = functools.partial(
            ConvTower,
            self.channels,
            self.num_convs,
            self.dtype,
            norm=self.norm,
            deform=self.deform,
            deform_last=self.deform_last,
        )
        conv = functools.partial(SharedConv, kernel_size=3, dtype=self.dtype)
        cate = tower(name="cate_tower")(grids)
        split = levels[0].dtype != jnp.float32
        kernel = tower(split_coords=split, name="kernel_tower")(with_coords)
        cate_pred = conv(self.num_classes, bias_init=prior, dtype=jnp.float32, name="cate_pred")
        cate = cate_pred(cate)
        points = []
        if self.keypoint_kernels:
            points = conv(self.keypoint_kernels, name="keypoint_pred")(kernel)
        return cate, conv(self.num_kernels, name="kernel_pred")(kernel), points


class MaskLevel(nn.Module):
    """`num_ups` times (3x3 convolution, GroupNorm, ReLU, 2x), or one without the 2x."""

    channels: int
    num_ups: int
    dtype: Dtype = jnp.float32
    split_coords: bool = False  # see `SharedConv`; of the first one
    norm: str = "gn"  # or "none", for biases instead
    deform: Deform | None = None  # of all convolutions

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent = None) -> jax.Array:
        """Returns the level at stride 4; `extent` is that of `x`."""
        conv_of = functools.partial(
            Conv,
            self.channels,
            3,
            use_bias=has_bias(self.norm, self.deform),
            dtype=self.dtype,
            deform=self.deform,
        )
        for j in range(max(self.num_ups, 1)):
            conv = conv_of(split_coords=self.split_coords and j == 0, name=f"conv{j}")
            x = conv(x, extent)
            x = nn.relu(GroupNorm(name=f"gn{j}")(x, extent) if self.norm == "gn" else x)
            if self.num_ups:
                x = ops.upsample2x_bilinear(x, extent)
                extent = None if extent is None else 2 * extent
        return x


class MaskHead(nn.Module):
    """p2..p5 to the mask features at stride 4; coordinates are given to p5 only.

    The last norm is there in any case, as in the reference.
    """

    channels: int = 128
    num_kernels: int = 256
    dtype: Dtype = jnp.float32
    norm: str = "gn"  # see `MaskLevel`
    deform: Deform | None = None  # of all convolutions

    @nn.compact
    def __call__(self, features: dict[str, jax.Array], extent: Extent = None) -> jax.Array:
        """Returns non-negative mask features [B, h / 4, w / 4, E]."""
        levels = []
        for i in range(4):
            x = features[f"p{i + 2}"]
            of_level = ops.at_stride(extent, 2 ** (i + 2))
            split = i == 3 and x.dtype != jnp.float32
            x = append_coords(x, coords_of(x, of_level)) if i == 3 else x
            level = MaskLevel(
                self.channels,
                i,
                self.dtype,
                split,
                norm=self.norm,
                deform=self.deform,
                name=f"level{i}",
            )
            levels.append(level(x, of_level))
        total = functools.reduce(jnp.add, levels)
        conv = Conv(
            self.num_kernels,
            1,
            use_bias=has_bias(self.norm, self.deform),
            dtype=self.dtype,
            deform=self.deform,
            name="conv_pred",
        )
        of_result = ops.at_stride(extent, 4)
        return nn.relu(GroupNorm(name="gn_pred")(conv(total, of_result), of_result))
