"""Transforms of the library albumentations as functions of `augment.custom`.

Image, masks and key points go through together; boxes become those of the masks. The
library is imported only where a config names one of its transforms.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from solov2_jax.data.augment import Sample
from solov2_jax.data.transforms import clear_outside

_LIBRARY = "albumentations"


def is_transform(value: Any) -> bool:
    """Whether a value is a transform of albumentations, or the class of one."""
    kind = value if isinstance(value, type) else type(value)
    return any(c.__module__.partition(".")[0] == _LIBRARY for c in kind.__mro__)


def adapt(transform: Any) -> Callable[[Sample], Sample]:
    """Returns the function from Sample to Sample that a transform is.

    Args:
      transform: a transform, a `Compose` of some, or a transform's class, which is made with
        its defaults. What a `Compose` says of boxes and key points is replaced.
    """
    import albumentations as A

    made = transform() if isinstance(transform, type) else transform
    whole = isinstance(made, A.Compose)
    steps = list(made.transforms) if whole else [made]
    moves = [leaf for leaf in _leaves(steps) if "masks" in leaf.available_keys]
    boxes = any("bboxes" in leaf.available_keys for leaf in moves)
    points = any("keypoints" in leaf.available_keys for leaf in moves)
    composed = A.Compose(
        steps,
        # Objects keep their places: what is gone from sight has no pixel left.
        bbox_params=A.BboxParams("pascal_voc", label_fields=["owner"], clip=True)
        if boxes
        else None,
        keypoint_params=A.KeypointParams("xy", remove_invisible=False) if points else None,
        p=made.p if whole else 1.0,
    )
    own = threading.local()  # a transform draws from a state of its own
    without_points = [type(t).__name__ for t in moves if "keypoints" not in t.available_keys]

    def apply(sample: Sample) -> Sample:
        if sample.keypoints is not None and without_points:
            raise ValueError(f"{', '.join(without_points)} cannot move key points")
        if not hasattr(own, "composed"):
            own.composed = copy.deepcopy(composed)
        own.composed.set_random_seed(int(sample.rng.integers(2**31)))
        return _apply(own.composed, sample, boxes=boxes, moves=bool(moves), points=points)

    return apply


def _leaves(transforms: Any) -> list[Any]:
    """Returns the transforms in a list, those within `OneOf`, `Compose` and others too."""
    found = []
    for each in transforms:
        found += _leaves(each.transforms) if hasattr(each, "transforms") else [each]
    return found


def _apply(composed: Any, sample: Sample, *, boxes: bool, moves: bool, points: bool) -> Sample:
    """Returns the sample, changed; `boxes`, `moves`, `points`: what the transforms take."""
    image, number = sample.image, len(sample.labels)
    is_float = image.dtype == np.float32
    fields: dict[str, Any] = {"image": image / np.float32(255) if is_float else image}
    if boxes:
        visible = sample.boxes[:, 2:] > sample.boxes[:, :2]
        owner = np.flatnonzero(visible.all(axis=1))
        fields |= {"bboxes": sample.boxes[owner], "owner": owner.tolist()}
    if moves and number:
        fields["masks"] = sample.masks.astype(np.uint8)
    if points:
        known = np.zeros((0, 2)) if sample.keypoints is None else sample.keypoints[..., :2]
        fields["keypoints"] = known.reshape(-1, 2)
    done = composed(**fields)
    image = done["image"]
    sample.image = (image * np.float32(255)).astype(np.float32) if is_float else image
    size = image.shape[:2]
    if not moves:
        return sample
    if number:
        masks = np.asarray(done["masks"]).reshape(number, *size)
        sample.masks = np.ascontiguousarray(masks != 0)
    else:
        sample.masks = np.zeros((0, *size), bool)
    if points and sample.keypoints is not None:
        moved = sample.keypoints.copy()
        moved[..., :2] = np.reshape(done["keypoints"], (*moved.shape[:2], -1))[..., :2]
        sample.keypoints = clear_outside(moved, size)
    return sample
