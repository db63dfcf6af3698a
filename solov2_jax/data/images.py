"""Reading any picture as 8-bit RGB, or one clear error that names the file.

What an image file says about itself, without decoding its pixels."""

import contextlib
import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from solov2_jax.data.records import is_records, source

# Others are left out: some run programs (EPS), none holds photographs.
_FORMATS = (*("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000", "PPM"),)
# What PIL's readers raise for files that others made, or broke.
_DAMAGES = (
    *(OSError, SyntaxError, EOFError, struct.error, zlib.error, ValueError, TypeError),
    *(LookupError, OverflowError, AssertionError),
)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class _Refused(ValueError):
    """An error that names its file already."""


def reuse_memory() -> None:
    """Lets PIL keep the memory of four pictures of up to 16 MB for the next ones.

    Fresh memory comes as pages that the kernel clears, at about a fifth of the time
    that reading and resizing a photograph takes.
    """
    Image.core.set_blocks_max(4)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the picture as uint8 [h, w, 3], as `open_image` does."""
    return np.array(open_image(os.fspath(path)))


def open_image(path: str) -> Image.Image:
    """Returns the picture, decoded, RGB, upright.

    What the file holds counts, not how its name ends. The EXIF orientation is applied;
    of an animation the first frame is taken. Grey, palette and CMYK become RGB;
    transparency is dropped (the colours below it show), not blended. 16-bit grey is
    divided by 256.
    Source: detectron2 data/detection_utils.py, read_image; it leaves 16-bit pictures
    to PIL, which clips them to white.
    """
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, path)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Gives the picture, not decoded yet, or raises one ValueError that names it."""
    opened = source(path)  # raises errors of its own
    try:
        with Image.open(opened, formats=_FORMATS) as image:
            _check_pixels(path, image.size)
            yield image
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such image. Correct the path, or the `file_name` and image "
            "folder of the data set."
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not an image; name a file.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: {_why_unknown(path)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_large(path)) from None
    except _Refused:
        raise
    except _DAMAGES as error:
        raise ValueError(
            f"{path}: the image is truncated or damaged ({error}). Fetch it again or "
            "remove it from the data set."
        ) from None


def _why_unknown(path: str) -> str:
    if not is_records(path) and not os.path.getsize(path):
        return "is empty, 0 bytes. Fetch it again or remove it from the data set."
    return (
        "is not an image that can be read (JPEG, PNG, TIFF, BMP, WebP, GIF, AVIF, "
        "JPEG 2000, PPM). Convert it or remove it from the data set."
    )


def _check_pixels(path: str, size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise _Refused(_too_large(path))


def _too_large(path: str) -> str:
    return (
        f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels. Cut it into tiles, "
        "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS."
    )


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    """Returns the picture in PIL's mode RGB, loaded."""
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise _Refused(f"{path}: has values outside of 0..65535; convert it to 8 or 16 bits.")
        return Image.fromarray((grey // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _Refused(
            f"{path}: holds floating-point values, whose range is unknown; convert it "
            "to 8 or 16 bits."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def read_sized(path: str, height: int, width: int, annotations: str) -> np.ndarray:
    """Returns the picture as `read_image` does, or raises as `open_sized` does."""
    return np.array(open_sized(path, height, width, annotations))


def open_sized(path: str, height: int, width: int, annotations: str) -> Image.Image:
    """Returns the picture as `open_image` does, or raises if its size is another.

    Args:
      height, width: what the json says.
      annotations: the json's name, for the message.
    """
    image = open_image(path)
    w, h = image.size
    if (h, w) == (height, width):
        return image
    hint = ""
    if (w, h) == (height, width):
        hint = (
            " The sides are swapped: annotations must refer to the picture after its "
            "EXIF orientation is applied."
        )
    raise ValueError(
        f"{path}: is {h} x {w} (height x width), but {annotations} says "
        f"{height} x {width}.{hint} Correct `height` and `width` and the annotations, "
        "or replace the image."
    )


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
