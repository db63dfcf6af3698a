"""The weights under which the goldens were computed: a function of name and shape.

A parameter's values are standard normal draws seeded by the CRC of its reference name,
in the reference's layout (OIHW), then scaled by its role: filters sum to zero and
residual branches are damped, so that random weights detect something.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from solov2_jax.models import ResNet, SOLOv2
from solov2_jax.weights.names import from_names
from solov2_jax.weights.tables import ADELAIDET, to_adelaidet

CATE_GAIN, KERNEL_GAIN = 1.5, 0.25  # of the R18 goldens
_CATE = "ins_head.cate_pred.weight"
_FACTORS = {
    "backbone.bottom_up.stem.conv1.weight": 1 / 58,
    "ins_head.kernel_pred.weight": KERNEL_GAIN,
}


def from_adelaidet(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns our flat leaves of an AdelaiDet state dict."""
    return from_names(ADELAIDET, state)[0]


def golden_weight(
    name: str,
    shape: tuple[int, ...],
    last: str = "conv2",
    cate_gain: float = CATE_GAIN,
) -> np.ndarray:
    """Returns the float32 array of a parameter.

    Args:
      last: convolution of a residual branch: "conv3" in bottlenecks.
      cate_gain: of the class logits' filters.
    """
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 4:
        noise -= noise.mean(axis=(1, 2, 3), keepdims=True)
        gain = 1.0 if ".fpn_" in name else 2.0
        noise *= np.sqrt(gain / np.prod(shape[1:]))
        factor = cate_gain if name == _CATE else _FACTORS.get(name, 1.0)
        return np.float32(noise * factor)
    if name.endswith("running_mean"):
        return np.float32(0.05 * noise)
    if name.endswith("running_var"):
        return np.float32(np.exp(0.2 * noise))
    if name == "ins_head.cate_pred.bias":
        return np.float32(-4.595 + 0.1 * noise)
    if name.endswith(".bias"):
        return np.float32(0.05 * noise)
    damped = ".res" in name and name.endswith(f".{last}.norm.weight")
    return np.float32((1 + 0.1 * noise) * (0.3 if damped else 1.0))


@functools.cache
def golden_model() -> tuple[SOLOv2, dict[str, Any]]:
    """Returns the R18 model of 3 classes and its variables."""
    model = SOLOv2(num_classes=3, backbone=ResNet(depth=18))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    ours = {"/".join(k): v for k, v in flatten_dict(shapes).items()}
    # Shapes in the reference's layout: send empty arrays through the naming table.
    empty = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in ours.items()}
    state = {k: golden_weight(k, v.shape) for k, v in to_adelaidet(empty).items()}
    flat = {tuple(k.split("/")): v for k, v in from_adelaidet(state).items()}
    return model, unflatten_dict(flat)
