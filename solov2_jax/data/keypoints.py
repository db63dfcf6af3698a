"""Key points of a person_keypoints json, and of any other that names some.

Source: detectron2 data/datasets/coco.py and data/detection_utils.py; AdelaiDet
adet/data/fcpose.
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
    names = keypoint_names(content, annotations)
    ids = annotation_ids(content["annotations"], annotations).tolist()
    known: dict[int | str, np.ndarray] = {}
    with_point: set[int] = set()
    for name, record in zip(ids, content["annotations"], strict=True):
        record["id"] = name
        known[name] = points_of(record, len(names), f"{annotations}: annotation {name}")
        if known[name][:, 2].any() and not record.get("iscrowd", 0):
            with_point.add(record.get("image_id"))
    kept = [i for i in content["images"] if i.get("id") in with_point]
    if not kept:
        raise InputError(
            f"{annotations}: no annotation has a key point; key points need a "
            "person_keypoints json (COCO's is person_keypoints_train2017.json)."
        )
    content["images"] = kept
    content["annotations"] = [r for r in content["annotations"] if r.get("image_id") in with_point]
    dataset = read_coco(images, read_instances(content, annotations))
    points = np.stack([known[i] for i in dataset.annotation_ids.tolist()])
    return dataset, Keypoints(names, mirror_order(names), points)


def keypoints_of(
    dataset: CocoDataset, flip_pairs: Sequence[tuple[str, str]] = ()
) -> tuple[Keypoints, tuple[tuple[int, int], ...]]:
    """Returns the key points of a data set's objects, and the skeleton: pairs of points,
    from 1, that its json says belong together.

    Objects without points, such as those of other classes, have zeros.

    Args:
      flip_pairs: names that change places in a mirrored image; (): left and right by the
        names.

    Raises:
      InputError: for a json without key points, naming the field that it lacks.
    """
    path = dataset.annotation_file
    content = read_content(path)
    names = keypoint_names(content, path)
    ids = annotation_ids(content["annotations"], path).tolist()
    known = {
        name: points_of(record, len(names), f"{path}: annotation {name}")
        for name, record in zip(ids, content["annotations"], strict=True)
    }
    points = [known[i] for i in dataset.annotation_ids.tolist()]
    stacked = np.stack(points) if points else np.zeros((0, len(names), 3), np.float32)
    if not stacked[..., 2].any():
        raise InputError(f"{path}: no object has a key point with flag 1 or 2 in `keypoints`.")
    order = mirror_order(names) if not flip_pairs else _pairs(names, flip_pairs, path)
    return Keypoints(names, order, stacked), _skeleton(content, len(names), path)


def _pairs(names: Sequence[str], pairs: Sequence[tuple[str, str]], path: str) -> np.ndarray:
    order = np.arange(len(names))
    flat = [name for pair in pairs for name in pair]
    if unknown := [name for name in flat if name not in names]:
        raise InputError(
            f"data.flip_pairs: {path} has no key point {unknown[0]!r}; it has {', '.join(names)}."
        )
    if len(set(flat)) < len(flat):
        raise InputError("data.flip_pairs: a key point is in two pairs; name each once.")
    for a, b in pairs:
        order[names.index(a)], order[names.index(b)] = names.index(b), names.index(a)
    return order


def _skeleton(content: dict[str, Any], number: int, path: str) -> tuple[tuple[int, int], ...]:
    """Returns the categories' `skeleton`, () where there is none."""
    for category in content["categories"]:
        skeleton = category.get("skeleton")
        if not category.get("keypoints") or not skeleton:
            continue
        fits = isinstance(skeleton, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(end) is int and 1 <= end <= number for end in pair)
            for pair in skeleton
        )
        if not fits:
            raise InputError(
                f"{path}: `skeleton` of category {category.get('id')} must be pairs of numbers "
                f"from 1 to {number}, the places in its `keypoints`; correct or remove it."
            )
        return tuple((a, b) for a, b in skeleton)
    return ()


def keypoint_names(content: dict[str, Any], path: str) -> tuple[str, ...]:
    """Returns the names of the points, the same in every category that has any."""
    with_points = [c["keypoints"] for c in content["categories"] if c.get("keypoints")]
    for points in with_points:
        named = isinstance(points, list) and all(isinstance(n, str) and n for n in points)
        if not named or len(set(points)) < len(points):
            raise InputError(
                f"{path}: `keypoints` of a category must be a list of different names; correct it."
            )
    lists = {tuple(points) for points in with_points}
    has = any("keypoints" in r for r in content["annotations"])
    if len(lists) > 1:
        raise InputError(
            f"{path}: `categories` have {len(lists)} different lists of `keypoints`; "
            "one data set has one."
        )
    if not lists or not has:
        what = "annotations have no `keypoints`" if lists else "categories name none"
        raise InputError(
            f"{path}: the {what}: it is no person_keypoints json. Key points need "
            "one (COCO's is person_keypoints_train2017.json); data.mapper = '' learns masks alone."
        )
    return next(iter(lists))


def points_of(record: dict[str, Any], number: int, where: str) -> np.ndarray:
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
