"""Reading any picture as 8-bit RGB, or one clear error that names the file.

What an image file says about itself without its pixels, and which files are images.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from solov2_jax.data.records import is_records, source
from solov2_jax.io import InputError, reading

log = logging.getLogger(__name__)

# Left out of what Pillow opens: what it cannot decode without other programs or packages,
# and what it takes any file for, because the format has no signature.
_NO_PICTURES = {
    *("BUFR", "EPS", "FPX", "GRIB", "HDF5", "IM", "IPTC", "MIC", "MPEG", "PCD", "PDF"),
    *("SPIDER", "WMF", "XVTHUMB"),
}
_BY_NAME = {"TGA": (".tga", ".icb", ".vda", ".vst")}  # no signature either: by the ending
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and microscopes store in 16
_ORIENTATION, _PHOTOMETRIC = 0x0112, 262  # tags of EXIF and TIFF
_TURNED = (5, 6, 7, 8)  # orientations that swap the sides
_JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")

# Pixels of the largest picture that is read; None: Pillow's own limit.
max_pixels: int | None = None


@functools.cache
def _load_plugins() -> None:
    """Makes Pillow know all of its formats, and HEIF where pillow-heif is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


def image_suffixes() -> tuple[str, ...]:
    """Returns the endings of every format that Pillow decodes by itself, plugins included,
    lower case, sorted."""
    _load_plugins()
    known = {*Image.OPEN, "MPO"} - _NO_PICTURES
    return tuple(sorted(s for s, kind in Image.EXTENSION.items() if kind in known))


def reuse_memory() -> None:
    """Lets PIL keep the memory of four pictures of up to 16 MB for the next ones: clearing
    fresh pages costs a fifth of reading and resizing a photograph."""
    Image.core.set_blocks_max(4)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the picture as uint8 [h, w, 3], as `open_image` does."""
    return np.array(open_image(os.fspath(path)))


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
            _say_once("several pages or frames; of such files the first one is used", path)
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image, path)
        if deep and image.mode not in _SIXTEEN_BIT:
            # Pillow gives the upper byte of 16-bit colours; the lower one is lost.
            largest = max(int(high) for _, high in rgb.getextrema())  # pyright: ignore
            if largest < 64:
                _say_once(
                    f"its 16-bit colours reach only {largest} of 255: it will look dark; "
                    "scale such colours to 16 bits",
                    path,
                )
        return rgb


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Gives the picture, not decoded yet, or raises one InputError that names it."""
    _load_plugins()
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    fix = "Fetch it again or remove it from the data set."
    with reading(path, "an image, it is truncated or damaged", fix):
        _check_file(path)
        formats = [
            name
            for name in Image.OPEN
            if name not in _NO_PICTURES and path.lower().endswith(_BY_NAME.get(name, ""))
        ]
        try:
            with Image.open(source(path), formats=formats) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    raise Image.DecompressionBombError
                yield image
        except UnidentifiedImageError:
            raise InputError(
                f"{path}: is not an image that can be read (JPEG, PNG, TIFF, WebP, AVIF and "
                "what else Pillow reads). Convert it or remove it from the data set."
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(
                f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels. Raise the limit "
                "(predict.py --max_pixels), cut it into tiles, or shrink it."
            ) from None


def _check_file(path: str) -> None:
    """Raises unless the path is a regular file with something in it; a pipe would hang."""
    if is_records(path):
        return
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such image. Correct the path, or the `file_name` and image "
            "folder of the data set."
        ) from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a folder, not an image; name a file.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is a pipe, socket or device, not an image file; remove it.")
    if not status.st_size:
        raise InputError(
            f"{path}: is empty, 0 bytes. Fetch it again or remove it from the data set."
        )


def _several(image: Image.Image) -> bool:
    # The further pictures of MPO (phones' depth maps) and PSD (layers) are no pages.
    return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)


_said: set[str] = set()


def _say_once(what: str, path: str) -> None:
    """Logs something about a picture, only of the first one that it is true of."""
    if what not in _said:
        _said.add(what)
        log.warning("%s: %s (said once)", path, what)


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
        _say_once(f"its largest value is {grey.max()}: taken as {bits} bits, not 16", path)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is 0
        grey = (1 << bits) - 1 - grey
    return (grey >> bits - 8).astype(np.uint8)


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
