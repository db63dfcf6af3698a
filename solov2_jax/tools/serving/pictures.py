"""A request's body -> a picture, or a refusal, within bounded memory."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# Longest side of a picture: a thin one has few pixels, but its masks' canvas has many.
MAX_SIDE = 16_384

# What a body may be: content type -> Pillow's format. Formats that hold one plain
# picture; others are refused before any of their readers sees a byte.
TYPES = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP", "image/bmp": "BMP"}
_MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr")


class RequestRefused(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP.
      message: for the client: what is wrong and what to do.
      retry_after: seconds, where trying again makes sense.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


def check_type(content_type: str) -> None:
    """Refuses a body that does not say that it is a picture."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise RequestRefused(
            415,
            f"the content type is {kind[:80]!r}; send the image's bytes as the body, "
            f"as one of {', '.join(TYPES)}",
        )


def decode(body: bytes, max_pixels: int) -> np.ndarray:
    """Returns the picture, RGB uint8 [H, W, 3], upright.

    Its size is read and checked before a pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(body), formats=list(TYPES.values())) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise RequestRefused(
                        413,
                        f"the image has {width} x {height} pixels; this service takes at most "
                        f"{max_pixels}: shrink it",
                    )
                if max(width, height) > MAX_SIDE:
                    raise RequestRefused(
                        413,
                        f"the image has {width} x {height} pixels; a side may have at most "
                        f"{MAX_SIDE}: cut it into tiles",
                    )
                if image.mode not in _MODES:
                    fix = f"the image's mode is {image.mode}: send 8 bits a channel"
                    raise RequestRefused(415, fix)
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except RequestRefused:
        raise
    except Image.UnidentifiedImageError:
        raise RequestRefused(415, f"the body is not an image of {', '.join(TYPES)}") from None
    except Image.DecompressionBombError:  # Pillow's own limit, far beyond any of ours
        why = f"the image has far more than {max_pixels} pixels: shrink it"
        raise RequestRefused(413, why) from None
    except Exception as error:  # whatever Pillow raises for bytes made to break it
        why = f"the image is truncated or damaged ({type(error).__name__})"
        raise RequestRefused(400, why) from None
