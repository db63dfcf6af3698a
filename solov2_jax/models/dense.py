"""Layers of networks with layer norms: ConvNeXt and transformers."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float

from solov2_jax.models.depthwise import depthwise_conv2d

# Of convolutions and layers in networks with layer norms.
narrow_init = nn.initializers.truncated_normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """Returns x times the normal distribution's integral up to x, not approximated."""
    half = jnp.asarray(0.5, x.dtype)
    return half * x * (1 + lax.erf(x * jnp.asarray(2**-0.5, x.dtype)))


def add_channels(x: Float[Array, "... C"], vector: Float[Array, "C"]) -> Float[Array, "... C"]:
    """Returns x with a vector added at every position."""
    return x + vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def scale_channels(x: Float[Array, "... C"], vector: Float[Array, "C"]) -> Float[Array, "... C"]:
    """Returns x times a vector at every position."""
    return x * vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _product(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


class Dense(nn.Module):
    """Layer over the last axis: a kernel [C, D] and a bias."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        kernel = self.param("kernel", narrow_init, (x.shape[-1], self.features))
        y = _product(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        return add_channels(y, self.param("bias", nn.initializers.zeros, (self.features,)))


class PatchConv(nn.Module):
    """Convolution whose stride is its size: patches beside one another."""

    features: int
    size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ D"]:
        b, h, w, c = x.shape
        n = self.size
        kernel = self.param("kernel", narrow_init, (n, n, c, self.features))
        patches = x.astype(self.dtype).reshape(b, h // n, n, w // n, n, c)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)
        y = _product(patches, kernel.reshape(-1, self.features))
        return add_channels(y, self.param("bias", nn.initializers.zeros, (self.features,)))


class DepthwiseConv(nn.Module):
    """Convolution of each channel by itself, with a bias."""

    kernel_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        y = depthwise_conv2d(x.astype(self.dtype), self.param("kernel", narrow_init, shape))
        return add_channels(y, self.param("bias", nn.initializers.zeros, (channels,)))


class LayerNorm(nn.Module):
    """Normalisation over the channels of each position, statistics in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return add_channels(scale_channels(y, scale), bias).astype(x.dtype)


class PatchStem(nn.Module):
    """Patches of 4 x 4 pixels, then a norm."""

    features: int
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "B h w c"]) -> Float[Array, "B _ _ C"]:
        patches = PatchConv(self.features, 4, self.dtype, name="conv1")(image)
        return LayerNorm(self.epsilon, name="ln")(patches)


def attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B N C"],
    v: Float[Array, "B N C"],
    heads: int,
    there: Bool[Array, "B N"] | None = None,
    bias: Float[Array, "heads N N"] | None = None,
) -> Float[Array, "B N C"]:
    """Returns the mean of the values at all places, by the likeness of query and key.

    Args:
      there: places that are looked at; None: all.
      bias: of the logits of each pair of places; they are in float32.

    Source: torch.nn.functional.scaled_dot_product_attention, in `heads` parts of the channels.
    """
    b, n, c = q.shape
    q, k, v = (x.reshape(b, n, heads, c // heads).transpose(0, 2, 1, 3) for x in (q, k, v))
    scale = jnp.asarray((c // heads) ** -0.5, q.dtype)
    logits = lax.dot_general(q * scale, k, (((3,), (3,)), ((0, 1), (0, 1)))).astype(jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    if there is not None:
        logits = jnp.where(there[:, None, None], logits, -1e9)
    logits = logits - lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp(logits)
    weights = weights / jnp.sum(weights, -1, keepdims=True)
    y = lax.dot_general(weights.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))))
    return y.transpose(0, 2, 1, 3).reshape(b, n, c)
