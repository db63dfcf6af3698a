"""Semantic masks on disk: the class of each pixel, one .npz file for each image.

Source: AdelaiDet adet/data/dataset_mapper.py, DatasetMapperWithBasis, `basis_sem`.
"""

import os

import numpy as np

from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.transforms import Affine
from solov2_jax.io import InputError, reading

UNKNOWN = 255  # the value of pixels that teach nothing


def semantic_mask(dataset: CocoDataset, index: int, affine: Affine, folder: str) -> np.ndarray:
    """Returns the class of each pixel of an image, moved to the nearest pixel, uint8 [h, w].

    Args:
      folder: with a .npz file for each image.
    """
    name = os.path.splitext(str(dataset.file_names[index]))[0] + ".npz"
    return affine.move_nearest(read_basis(os.path.join(folder, name), affine.original))


def known_classes(dataset: CocoDataset, index: int, affine: Affine, folder: str) -> np.ndarray:
    """Returns `semantic_mask`, whose values must be 0, a class's place from 1 on, or 255."""
    mask = semantic_mask(dataset, index, affine, folder)
    classes = len(dataset.class_names)
    if (unknown := mask[(mask > classes) & (mask != UNKNOWN)]).size:
        raise InputError(
            f"{folder}: the semantic mask of {dataset.file_names[index]} has the value "
            f"{int(unknown[0])}; with {classes} classes it must have 0 on background, 1 to "
            f"{classes} for the classes by their ids, and {UNKNOWN} where no one knows."
        )
    return mask


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
