"""The values of pictures that are not 8-bit RGB, as they are in the file: any number of
channels, integers or floating-point numbers.

Pillow reads grey of 8, 16 and 32 bits, RGB and RGBA of 8. 16-bit colours and TIFF files of
other channels go through tifffile and imagecodecs, the extra `channels`; .npy is numpy's.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from solov2_jax.data.image_files import check_file, opened, say_once
from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.data.records import is_streamed, read_bytes
from solov2_jax.io import InputError, reading
from solov2_jax.rle import Size

NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG"
_ORIENTATION = 274  # TIFF's tag
_FIX = "Write it again or remove it from the data set."
# Pillow's modes whose arrays hold the file's own values; "P" and CMYK are colours.
_PLAIN = ("L", "LA", "RGB", "RGBA", "F", "I", "I;16", "I;16L", "I;16B", "I;16N")


def read_values(path: str, pixels: PixelFormat) -> np.ndarray:
    """Returns a picture's own values, [h, w] or [h, w, C], upright.

    Raises:
      InputError: one sentence that names the file; also where its format needs a package
        that is not there.
    """
    head = _head(path)
    if head.startswith(NPY):
        return _read_npy(path)
    if head[:4] in _TIFF and not (pixels.channels == 1 and _pillow_reads(path)):
        return _read_tiff(path, pixels.channels)
    with opened(path) as image:
        sixteen = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        colors = image.mode not in ("I", "I;16", "I;16L", "I;16B", "I;16N")
        if not (sixteen and colors):
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode not in _PLAIN:
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            return np.array(image)
    if head.startswith(_PNG):
        codecs = _package("imagecodecs", path)
        with reading(path, "a PNG", _FIX):
            return np.asarray(codecs.png_decode(read_bytes(path)))
    raise InputError(f"{path}: its 16-bit colours cannot be read; convert it to PNG or TIFF.")


def values_size(path: str) -> Size | None:
    """Returns (height, width) of a .npy file or of a TIFF that Pillow does not read; None
    of any other file, which Pillow is to read."""
    head = _head(path)
    if head.startswith(NPY):
        shape = _read_npy(path, header=True).shape
        return int(shape[0]), int(shape[1])
    if head[:4] not in _TIFF or _pillow_reads(path):
        return None
    tifffile = _package("tifffile", path)
    with reading(path, "a TIFF", _FIX), tifffile.TiffFile(_file(path)) as file:
        page = file.pages[0]
        turned = _orientation(page) > 4
        size = int(page.imagelength), int(page.imagewidth)
        return (size[1], size[0]) if turned else size


def _head(path: str) -> bytes:
    check_file(path)
    if is_streamed(path):
        return read_bytes(path)[:8]
    with reading(path, "a picture"), open(path, "rb") as file:
        return file.read(8)


def _file(path: str) -> Any:
    """Returns what tifffile opens: a path, or the bytes of a record."""
    return io.BytesIO(read_bytes(path)) if is_streamed(path) else path


def _pillow_reads(path: str) -> bool:
    """Whether Pillow reads a TIFF's values as they are: one grey page, or 8-bit colours."""
    try:
        with opened(path) as image:
            return image.mode in _PLAIN and not any(
                ";16" in str(t) for t in getattr(image, "tile", ())[:1]
            )
    except InputError:
        return False


def _read_npy(path: str, header: bool = False) -> np.ndarray:
    """Returns the array of a .npy file, or only the promise of it, for its shape."""
    with reading(path, "a .npy array", _FIX):
        if is_streamed(path):
            array = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r" if header else None, allow_pickle=False)
        if array.ndim not in (2, 3) or not array.size:
            raise InputError(
                f"{path}: holds an array of shape {list(array.shape)}; a picture is "
                "[height, width] or [height, width, channels]."
            )
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and array.shape[0] * array.shape[1] > limit:
            raise InputError(
                f"{path}: has more than {limit} pixels. Raise the limit (predict.py "
                "--max_pixels), cut it into tiles, or shrink it."
            )
        return array


def _read_tiff(path: str, channels: int) -> np.ndarray:
    """Returns a TIFF's values [h, w, C]: the samples of its first page, or its pages where
    they are as many as the channels."""
    tifffile = _package("tifffile", path)
    with reading(path, "a TIFF", f"{_FIX} Compressed ones need the package imagecodecs."):
        with tifffile.TiffFile(_file(path)) as file:
            first = file.pages[0]
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and first.imagelength * first.imagewidth > limit:
                raise InputError(
                    f"{path}: has more than {limit} pixels. Raise the limit (predict.py "
                    "--max_pixels), cut it into tiles, or shrink it."
                )
            single = first.samplesperpixel == 1
            if single and channels > 1 and len(file.pages) == channels:
                array = np.stack([page.asarray() for page in file.pages], axis=-1)
            else:
                if len(file.pages) > 1:
                    say_once("several pages or frames; of such files the first one is used", path)
                array = first.asarray()
                if not single and first.planarconfig == 2:  # band after band
                    array = np.moveaxis(array, 0, -1)
            if first.photometric == 0 and array.dtype.kind == "u":  # white is 0
                array = np.iinfo(array.dtype).max - array
            return _upright(np.asarray(array), _orientation(first))


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag is not None and 1 <= int(tag.value) <= 8 else 1


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Returns [h, w, ...] as it is to be seen."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(array[rows, columns])


def _package(name: str, path: str) -> Any:
    """Returns a package of the extra, or raises an InputError with the command."""
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(
            f"{path}: needs the package {name} to be read ({error}); install it by "
            'pip install "solov2_jax[channels]".'
        ) from None
