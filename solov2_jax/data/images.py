"""Reading any picture as 8-bit RGB, or one clear error that names the file.

What an image file says about itself without its pixels, and which files are images.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from solov2_jax.data import raw_images
from solov2_jax.data.image_files import NO_PICTURES, load_plugins, opened, say_once
from solov2_jax.data.pixel_format import RGB, PixelFormat, Planes
from solov2_jax.io import InputError, reading
from solov2_jax.rle import Size

log = logging.getLogger(__name__)

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and microscopes store in 16
_ORIENTATION, _PHOTOMETRIC = 0x0112, 262  # tags of EXIF and TIFF
_TURNED = (5, 6, 7, 8)  # orientations that swap the sides
_JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")


def image_suffixes() -> tuple[str, ...]:
    """Returns the endings of every format that Pillow decodes by itself, plugins included,
    lower case, sorted."""
    load_plugins()
    known = {*Image.OPEN, "MPO"} - NO_PICTURES
    return tuple(sorted(s for s, kind in Image.EXTENSION.items() if kind in known))


def reuse_memory() -> None:
    """Lets PIL keep the memory of four pictures of up to 16 MB for the next ones: clearing
    fresh pages costs a fifth of reading and resizing a photograph."""
    Image.core.set_blocks_max(4)


def read_image(path: str | os.PathLike[str], pixels: PixelFormat = RGB) -> np.ndarray:
    """Returns the picture as it is shown, uint8 [h, w, 3]: as `open_image` does, or the
    channels that `PixelFormat.to_rgb` chooses."""
    path = os.fspath(path)
    if pixels.is_rgb:
        return np.array(open_image(path))
    return pixels.to_rgb(pixels.scaled(read_values(path, pixels), path))


def read_values(path: str | os.PathLike[str], pixels: PixelFormat) -> np.ndarray:
    """Returns what a predictor takes: the picture's own values [h, w, C], of 8-bit RGB
    `read_image`."""
    path = os.fspath(path)
    if pixels.is_rgb:
        return read_image(path)
    values = raw_images.read_values(path, pixels)
    return values[..., None] if values.ndim == 2 else values


def open_image(path: str) -> Image.Image:
    """Returns the picture, decoded, RGB, upright.

    What the file holds counts, not how its name ends. The EXIF or TIFF orientation is
    applied; of several pages or frames the first is taken, which is said once. Grey,
    palette and CMYK become RGB; transparency is dropped (the colours below it show),
    not blended. 16-bit grey is scaled from the bits that it uses; 16-bit colours are
    divided by 256, and it is said once if that leaves them dark.
    Source: detectron2 data/detection_utils.py, read_image; it leaves 16-bit pictures
    to PIL, which clips them to white.
    """
    with opened(path) as image:
        if _several(image):
            say_once("several pages or frames; of such files the first one is used", path)
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image, path)
        if deep and image.mode not in _SIXTEEN_BIT:
            # Pillow gives the upper byte of 16-bit colours; the lower one is lost.
            largest = max(int(high) for _, high in rgb.getextrema())  # pyright: ignore
            if largest < 64:
                say_once(
                    f"its 16-bit colours reach only {largest} of 255: it will look dark; "
                    "scale such colours to 16 bits",
                    path,
                )
        return rgb


def _several(image: Image.Image) -> bool:
    # The further pictures of MPO (phones' depth maps) and PSD (layers) are no pages.
    return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    """Returns the picture in PIL's mode RGB, loaded."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray(_eight_bits(image, path)).convert("RGB")
    if image.mode == "F":
        raise InputError(
            f"{path}: holds floating-point values, whose range is unknown; convert it "
            "to 8 or 16 bits."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _eight_bits(image: Image.Image, path: str) -> np.ndarray:
    """Returns 16-bit grey as uint8 [h, w]: the upper 8 of the bits that it uses.

    The largest value tells how many, 8, 10, 12, 14 or 16.
    """
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise InputError(f"{path}: has values outside of 0..65535; convert it to 8 or 16 bits.")
    bits = next(b for b in _DEPTHS if grey.max() < 1 << b)
    if bits < 16:
        say_once(f"its largest value is {grey.max()}: taken as {bits} bits, not 16", path)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is 0
        grey = (1 << bits) - 1 - grey
    return (grey >> bits - 8).astype(np.uint8)


def open_sized(
    path: str, height: int, width: int, annotations: str, *, pixels: PixelFormat = RGB
) -> Image.Image | Planes:
    """Returns the picture as `open_image` does, or raises if its size is another.

    Pictures that are not 8-bit RGB come as planes, scaled as `PixelFormat.scaled` says.

    Args:
      height, width: what the json says.
      annotations: the json's name, for the message.
    """
    if pixels.is_rgb:
        image = open_image(path)
    else:
        image = Planes.of(pixels.scaled(read_values(path, pixels), path))
    _check_size(path, (image.height, image.width), (height, width), annotations)
    return image


def read_sized(
    path: str, height: int, width: int, annotations: str, *, pixels: PixelFormat = RGB
) -> np.ndarray:
    """Returns the picture as `read_values` does, or raises if its size is another; args as of
    `open_sized`."""
    image = read_values(path, pixels)
    _check_size(path, (image.shape[0], image.shape[1]), (height, width), annotations)
    return image


def _check_size(path: str, size: Size, expected: Size, annotations: str) -> None:
    (h, w), (height, width) = size, expected
    if size == expected:
        return
    hint = ""
    if (w, h) == (height, width):
        hint = (
            " The sides are swapped: annotations must refer to the picture after its "
            "EXIF orientation is applied."
        )
    raise InputError(
        f"{path}: is {h} x {w} (height x width), but {annotations} says "
        f"{height} x {width}.{hint} Correct `height` and `width` and the annotations, "
        "or replace the image."
    )


@dataclasses.dataclass(frozen=True)
class Header:
    """Size of the picture as `read_image` returns it, upright."""

    height: int
    width: int
    orientation: int  # of the EXIF or TIFF tag: 1 upright as stored, 5 to 8 sides swapped
    several: bool = False  # pages or frames, of which the first is read


def read_header(path: str) -> Header:
    """Returns size and orientation without decoding, or raises one InputError."""
    if (size := raw_images.values_size(path)) is not None:
        return Header(*size, orientation=1)
    with opened(path) as image:
        width, height = image.size
        tag = image.getexif().get(_ORIENTATION)
        orientation = tag if isinstance(tag, int) and 2 <= tag <= 8 else 1
        # Pillow has swapped a TIFF's sides already, but leaves the tag until it decodes.
        if orientation in _TURNED and image.format != "TIFF":
            width, height = height, width
        return Header(height, width, orientation, _several(image))


def is_junk(name: str) -> bool:
    """Returns whether a file or folder is hidden or some system's own."""
    return name.startswith(".") or name.lower() in _JUNK


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the image files below a folder, as `list_files` does."""
    return list_files(folder, image_suffixes())


def list_files(folder: str | os.PathLike[str], suffixes: Sequence[str]) -> list[str]:
    """Returns the files with these endings below a folder, sorted, relative, with "/".

    Hidden and systems' own files are left out. A folder to which several links lead is
    read once, so that links in a circle end; what is no regular file is told and left out.
    """
    top = os.fspath(folder)
    if not os.path.isdir(top):
        raise InputError(f"{folder}: no such folder.")
    names, seen = [], set()
    folders, links = [top], []  # links last: a folder's own name goes first
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with reading(current, "a folder"):
            entries = [e for e in os.scandir(current) if not is_junk(e.name)]
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.name.lower().endswith(tuple(suffixes)):
                if entry.is_file():
                    names.append(os.path.relpath(entry.path, top).replace(os.sep, "/"))
                else:
                    log.warning("%s: left out, it is no regular file", entry.path)
    return sorted(names)
