"""Blocks shared by the backbone and the heads."""

import fnmatch
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float, Int

from solov2_jax import ops
from solov2_jax.models.conv import Kernel, conv2d, conv2d_levels, transform_kernel
from solov2_jax.models.deform import Deform, deform_conv2d, deform_conv2d_levels
from solov2_jax.models.depthwise import depthwise_conv2d
from solov2_jax.models.group_norm import group_norm_levels
from solov2_jax.models.grouped import grouped_conv2d

NORMS = ("frozen_bn", "gn", "sync_bn")  # of the backbone

# The reference's initialisers. MSRA: He, fan out, normal. Caffe2's Xavier, used by the
# FPN, is uniform in +-sqrt(3 / fan_in).
msra_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
xavier_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
head_init = nn.initializers.normal(0.01)
# Of the norm that ends a residual branch, when training starts from random weights: a
# frozen norm does not normalise, and at scale 1 each block would double the variance.
residual_scale_init = nn.initializers.constant(0.3)


def prior_bias(probability: float) -> Initializer:
    """Returns the initialiser of a class layer's bias, by which each class is so likely."""
    return nn.initializers.constant(-math.log(1 / probability - 1))


def _transformed(
    module: nn.Module, make_kernel: Callable[[], Kernel], xs: Sequence[jax.Array], stride: int = 1
) -> Kernel:
    """Returns `make_kernel()`, or the form of it in the collection "transformed".

    Applying a model with that collection mutable returns it: whatever depends on the
    parameters only, computed once for many calls without gradients. The parameters
    "kernel" for which it has an entry are not needed then.
    """
    if module.has_variable("transformed", "kernel"):
        return module.get_variable("transformed", "kernel")
    kernel = make_kernel()
    if module.is_mutable_collection("transformed") and not module.is_initializing():
        kernel = transform_kernel(kernel, xs, stride)
        module.put_variable("transformed", "kernel", kernel)
    return kernel


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics and affine part never change.

    Source: detectron2/layers/batch_norm.py, FrozenBatchNorm2d (epsilon 1e-5).
    """

    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """Returns (factor, shift), float32 [C] each: the norm is factor * x + shift."""
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        # The reference's default makes variance + epsilon exactly 1.
        var = self.variable("batch_stats", "var", lambda: jnp.full((channels,), 1 - self.epsilon))
        factor = scale * lax.rsqrt(var.value + self.epsilon)
        return lax.stop_gradient((factor, bias - mean.value * factor))


class BatchNorm(FrozenBatchNorm):
    """Batch normalisation that is trained ("sync_bn"), with a frozen one's variables.

    The statistics are those of the global batch: the compiler adds the devices up, or,
    inside `jax.shard_map`, this norm does. With the collection "moments" mutable, they are
    put there too, unmixed.

    Source: torch.nn.SyncBatchNorm (momentum 0.1, unbiased running variance).
    """

    momentum: float = 0.1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        axes = jax.sharding.get_abstract_mesh().manual_axes

        def total(of_rows: jax.Array) -> jax.Array:
            return lax.psum(of_rows, axes) if axes else of_rows

        pixels = x.size // channels if extent is None else jnp.sum(extent[:, 0] * extent[:, 1])
        count = total(jnp.asarray(pixels, jnp.float32))
        mean = total(jnp.sum(ops.zero_outside(y, extent), (0, 1, 2))) / count
        deviation = ops.zero_outside(y - mean[None, None, None], extent)
        var = total(jnp.sum(jnp.square(deviation), (0, 1, 2))) / count
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        of_batch = {"mean": mean, "var": unbiased}
        for name, value in of_batch.items():
            old = self.get_variable("batch_stats", name)
            new = old + self.momentum * (lax.stop_gradient(value) - old)
            self.put_variable("batch_stats", name, new)
            if self.is_mutable_collection("moments"):
                self.put_variable("moments", name, value)
        factor = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * factor
        return (y * factor[None, None, None] + shift[None, None, None]).astype(x.dtype)


class OffsetConv(nn.Module):
    """The convolution that says where the taps of a deformable one read: nowhere else, at first.

    Source: mmcv/ops/modulated_deform_conv.py, ModulatedDeformConv2dPack; deform_conv.py,
    DeformConv2dPack.
    """

    kernel_size: int
    deform: Deform
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xs: Sequence[Float[Array, "B _ _ C"]]
    ) -> list[tuple[jax.Array, jax.Array | None]]:
        """Returns (offset, mask) of each level, as `deform_conv2d` takes them, in float32."""
        k, zeros = self.kernel_size, nn.initializers.zeros
        offsets = 2 * k * k * self.deform.groups
        channels = offsets * 3 // 2 if self.deform.version == 2 else offsets
        shape = (k, k, xs[0].shape[-1], channels)
        xs = [x.astype(self.dtype) for x in xs]

        def kernel() -> jax.Array:
            return self.param("kernel", zeros, shape)

        ys = conv2d_levels(xs, _transformed(self, kernel, xs, self.stride), self.stride)
        bias = self.param("bias", zeros, (channels,))
        ys = [y.astype(jnp.float32) + bias[None, None, None] for y in ys]
        if self.deform.version == 1:
            return [(y, None) for y in ys]
        return [(y[..., :offsets], nn.sigmoid(y[..., offsets:])) for y in ys]


class ConvNorm(nn.Module):
    """Convolution without bias, then a norm.

    A frozen batch norm is folded into the kernel, so that it costs nothing; group norm
    ("gn") is for training from random weights, where a frozen norm does not normalise.
    "sync_bn" is trained where the collection "batch_stats" is mutable, else as frozen.

    Attributes:
      frozen: patterns of names of parameters that are not trained, such as "backbone/res3_*";
        a norm whose parameters all match keeps its statistics, and normalises by them.
      groups: of channels that are convolved by themselves.
      deform: how the convolution is deformed, None: not at all.
    """

    features: int
    kernel_size: int
    stride: int = 1
    norm: str = "frozen_bn"
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = msra_init
    groups: int = 1
    deform: Deform | None = None
    scale_init: Initializer = nn.initializers.ones
    frozen: Sequence[str] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B _ _ D"]:
        """Returns the normalised result; `extent`, see `ops`, is that of `x`."""
        k = self.kernel_size
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        if self.norm not in NORMS:
            raise ValueError(f"model.backbone.norm is {self.norm!r}; choose one of {NORMS}")
        x, factor, shift = x.astype(self.dtype), None, None
        mutable = self.is_mutable_collection("batch_stats")
        trained = self.norm == "sync_bn" and mutable and not self.is_initializing()
        trained = trained and not self._norm_is_frozen()
        if self.norm != "gn" and not trained:
            norm = FrozenBatchNorm(scale_init=self.scale_init, name="norm")
            factor, shift = norm(self.features)

        def folded_kernel() -> jax.Array:
            kernel = self.param("kernel", self.kernel_init, shape)
            return kernel if factor is None else kernel * factor[None, None, None]

        x = ops.zero_outside(x, extent) if k > 1 else x
        y = self._convolve(x, folded_kernel)
        extent = ops.at_stride(extent, self.stride)
        if trained:
            return BatchNorm(scale_init=self.scale_init, name="norm")(y, extent)
        if shift is None:
            return GroupNorm(scale_init=self.scale_init, name="norm")(y, extent)
        return y + shift.astype(self.dtype)[None, None, None]

    def _convolve(self, x: jax.Array, make_kernel: Callable[[], jax.Array]) -> jax.Array:
        if self.deform is not None:
            of_x = OffsetConv(self.kernel_size, self.deform, self.stride, self.dtype, name="offset")
            offset, mask = of_x([x])[0]
            kernel = make_kernel().astype(x.dtype)
            strides = {"stride": self.stride, "groups": self.groups}
            return deform_conv2d(x, kernel, offset, mask, **strides)
        if self.groups > 1 and self.groups == self.features == x.shape[-1]:
            return depthwise_conv2d(x, make_kernel(), self.stride)
        if self.groups > 1:
            return grouped_conv2d(x, make_kernel(), self.stride, self.groups)
        return conv2d(x, _transformed(self, make_kernel, [x], self.stride), self.stride)

    def _norm_is_frozen(self) -> bool:
        names = ["/".join((*self.path, "norm", name)) for name in ("scale", "bias")]
        return all(any(fnmatch.fnmatchcase(n, p) for p in self.frozen) for n in names)


class SharedConv(nn.Module):
    """Convolution with an optional bias, the same one for each of a list of levels."""

    features: int
    kernel_size: int
    use_bias: bool = True
    kernel_init: Initializer = head_init
    bias_init: Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32
    # The last two channels come twice: the upper and the lower half of float32 values.
    split_coords: bool = False
    deform: Deform | None = None  # how it is deformed

    @nn.compact
    def __call__(self, xs: Sequence[Float[Array, "B _ _ C"]]) -> list[Float[Array, "B _ _ D"]]:
        return self._convolve(xs)

    def _convolve(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        ys = self._plain(xs) if self.deform is None else self._deformed(xs, self.deform)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            ys = [y + bias.astype(self.dtype)[None, None, None] for y in ys]
        return ys

    def _deformed(self, xs: Sequence[jax.Array], deform: Deform) -> list[jax.Array]:
        if self.split_coords:
            xs = [join_coords(x) for x in xs]
        shape = (self.kernel_size, self.kernel_size, xs[0].shape[-1], self.features)
        offsets = OffsetConv(self.kernel_size, deform, dtype=xs[0].dtype, name="offset")(xs)
        kernel = self.param("kernel", self.kernel_init, shape).astype(xs[0].dtype)
        return [y.astype(self.dtype) for y in deform_conv2d_levels(xs, kernel, offsets)]

    def _plain(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        k = self.kernel_size
        shape = (k, k, xs[0].shape[-1] - 2 * self.split_coords, self.features)
        xs = [x.astype(self.dtype) for x in xs]

        def kernel() -> jax.Array:
            kernel = self.param("kernel", self.kernel_init, shape)
            if self.split_coords:
                kernel = jnp.concatenate([kernel, kernel[:, :, -2:]], axis=2)
            return kernel

        return conv2d_levels(xs, _transformed(self, kernel, xs))


def join_coords(x: Float[Array, "B h w C"]) -> Float[Array, "B h w _"]:
    """Returns float32 whose last two channels are the sums of the last four halves."""
    x = x.astype(jnp.float32)
    return jnp.concatenate([x[..., :-4], x[..., -4:-2] + x[..., -2:]], axis=-1)


class Conv(SharedConv):
    """Convolution with an optional bias."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w D"]:
        """Returns the convolution; see `ops` for `extent`."""
        reads_beside = self.kernel_size > 1 or self.deform is not None
        return self._convolve([ops.zero_outside(x, extent) if reads_beside else x])[0]


class GroupNorm(nn.Module):
    """Group normalisation with torch's epsilon (Flax's own default is 1e-6)."""

    groups: int = 32
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        scale, bias = self._affine(x.shape[-1])
        return ops.group_norm(x, scale, bias, self.groups, self.epsilon, extent)

    def _affine(self, channels: int) -> tuple[jax.Array, jax.Array]:
        if channels % self.groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {self.groups} "
                "groups; choose channels that are a multiple of it"
            )
        scale = self.param("scale", self.scale_init, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))


class SharedGroupNorm(GroupNorm):
    """Group normalisation with one affine part, of each of a list of levels by itself."""

    @nn.compact
    def __call__(
        self, xs: Sequence[Float[Array, "B _ _ C"]], extents: Sequence[Int[Array, "B 2"]] = ()
    ) -> list[Float[Array, "B _ _ C"]]:
        """Returns the levels; `extents`, see `ops`, are theirs."""
        scale, bias = self._affine(xs[0].shape[-1])
        return group_norm_levels(xs, scale, bias, self.groups, self.epsilon, extents)


class ConvTower(nn.Module):
    """`depth` times (3x3 convolution, GroupNorm, ReLU), the same for a list of levels.

    Attributes:
      norm: "gn", or "none" for biases instead.
      deform: of which convolutions, all of them or the last only: see `deform_last`.
    """

    features: int
    depth: int
    dtype: Dtype = jnp.float32
    split_coords: bool = False  # see `SharedConv`; of the first one
    norm: str = "gn"
    deform: Deform | None = None
    deform_last: bool = False

    @nn.compact
    def __call__(
        self, xs: Sequence[jax.Array], extents: Sequence[Int[Array, "B 2"]] = ()
    ) -> list[jax.Array]:
        """Returns the levels; `extents`, see `ops`, are theirs, of a tower that is not deformed."""
        for i in range(self.depth):
            if extents:
                xs = [ops.zero_outside(x, e) for x, e in zip(xs, extents, strict=True)]
            deform = None if self.deform_last and i < self.depth - 1 else self.deform
            xs = SharedConv(
                self.features,
                3,
                use_bias=has_bias(self.norm, deform),
                dtype=self.dtype,
                split_coords=self.split_coords and i == 0,
                deform=deform,
                name=f"conv{i}",
            )(xs)
            xs = SharedGroupNorm(name=f"gn{i}")(xs, extents) if self.norm == "gn" else xs
            xs = [nn.relu(x) for x in xs]
        return list(xs)


def has_bias(norm: str, deform: Deform | None) -> bool:
    """Returns whether a head's convolution has a bias."""
    return norm == "none" or (deform is not None and deform.bias)
