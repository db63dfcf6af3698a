"""What the converted network computes of a picture."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from solov2_jax.config import base_config, check_config, input_statistics
from solov2_jax.config_schema import set_below
from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_backbone, build_model, intermediates
from solov2_jax.models.backbone import LEVELS
from solov2_jax.weights.convert import Report, fit, match, network_shapes
from solov2_jax.weights.settings import check_settings
from solov2_jax.weights.sources import Weights

_OUTPUTS = ("cate", "kernel", "mask_feat")
_BACKBONE = "/backbone/"
# What makes features of several strides of tokens of one.
_PYRAMID = ("params/pyramid", "params/ln_pyramid")


class Detected(NamedTuple):
    """Detections of one picture, the best first: masks are bool [n, h, w]."""

    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray


class Computed(NamedTuple):
    """What a program computed: tensors by name, [1, h, w, C] or [1, cells, C]."""

    tensors: dict[str, np.ndarray]
    detected: Detected | None  # None of a backbone


def config_of(weights: Weights) -> Any:
    """Returns a config of the network that the weights tell by themselves.

    Raises:
      ValueError: if what they tell is no configuration.
    """
    config = base_config()
    with config.unlocked():
        for key, value in weights.settings.items():
            if "." in key and key != "model.num_classes":
                set_below(config, key, tuple(value) if isinstance(value, list) else value)
    check_config(config)
    return config


def example_picture(height: int, width: int) -> np.ndarray:
    """Returns uint8 [h, w, 3]: squares of noise with noise in them, always the same."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 180, (-(-height // 16), -(-width // 16), 3))
    picture = np.kron(squares, np.ones((16, 16, 1), int))[:height, :width]
    return (picture + rng.integers(0, 76, (height, width, 3))).astype(np.uint8)


def normalised(config: Any, picture: np.ndarray) -> np.ndarray:
    """Returns the network's input float32 [1, h, w, 3] of an RGB picture."""
    mean, std = (np.array(x, np.float32) for x in input_statistics(config))
    ordered = picture[..., ::-1] if config.input.channel_order == "BGR" else picture
    return ((ordered - mean) / std).astype(np.float32)[None]


def run_network(config: Any, weights: Weights, picture: np.ndarray) -> tuple[Computed, Report]:
    """Returns what the network computes, and what was loaded.

    Args:
      picture: RGB uint8 [h, w, 3], sides multiples of 32; it is not resized.

    Raises:
      ValueError: if the weights do not fit the config, or fill it with holes.
    """
    check_settings(weights.settings, config, weights.path)
    classes = weights.num_classes
    assert classes is not None
    model = build_model(config, classes)
    variables, report = fit(weights, network_shapes(config, classes), strict=True)

    def apply(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
        found = intermediates(model, variables, image)
        chosen = [f"backbone/{level}" for level in LEVELS]
        chosen += [f"fpn/p{level}" for level in range(2, 7)]
        return {name: found[name] for name in (*chosen, *_OUTPUTS)}

    found = jax.jit(apply)(jax.device_put(variables), jnp.asarray(normalised(config, picture)))
    tensors = {name: np.asarray(x) for name, x in found.items()}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.input.min_size_test, config.input.max_size_test = sorted(picture.shape[:2])
        config.input.buckets_test = ()
    found = build_predictor(config, model, variables, weights.class_names)(picture)
    detected = Detected(np.asarray(found.labels), np.asarray(found.scores), np.asarray(found.masks))
    return Computed(tensors, detected), report


def run_backbone(config: Any, weights: Weights, picture: np.ndarray) -> tuple[Computed, Report]:
    """Returns what the backbone of weights without a class layer computes, and the report.

    Norms and layers that make the FPN's features of the backbone's own, which no classifier
    has, are left out.
    """
    check_settings(weights.settings, config, weights.path)
    flat, report = match(weights, network_shapes(config, 1))
    backbone = build_backbone(config)
    if "out_norm" in {f.name for f in dataclasses.fields(backbone)}:
        backbone = dataclasses.replace(backbone, out_norm=False)
    image = jnp.asarray(normalised(config, picture))
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), image)
    wanted: dict[str, Any] = flatten_dict(shapes, sep="/")
    own = {n.replace(_BACKBONE, "/"): v for n, v in flat.items() if _BACKBONE in n}
    new = [name for name in wanted if name not in own]
    if lacking := [name for name in new if not name.startswith(_PYRAMID)]:
        raise ValueError(f"{weights.path}: the backbone lacks {', '.join(lacking[:4])}")
    own |= {name: np.zeros(wanted[name].shape, np.float32) for name in new}
    variables = unflatten_dict({name: own[name] for name in wanted}, sep="/")
    apply = functools.partial(backbone.apply, mutable=["intermediates"])
    features, state = jax.jit(apply)(jax.device_put(variables), image)
    named = {f"backbone/{level}": features[level] for level in LEVELS}
    if new:
        named = {"backbone/tokens": state["intermediates"]["tokens"][0]}
    return Computed({name: np.asarray(x) for name, x in named.items()}, None), report


def not_finite(computed: Computed) -> list[str]:
    """Returns the names of tensors that hold NaN or infinity."""
    return [name for name, x in computed.tensors.items() if not np.isfinite(x).all()]


def describe(computed: Computed, names: Sequence[str]) -> list[str]:
    """Returns a line for each tensor and for each detection, where nothing is compared."""
    lines = [f"{'tensor':<16}{'shape':<22}{'mean':>10}{'spread':>10}"]
    for name, x in computed.tensors.items():
        shape = "x".join(map(str, x.shape))
        lines.append(f"{name:<16}{shape:<22}{x.mean():>10.4g}{x.std():>10.4g}")
    if computed.detected is not None:
        labels, scores, masks = computed.detected
        lines.append(f"{len(scores)} detections")
        for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
            lines.append(
                f"{i + 1:>4} {names[label]:<20}{score:.4f} {int(masks[i].sum()):>8} pixels"
            )
    return lines


@contextlib.contextmanager
def highest_precision() -> Iterator[None]:
    """Products in float32 also where the device has faster ways."""
    with jax.default_matmul_precision("highest"):
        yield
