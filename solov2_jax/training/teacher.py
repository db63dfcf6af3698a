"""The network that `distill_from` names, as training learns from it: read once, never changed."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from solov2_jax import ops, pretrained
from solov2_jax.checkpoint import load_workdir_config, read_best, read_classes, restore_variables
from solov2_jax.config import changed_keys, input_statistics, load_config
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.structs import Outputs
from solov2_jax.weights.convert import fit, network_shapes
from solov2_jax.weights.hub import open_weights
from solov2_jax.weights.settings import adopt_settings, check_settings

log = logging.getLogger("solov2_jax")

PyTree = Any
# What must be equal, so that the two networks' cells are the same ones.
_SAME = (
    *("model.ins_head.num_grids", "targets.scale_ranges"),
    *("data.channels", "data.value_range"),
)


@dataclass(frozen=True)
class Teacher:
    """A trained network and how to call it on a batch of this run's."""

    variables: PyTree  # numpy arrays
    # (variables, the batch's fields, the network's `extent`) -> outputs, in which no gradient
    # flows.
    outputs: Callable[..., Outputs]


def load_teacher(config: Any, class_names: Sequence[str] | None = None) -> Teacher | None:
    """Returns the network of `distill_from`, None where it is "".

    Of a run, its best checkpoint, or the last where there is no best; the moving average, if
    it has one.

    Args:
      class_names: of this run; None: not compared. A file without names has them, if as many.

    Raises:
      InputError: if there is none, or it has other classes, grids or channels.
    """
    source = config.distill_from
    if not source:
        return None
    own, variables, names, what = _read(config, class_names or ())
    if class_names is not None and tuple(names) != tuple(class_names):
        raise InputError(
            f"distill_from = {source!r}: it was trained on the classes {_listed(names)}, this run "
            f"has {_listed(class_names)}; a teacher needs the same, in the same order"
        )
    for key, (theirs, ours) in changed_keys(own, config).items():
        if key in _SAME:
            raise InputError(
                f"distill_from = {source!r}: its {key} is {theirs}, this run's {ours}; set "
                f"--config.{key} to the teacher's"
            )
    log.info("distill_from: %s teaches", what)
    return Teacher(jax.tree.map(np.asarray, variables), _caller(own, config, len(names)))


def _read(run: Any, classes: Sequence[str]) -> tuple[Any, PyTree, Sequence[str], str]:
    """Returns config, variables, class names and description of a run, of a folder of the hub,
    or of a weights file with its config, as this run's config names it."""
    source, config_file = run.distill_from, run.distill_config
    if config_file:
        weights = open_weights(source, key="distill_from")
        config = load_config(config_file)
        if line := adopt_settings(weights.settings, config, set(), source):
            log.info("%s", line)
        check_settings(weights.settings, config, source)
        if not weights.num_classes:
            raise InputError(
                f"distill_from = {source!r}: has no class layer (a backbone only?), so it cannot "
                "teach; give weights of a whole SOLOv2"
            )
        variables, _ = fit(weights, network_shapes(config, weights.num_classes), strict=True)
        if not weights.class_names and len(classes) == weights.num_classes:
            what = f"{source}, whose classes have no names and count as this run's in their order,"
            return config, variables, classes, what
        names = weights.class_names or [f"class {i + 1}" for i in range(weights.num_classes)]
        return config, variables, names, source
    folder = pretrained.local_folder(source)
    if not folder.is_dir():
        file = os.path.isfile(folder)
        raise InputError(
            f"distill_from = {source!r}: is a file; give its config file as distill_config"
            if file
            else f"distill_from = {source!r}: no such folder; give a run's workdir, hf:USER/REPO, "
            "or a weights file with distill_config"
        )
    if pretrained.is_pretrained(folder):
        found = pretrained.read_pretrained(folder)
        shapes = network_shapes(found.config, len(found.class_names))
        variables, _ = fit(found.weights, shapes, strict=True)
        return found.config, variables, found.class_names, source
    config = load_workdir_config(folder)
    names, _ = read_classes(folder)
    variables, step = restore_variables(folder, "best" if read_best(folder) else "last")
    return config, variables, names, f"{source}, step {step},"


def _caller(own: Any, config: Any, num_classes: int) -> Callable[..., Outputs]:
    """Returns the call of the teacher's network on this run's batches.

    Args:
      own: the teacher's config, whose channel order, mean and std its images have.
    """
    model = build_model(own, num_classes)
    mean, std = input_statistics(own)
    turned = own.input.channel_order != config.input.channel_order and config.data.channels == 3

    def outputs(
        variables: PyTree, batch: dict[str, jax.Array], extent: jax.Array | None = None
    ) -> Outputs:
        image = batch["image"][..., ::-1] if turned else batch["image"]
        image = ops.normalize_image(image, batch["image_size"], mean, std)
        found: Any = model.apply(variables, image, extent)
        return jax.lax.stop_gradient(found)

    return outputs


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")
