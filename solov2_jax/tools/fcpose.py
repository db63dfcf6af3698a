"""Training batches with key points and semantic masks: FCPose's and BlendMask's data.

The network here reads neither; these are the two branches that the reference's data
loader has besides. A person of an image of 800 x 1344 has heatmaps of 2 x 17 x 400 x 672
values at stride 2, 37 MB; the reference makes them for all persons, in the data loader.
Here a batch carries the points, and maps are made on the device, for as few persons at a
time as fit.

Shapes: J key points, P persons; h, w the padded input.
Source: AdelaiDet adet/data/dataset_mapper.py, adet/data/fcpose and
adet/data/detection_utils.py, HeatmapGenerator; detectron2 data/datasets/coco.py and
data/detection_utils.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from solov2_jax.data.annotations import annotation_ids, read_content, read_instances
from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import CocoDataset, read_coco
from solov2_jax.data.pipeline import Batches
from solov2_jax.data.semantic_masks import read_basis, semantic_mask
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError

__all__ = ["build_pose_batches", "load_keypoints", "read_basis", "semantic_mask"]

T = TypeVar("T")


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


# --- Heatmaps, on the device ---------------------------------------------------------

# The reference's defaults [MODEL.FCPOSE.GT_HEATMAP_STRIDE, HEATMAP_SIGMA,
# HEAD_HEATMAP_SIGMA]; the basis maps' stride is fixed there, their sigma the half.
STRIDE, BASIS_STRIDE = 2, 8
SIGMA, HEAD_SIGMA = 1.8, 0.01


@struct.dataclass
class Heatmaps:
    """The reference's three sets for one person."""

    keypoint: Float[Array, "J h2 w2"]  # `keypoint_heatmap`, stride 2
    head: Float[Array, "J h2 w2"]  # `head_heatmap`, 1 in the point's own pixel
    basis: Float[Array, "J h8 w8"]  # `p3_output_list`, stride 8


def person_heatmaps(
    points: Float[Array, "J 3"],
    size: tuple[int, int],
    *,
    sigma: float = SIGMA,
    head_sigma: float = HEAD_SIGMA,
) -> Heatmaps:
    """Returns the maps of one person.

    Args:
      points: x, y in input pixels, and a flag that is above 0 where there is a point.
      size: (h, w) of the padded input, multiples of 32.
      sigma, head_sigma: of the gaussians, in pixels of the map; half of `sigma` at
        stride 8.
    """
    return Heatmaps(
        keypoint=draw_gaussians(points, size, STRIDE, sigma),
        head=draw_gaussians(points, size, STRIDE, head_sigma),
        basis=draw_gaussians(points, size, BASIS_STRIDE, sigma / 2),
    )


def draw_gaussians(
    points: Float[Array, "J 3"], size: tuple[int, int], stride: int, sigma: float
) -> Float[Array, "J a b"]:
    """Returns a map per key point: a gaussian around its pixel, cut off as a square.

    The square reaches round(3 sigma) + 1 pixels. A point outside of the map, or
    without the flag, gives zeros. A point's pixel is the integer part of its place, so
    that one less than a pixel left of the map counts as inside, as in the reference.
    """
    h, w = size[0] // stride, size[1] // stride
    window = _window(sigma)
    reach = len(window) // 2
    pixel = jnp.trunc(points[:, :2] / stride).astype(jnp.int32)
    inside = _inside(pixel, (h, w)) & (points[:, 2] > 0)
    dy = jnp.arange(h)[None] - pixel[:, 1:] + reach  # [J, h]
    dx = jnp.arange(w)[None] - pixel[:, :1] + reach
    rows = (dy >= 0) & (dy < len(window)) & inside[:, None]
    columns = (dx >= 0) & (dx < len(window))
    table = jnp.asarray(window)
    last = len(window) - 1
    picked = table[jnp.clip(dy, 0, last)[:, :, None], jnp.clip(dx, 0, last)[:, None]]
    return jnp.where(rows[:, :, None] & columns[:, None], picked, 0.0)


def _window(sigma: float) -> Float[np.ndarray, "k k"]:
    """Returns the gaussian's values, made in float64 as there, as float32."""
    reach = int(np.round(3 * sigma)) + 1
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    square = x[None] ** 2 + x[:, None] ** 2
    with np.errstate(under="ignore"):
        return np.exp(-square / (2 * sigma**2)).astype(np.float32)


def _inside(pixel: Int[Array, "J 2"], size: tuple[int, int]) -> Bool[Array, "J"]:
    x, y = pixel[:, 0], pixel[:, 1]
    return (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])


def map_persons(
    function: Callable[[Heatmaps], T],
    points: Float[Array, "P J 3"],
    size: tuple[int, int],
    *,
    together: int = 1,
    sigma: float = SIGMA,
    head_sigma: float = HEAD_SIGMA,
) -> T:
    """Returns `function` of every person's maps, stacked; few maps exist at a time.

    Args:
      function: from one person's maps to something small, as a loss.
      together: persons whose maps exist at the same time.
    """

    def one(person: Float[Array, "J 3"]) -> T:
        maps = person_heatmaps(person, size, sigma=sigma, head_sigma=head_sigma)
        return function(maps)

    return jax.lax.map(one, points, batch_size=together)


def image_heatmap(
    points: Float[Array, "P J 3"], size: tuple[int, int], stride: int, sigma: float
) -> Float[Array, "J a b"]:
    """Returns the maximum over the persons of an image, zeros without any.

    One person's maps exist at a time.
    """
    start = jnp.zeros((points.shape[1], size[0] // stride, size[1] // stride))

    def add(image: Array, person: Array) -> tuple[Array, None]:
        return jnp.maximum(image, draw_gaussians(person, size, stride, sigma)), None

    return jax.lax.scan(add, start, points)[0]
