"""Weights against a whole config: the network it describes, and its settings."""

from typing import Any

import jax
import jax.numpy as jnp

from solov2_jax.models import build_model
from solov2_jax.weights.convert import Report, match
from solov2_jax.weights.names import Flat
from solov2_jax.weights.settings import check_config
from solov2_jax.weights.sources import Weights


def network_shapes(config: Any, num_classes: int) -> dict[str, Any]:
    """Returns the variables' shapes of the network that the config describes."""
    model = build_model(config, num_classes)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def check_network(
    config: Any, weights: Weights, strict: bool = False
) -> tuple[Flat, Report]:
    """Returns (leaves that fit the config's network, report); nothing is computed.

    With `model.num_classes` 0 the network has the weights' classes.
    """
    check_config(weights.settings, config, weights.path)
    classes = config.model.num_classes or weights.num_classes or 1
    return match(weights, network_shapes(config, classes), strict=strict)
