"""PNG masks: the value of a pixel says to which object it belongs.

Pascal VOC has two files per image: SegmentationObject (the object's number) and
SegmentationClass (its class), both 0 on background and 255 where nothing is said.
Without class files all objects are of one class.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.image_files import opened
from solov2_jax.data.images import list_files, list_images, read_header
from solov2_jax.io import InputError
from solov2_jax.progress import track
from solov2_jax.tools.importers.instances import Instances


def import_masks(
    images: str,
    objects: str,
    classes: str,
    categories: Mapping[int, str],
    void: int | None = None,
    *,
    parts: bool = False,
) -> tuple[Instances, int]:
    """Returns the instances of all images that have a mask, and how many were parted.

    A mask with one value tells object from background and not one object from another.

    Args:
      images: folder; images without a mask file are left out.
      objects: folder of PNG files named as the images.
      classes: folder of PNG files with class values, "" for one class.
      categories: id -> name; the values in the class files are the ids.
      void: value in either file that is neither object nor background.
      parts: take each connected region of a mask with one value for an object, where no
        mask has more than one value.
    """
    if not classes and len(categories) != 1:
        raise InputError(
            f"{len(categories)} class names, but no --classes folder that tells which "
            "object is which; give the folder, or one name."
        )
    pairs = _pair(images, objects)
    instances, parted = Instances(categories), 0
    parts = parts and not classes and all(_has_one_value(path) for _, path in pairs)
    for name, path in track(pairs, "reading masks"):
        header = read_header(os.path.join(images, name))
        instances.add_image(name, header.height, header.width)
        values = _read(path, instances.size, name)
        kinds = None
        if classes:
            file = Path(classes, path.relative_to(objects))
            kinds = _read(file, instances.size, name)
        if parts and values.any():
            values, parted = _regions(values), parted + 1
        for value in np.unique(values).tolist():
            if value in (0, void):
                continue
            mask = values == value
            where = f"{path}: object {value}"
            category = _category(mask, kinds, where, categories, void)
            instances.add_mask(category, mask)
    return instances, parted


def _regions(values: np.ndarray) -> np.ndarray:
    """Returns the number of the region that a pixel is in, 0 for background."""
    from scipy import ndimage  # slow

    regions = np.zeros(values.shape, np.int32)
    ndimage.label(values, np.ones((3, 3)), output=regions)
    return regions


def _has_one_value(path: Path) -> bool:
    """Returns whether a mask has at most one value besides 0."""
    with opened(str(path)) as image:
        values = np.unique(np.asarray(image))
    return len(values[values != 0]) <= 1


def _pair(images: str, objects: str) -> list[tuple[str, Path]]:
    """Returns (image, mask file) of every mask, sorted by the image's name."""
    if not os.path.isdir(objects):
        raise InputError(f"{objects}: no such folder of PNG masks; correct --objects.")
    files = {name[: -len(".png")]: Path(objects, name) for name in list_files(objects, [".png"])}
    if not files:
        raise InputError(f"{objects}: has no PNG files; correct --objects.")
    masks = {os.path.realpath(path) for path in files.values()}
    names: dict[str, str] = {}
    for name in list_images(images):
        stem = os.path.splitext(name)[0]
        if os.path.realpath(os.path.join(images, name)) in masks:
            continue  # masks and images may share a folder
        if names.setdefault(stem, name) != name and stem in files:
            raise InputError(
                f"{images}: {names[stem]} and {name} have the same mask file; rename one."
            )
    alone = sorted(set(files) - set(names))
    if alone:
        raise InputError(
            f"{objects}: {len(alone)} of {len(files)} masks have no image in {images}: "
            f"{describe(alone)}. Correct the folders or remove the masks."
        )
    return [(names[stem], files[stem]) for stem in sorted(files)]


def _read(path: Path, size: tuple[int, int], name: str) -> np.ndarray:
    """Returns the values of a mask, int64 [height, width]."""
    if not path.exists():
        raise InputError(f"{path}: no such mask, which {name} needs.")
    with opened(str(path)) as image:
        mode, values = image.mode, np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise InputError(
            f"{path}: is a picture of mode {mode}; a mask has one whole number per "
            "pixel (palette or grey PNG, 8 or 16 bits). Colours are not numbers: "
            "convert it."
        )
    if values.shape != size:
        raise InputError(
            f"{path}: is {values.shape[0]} x {values.shape[1]}, but its image {name} "
            f"is {size[0]} x {size[1]}; make them equal."
        )
    return values.astype(np.int64)


def _category(
    mask: np.ndarray,
    kinds: np.ndarray | None,
    where: str,
    categories: Mapping[int, str],
    void: int | None,
) -> int:
    """Returns the one class of an object's pixels."""
    if kinds is None:
        return next(iter(categories))
    present = [v for v in np.unique(kinds[mask]).tolist() if v != void]
    if len(present) != 1:
        raise InputError(f"{where}: its pixels have the classes {present}; an object has one.")
    if present[0] not in categories:
        raise InputError(
            f"{where}: is of class {present[0]}, which has no name; there are "
            f"{describe(f'{i} ({n})' for i, n in categories.items())}."
        )
    return present[0]
