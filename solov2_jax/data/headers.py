"""What an image file says about itself, without decoding its pixels."""

import dataclasses
import os

from solov2_jax.data.images import opened

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that swap the sides


@dataclasses.dataclass(frozen=True)
class Header:
    """Size of the picture as `images.read_image` returns it, upright."""

    height: int
    width: int
    orientation: int  # of the EXIF tag: 1 upright as stored, 5 to 8 sides swapped


def read_header(path: str) -> Header:
    """Returns size and orientation, or raises one ValueError that names the file."""
    with opened(path) as image:
        width, height = image.size
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    if orientation in _TURNED:
        width, height = height, width
    return Header(height, width, orientation)


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the image files below a folder, sorted, relative to it, with "/"."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder of images.")
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = os.path.relpath(os.path.join(parent, name), folder)
                found.append(path.replace(os.sep, "/"))
    return sorted(found)
