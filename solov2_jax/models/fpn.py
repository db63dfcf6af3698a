"""Feature pyramid network.

Source: detectron2/modeling/backbone/fpn.py, FPN and LastLevelMaxPool.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from solov2_jax import ops
from solov2_jax.models.layers import Conv, xavier_init


class FPN(nn.Module):
    """{"res2".."res5"} to {"p2".."p6"}: lateral 1x1, nearest top-down sum, output 3x3.

    Convolutions have biases and no norm; p6 is p5 subsampled by two.
    """

    channels: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def conv(size, name, x):
            init, dtype = xavier_init, self.dtype
            return Conv(self.channels, size, kernel_init=init, dtype=dtype, name=name)([x])[0]

        out, top = {}, None
        for level in (5, 4, 3, 2):
            x = conv(1, f"lateral{level}", features[f"res{level}"])
            top = x if top is None else x + ops.upsample2x_nearest(top)
            out[f"p{level}"] = conv(3, f"output{level}", top)
        out["p6"] = out["p5"][:, ::2, ::2]
        return {name: out[name] for name in sorted(out)}
