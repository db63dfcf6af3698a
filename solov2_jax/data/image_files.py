"""Opening any image file that Pillow decodes, or one clear error that names it."""

import contextlib
import functools
import importlib
import logging
import os
import stat
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from solov2_jax.data.records import is_streamed, source
from solov2_jax.io import InputError, reading

log = logging.getLogger("solov2_jax.data.images")

# Left out of what Pillow opens: what it cannot decode without other programs or packages,
# and what it takes any file for, because the format has no signature.
NO_PICTURES = {
    *("BUFR", "EPS", "FPX", "GRIB", "HDF5", "IM", "IPTC", "MIC", "MPEG", "PCD", "PDF"),
    *("SPIDER", "WMF", "XVTHUMB"),
}
_BY_NAME = {"TGA": (".tga", ".icb", ".vda", ".vst")}  # no signature either: by the ending

# Pixels of the largest picture that is read; None: Pillow's own limit.
max_pixels: int | None = None


@functools.cache
def load_plugins() -> None:
    """Makes Pillow know all of its formats, and HEIF where pillow-heif is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Gives the picture, not decoded yet, or raises one InputError that names it."""
    load_plugins()
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    fix = "Fetch it again or remove it from the data set."
    with reading(path, "an image, it is truncated or damaged", fix):
        check_file(path)
        formats = [
            name
            for name in Image.OPEN
            if name not in NO_PICTURES and path.lower().endswith(_BY_NAME.get(name, ""))
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


def check_file(path: str) -> None:
    """Raises unless the path is a regular file with something in it; a pipe would hang."""
    if is_streamed(path):
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


_said: set[str] = set()


def say_once(what: str, path: str) -> None:
    """Logs something about a picture, only of the first one that it is true of."""
    if what not in _said:
        _said.add(what)
        log.warning("%s: %s (said once)", path, what)
