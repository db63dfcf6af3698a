"""Pictures that are not 8-bit RGB: how many channels, which values, how they are shown.

`data.channels` and `data.value_range` declare them; a picture of a declared range becomes
float32, its range 0..255, so that means, augmentations and weights keep their units.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from solov2_jax.io import InputError


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """What the pictures of a data set hold."""

    channels: int = 3
    value_range: tuple[float, ...] = ()  # (): 8 bits; (low, high) of all, or of each in turn
    display: tuple[int, ...] = ()  # channels shown as red, green, blue; (): see `to_rgb`

    @property
    def is_rgb(self) -> bool:
        """Whether these are ordinary pictures, 8-bit RGB, which Pillow handles as such."""
        return self.channels == 3 and not self.value_range

    @property
    def dtype(self) -> type:
        """np.uint8 for 8 bits, np.float32 for declared ranges: of images and batches."""
        return np.float32 if self.value_range else np.uint8

    def describe(self) -> str:
        """Returns the form of an image array, for messages: "uint8 [height, width, 3], RGB"."""
        order = ", RGB" if self.is_rgb else ""
        kind = f"values {self.value_range}" if self.value_range else "uint8"
        return f"{kind} [height, width, {self.channels}]{order}"

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lowest and the highest value of each channel, float64 [C]."""
        low, high = np.tile(np.array(self.value_range or (0, 255), float).reshape(-1, 2).T, 1)
        return tuple(np.broadcast_to(v, self.channels) for v in (low, high))  # pyright: ignore

    def scaled(self, values: np.ndarray, name: str) -> np.ndarray:
        """Returns a picture's own values [h, w, C] as images have them: uint8 as it is, or
        float32 with the declared range at 0..255; what is beyond it is cut off, and what
        is no number counts as its lower end.

        Args:
          name: of the picture, for messages.

        Raises:
          InputError: if it has other channels, or more bits than are declared.
        """
        if values.ndim == 2:
            values = values[..., None]
        if values.ndim != 3 or values.shape[2] != self.channels:
            shape = list(values.shape)
            first = values.ndim == 3 and shape[0] == self.channels
            fix = (
                "its channels come first; save it with them last, np.moveaxis(a, 0, -1)"
                if first
                else f"set data.channels={shape[-1]} or convert it"
            )
            number = shape[-1] if values.ndim == 3 else 0
            raise InputError(
                f"{name}: has {number} channel{'s' * (number != 1)} (its array is {shape}), "
                f"data.channels is {self.channels}; {fix}."
            )
        if values.dtype == bool or values.dtype.kind not in "uif":
            raise InputError(f"{name}: holds {values.dtype} values, not numbers; convert it.")
        if not self.value_range:
            if values.dtype != np.uint8:
                raise InputError(
                    f"{name}: holds {values.dtype} values from {values.min():g} to "
                    f"{values.max():g}; say which range they have, such as "
                    f"data.value_range=(0,{_likely(values):g})."
                )
            return values
        low, high = self.bounds()
        moved = np.nan_to_num(values.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        return (np.clip((moved - low) / (high - low), 0, 1) * 255).astype(np.float32)

    def values_of(self, scaled: Sequence[float]) -> tuple[float, ...]:
        """Returns the pictures' own values of 0..255, one per channel; whole for 8 bits."""
        low, high = self.bounds()
        clipped = np.clip(scaled, 0, 255)
        values = low + clipped / 255 * (high - low) if self.value_range else np.round(clipped)
        return tuple(values.tolist())

    def to_rgb(self, image: np.ndarray) -> np.ndarray:
        """Returns what is shown of an image [h, w, C] as `scaled` returns it, uint8 [h, w, 3].

        The channels of `display`; else the first three, and of one or two the first as grey.
        """
        if self.is_rgb:
            return image
        chosen = self.display or ((0, 1, 2) if self.channels > 2 else (0, 0, 0))
        return np.ascontiguousarray(np.rint(image[..., list(chosen)]).astype(np.uint8))


RGB = PixelFormat()


def _likely(values: np.ndarray) -> float:
    """Returns the upper end that values probably have: full integers' bits, else 1 or the
    largest."""
    if values.dtype.kind == "f":
        return 1.0 if values.max() <= 1 else float(np.ceil(np.nanmax(values)))
    return float((1 << max(int(values.max()).bit_length(), 8)) - 1)


@dataclasses.dataclass(frozen=True)
class Planes:
    """A picture of any number of channels, with the moves of PIL's images, each channel
    one of them: mode "L" for 8 bits, "F" for float32."""

    channels: tuple[Image.Image, ...]

    @classmethod
    def of(cls, image: np.ndarray) -> "Planes":
        """Returns an image [h, w, C], uint8 or float32."""
        planes = np.moveaxis(image, -1, 0)
        return cls(tuple(Image.fromarray(np.ascontiguousarray(p)) for p in planes))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.channels[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def array(self) -> np.ndarray:
        """Returns the image [h, w, C]."""
        return np.stack([np.asarray(c) for c in self.channels], axis=-1)

    def resize(self, size: tuple[int, int], resampling: int, box: object = None) -> "Planes":
        return self._each("resize", size, resampling, box)

    def transform(self, size: tuple[int, int], *how: object) -> "Planes":
        return self._each("transform", size, *how)

    def transpose(self, method: int) -> "Planes":
        return self._each("transpose", method)

    def crop(self, box: tuple[int, int, int, int]) -> "Planes":
        return self._each("crop", box)

    def _each(self, move: str, *how: object) -> "Planes":
        return Planes(tuple(getattr(c, move)(*how) for c in self.channels))

    def enhance(self, brightness: float, contrast: float) -> "Planes":
        """Returns the picture times a factor, and then with the distance of every value to
        the mean of all times another one, within 0..255."""
        image = self.array().astype(np.float32) * np.float32(brightness)
        np.clip(image, 0, 255, out=image)
        mean = image.mean(dtype=np.float64)
        np.clip((image - mean) * contrast + mean, 0, 255, out=image)
        if self.channels[0].mode == "L":
            return Planes.of(np.rint(image).astype(np.uint8))
        return Planes.of(image)
