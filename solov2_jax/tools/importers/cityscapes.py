"""Cityscapes as it is unpacked: gtFine and leftImg8bit, in each a folder for each part.

gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png
leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from solov2_jax.data.annotations import describe
from solov2_jax.data.cityscapes import (
    IMAGE,
    INSTANCE_IDS,
    find_instance_ids,
    read_cityscapes,
    read_instance_ids,
)
from solov2_jax.data.images import is_junk, list_files, read_header
from solov2_jax.io import InputError
from solov2_jax.tools.importers.parts import TEST, DataPart, split_of

GT_FINE, IMAGES = "gtFine", "leftImg8bit"
_NO_OBJECT = 256  # more than the ids of classes: no object is above
_FEW = 3  # pictures by which withheld ground truth is known


def find_folders(folder: Path) -> list[Path]:
    """Returns where gtFine and leftImg8bit are, those of the two that there are.

    In the folder, or each in a folder of its archive's name there; the folder may be
    one of the two itself.
    """
    top = folder.parent if folder.name in (GT_FINE, IMAGES) else folder
    places = [[top / name, *sorted(top.glob(f"*/{name}"))] for name in (GT_FINE, IMAGES)]
    return [next(p for p in each if p.is_dir()) for each in places if any(p.is_dir() for p in each)]


def import_parts(folder: Path) -> list[DataPart]:
    """Returns the parts of a data set.

    [] for a folder that is not Cityscapes'. A part `test` whose ground truth is withheld, as
    the data set's own is, is left out.

    Raises:
      InputError: for an image without ground truth, ground truth without its image, or
        images of another size.
    """
    found = find_folders(folder)
    if len(found) < 2:
        return []
    truths, pictures = found
    names = [p.name for p in sorted(truths.iterdir()) if p.is_dir() and not is_junk(p.name)]
    if not any(find_instance_ids(truths / name) for name in names):
        raise InputError(
            f"{truths}: has no file *{INSTANCE_IDS} in a folder of a part such as {truths}/train; "
            "unpack gtFine_trainvaltest.zip, or make them with cityscapesscripts."
        )
    parts, notes = [], ()
    for name in names:
        paths = find_instance_ids(truths / name)
        split = split_of(name)
        if split == TEST and all(read_instance_ids(p).max() < _NO_OBJECT for p in paths[:_FEW]):
            notes = ("the test part's ground truth is withheld: left out",)
            continue
        _check_pairs(truths / name, pictures / name, paths)
        content = read_cityscapes(truths / name)
        _check_sizes(pictures / name, content["images"])
        parts.append(DataPart("Cityscapes", split, str(pictures / name), content))
    return [replace(part, notes=notes) for part in parts[:1]] + parts[1:]


def check_halves(folder: Path) -> None:
    """Raises InputError for a folder that has one of gtFine and leftImg8bit, or a part of one."""
    absolute = folder.absolute()
    if len(found := find_folders(absolute)) == 1:
        other = IMAGES if found[0].name == GT_FINE else GT_FINE
        raise InputError(
            f"{found[0]}: is Cityscapes' {found[0].name}, and there is no {other} beside it; put "
            f"{found[0].parent / other} there."
        )
    for above in absolute.parents:
        if above.name in (GT_FINE, IMAGES):
            raise InputError(
                f"--data {folder}: is a part of Cityscapes' {above.name}; give the folder that has "
                f"{GT_FINE} and {IMAGES}, {above.parent}."
            )


def _check_pairs(truths: Path, pictures: Path, paths: list[Path]) -> None:
    if not pictures.is_dir():
        raise InputError(f"{pictures}: there is no such folder, which {truths} needs; add it.")
    labelled = {p.relative_to(truths).as_posix().removesuffix(INSTANCE_IDS) for p in paths}
    images = {n.removesuffix(IMAGE) for n in list_files(pictures, [".png"]) if n.endswith(IMAGE)}
    if alone := sorted(labelled - images):
        raise InputError(
            f"{pictures}: {len(alone)} of {len(labelled)} images of {truths} are missing: "
            f"{describe([n + IMAGE for n in alone])}; add them, or remove their ground truth."
        )
    if alone := sorted(images - labelled):
        raise InputError(
            f"{truths}: has no ground truth of {len(alone)} of {len(images)} images in {pictures}: "
            f"{describe([n + INSTANCE_IDS for n in alone])}; add it, or remove the images."
        )


def _check_sizes(pictures: Path, images: list[dict[str, Any]]) -> None:
    for image in images:
        header = read_header(str(pictures / image["file_name"]))
        if (header.height, header.width) != (image["height"], image["width"]):
            raise InputError(
                f"{pictures / image['file_name']}: is {header.height} x {header.width}, and its "
                f"ground truth {image['height']} x {image['width']}; take both of one release."
            )
