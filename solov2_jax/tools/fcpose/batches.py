"""Training batches with key points and semantic masks: FCPose's and BlendMask's data.

The network here reads neither; these are the two branches that the reference's data
loader has besides. Heatmaps are made of the points on the device, see `heatmaps.py`.
Source: AdelaiDet adet/data/dataset_mapper.py and adet/data/fcpose.
"""

import functools
import os
from typing import Any

import numpy as np

from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.pipeline import Batches
from solov2_jax.data.transforms import Affine, Keypoints
from solov2_jax.io import InputError, reading


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
