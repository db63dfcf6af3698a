"""Training batches with key points and semantic masks: FCPose's and BlendMask's data.

The network here reads neither; these are the two branches that the reference's data
loader has besides. Heatmaps are made of the points on the device, see `heatmaps.py`.
Source: AdelaiDet adet/data/dataset_mapper.py and adet/data/fcpose; detectron2
data/datasets/coco.py and data/detection_utils.py.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2_jax.data.annotations import annotation_ids, read_content, read_instances
from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import CocoDataset, read_coco
from solov2_jax.data.pipeline import Batches
from solov2_jax.data.transforms import Affine, Keypoints
from solov2_jax.io import InputError, reading


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


def semantic_mask(dataset: CocoDataset, index: int, affine: Affine, folder: str) -> np.ndarray:
    """Returns the class of each pixel of an image, moved to the nearest pixel, uint8 [h, w].

    Args:
      folder: with a .npz file for each image.
    """
    name = os.path.splitext(str(dataset.file_names[index]))[0] + ".npz"
    return affine.move_nearest(read_basis(os.path.join(folder, name), affine.original))


def read_basis(path: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the `mask` of a .npz file, uint8 [height, width].

    Args:
      size: (height, width) that it must have.
    """
    fix = (
        "There must be a .npz file with an array `mask` for every image: "
        "numpy.savez_compressed(path, mask=mask)"
    )
    with reading(path, "a semantic mask", fix), np.load(path, allow_pickle=False) as arrays:
        mask = arrays["mask"]
    whole = mask.dtype.kind in "ui" and mask.min(initial=0) >= 0
    if mask.shape != size or not whole or mask.max(initial=0) > 255:
        raise InputError(
            f"{path}: `mask` is {mask.dtype} {mask.shape}; it must be whole numbers of "
            f"0 to 255 of the image's size {size}."
        )
    return mask.astype(np.uint8)


def build_pose_batches(
    config: Any,
    dataset: CocoDataset,
    keypoints: Keypoints | None,
    *,
    basis: str = "",
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Returns `build_train_batches`' batches with key points and semantic masks.

    `keypoints`, float32 [B, G, J, 3]: x, y in input pixels and the flag, zeros on
    padding; `basis_sem`, uint8 [B, h, w]: the class of each pixel, 0 on padding.

    Args:
      keypoints: as `load_keypoints` returns them, or None.
      basis: folder with a .npz file for each image, "" for none.
    """
    maps = {"basis_sem": functools.partial(semantic_mask, folder=basis)} if basis else None
    return build_train_batches(
        config, dataset, start_step, shard, keypoints=keypoints, pixel_maps=maps
    )
