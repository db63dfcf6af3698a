"""FCPose's and BlendMask's training batches as functions: key points and semantic masks.

A run that learns key points sets `data.mapper = "fcpose"`; this is for networks of one's own.
What makes them is in the core: `data.keypoints`, `data.semantic_masks`, `heatmaps`.

Source: AdelaiDet adet/data/dataset_mapper.py, adet/data/fcpose.
"""

import functools
from typing import Any

from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.keypoints import load_keypoints, mirror_order
from solov2_jax.data.pipeline import Batches
from solov2_jax.data.semantic_masks import read_basis, semantic_mask
from solov2_jax.data.transforms import Keypoints
from solov2_jax.heatmaps import (
    Heatmaps,
    draw_gaussians,
    image_heatmap,
    map_persons,
    person_heatmaps,
)

__all__ = [
    "Heatmaps",
    "build_pose_batches",
    "draw_gaussians",
    "image_heatmap",
    "load_keypoints",
    "map_persons",
    "mirror_order",
    "person_heatmaps",
    "read_basis",
    "semantic_mask",
]


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
