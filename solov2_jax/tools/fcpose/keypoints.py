"""Key points of a person_keypoints json.

Source: detectron2 data/datasets/coco.py and data/detection_utils.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2_jax.data.annotations import annotation_ids, read_content, read_instances
from solov2_jax.data.coco import CocoDataset, read_coco
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError


def load_keypoints(images: str, annotations: str) -> tuple[CocoDataset, Keypoints]:
    """Returns the images that have a key point, and the points of their objects.

    Objects without key points stay, as long as their image has one of another object.
    In the json a point is a pixel's index; here it is that pixel's middle, 0.5 more, as
    in the reference. The reference draws an image without key points again.

    Args:
      images: folder of the images.
      annotations: a person_keypoints json.
    """
    content = read_content(annotations)
    names = _names(content, annotations)
    ids = annotation_ids(content["annotations"], annotations).tolist()
    known: dict[int | str, np.ndarray] = {}
    with_point: set[int] = set()
    for name, record in zip(ids, content["annotations"], strict=True):
        record["id"] = name
        known[name] = _points(record, len(names), f"{annotations}: annotation {name}")
        if known[name][:, 2].any() and not record.get("iscrowd", 0):
            with_point.add(record.get("image_id"))
    kept = [i for i in content["images"] if i.get("id") in with_point]
    if not kept:
        raise InputError(
            f"{annotations}: no annotation has a key point; FCPose's data needs a "
            "person_keypoints json (COCO's is person_keypoints_train2017.json)."
        )
    content["images"] = kept
    content["annotations"] = [r for r in content["annotations"] if r.get("image_id") in with_point]
    dataset = read_coco(images, read_instances(content, annotations))
    points = np.stack([known[i] for i in dataset.annotation_ids.tolist()])
    return dataset, Keypoints(names, mirror_order(names), points)


def _names(content: dict[str, Any], path: str) -> tuple[str, ...]:
    """Returns the names of the points, the same in every category that has any."""
    lists = {tuple(c["keypoints"]) for c in content["categories"] if c.get("keypoints")}
    has = any("keypoints" in r for r in content["annotations"])
    if len(lists) > 1:
        raise InputError(
            f"{path}: `categories` have {len(lists)} different lists of `keypoints`; "
            "one data set has one."
        )
    if not lists or not has:
        what = "annotations have no `keypoints`" if lists else "categories name none"
        raise InputError(
            f"{path}: the {what}: it is no person_keypoints json. FCPose's data needs "
            "one (COCO's is person_keypoints_train2017.json); SOLOv2 needs none."
        )
    return next(iter(lists))


def _points(record: dict[str, Any], number: int, where: str) -> np.ndarray:
    """Returns an object's points, float32 [J, 3], zeros without any."""
    values = record.get("keypoints") or [0] * (3 * number)
    try:
        points = np.array(values, np.float32).reshape(number, 3)
    except (TypeError, ValueError):
        points = np.full((number, 3), np.nan, np.float32)
    if not np.isfinite(points).all() or not np.isin(points[:, 2], (0, 1, 2)).all():
        raise InputError(
            f"{where}: `keypoints` must be x, y and a flag 0, 1 or 2 for each of the "
            f"{number} points that the category names; correct it."
        )
    points[:, :2] += 0.5
    points[points[:, 2] == 0] = 0
    return points


def mirror_order(names: Sequence[str]) -> np.ndarray:
    """Returns which point each one is in the mirrored image: left is right, int [J]."""
    place = {name: j for j, name in enumerate(names)}
    order = np.arange(len(names))
    for name, j in place.items():
        for a, b in (("left", "right"), ("right", "left")):
            if a in name and name.replace(a, b) in place:
                order[j] = place[name.replace(a, b)]
    return order
