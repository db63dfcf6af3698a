"""Videos and cameras: frames in, frames out, by PyAV (the extra `video`).

PyAV is imported when a video is opened; images need nothing of it.
"""

import logging
import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

# Tried in this order: the first plays everywhere, the second is in every FFmpeg.
CODECS = (
    ("libx264", ".mp4", {"crf": "20", "preset": "veryfast"}),
    ("libopenh264", ".mp4", {}),
    ("libvpx-vp9", ".webm", {"crf": "32", "b:v": "0", "deadline": "realtime"}),
    ("mpeg4", ".mp4", {"qscale": "4"}),
    ("mjpeg", ".avi", {"qscale": "3"}),
)
DEFAULT_FPS = 25.0
NO_FRAME = "the video has no frame that can be read"
# How FFmpeg calls a camera on each platform, and what stands before its number.
CAMERAS = {
    "linux": ("v4l2", "/dev/video"),
    "darwin": ("avfoundation", ""),
    "win32": ("dshow", "video="),
}


def load_av() -> Any:
    """Returns the module `av`, or raises with how to get it."""
    try:
        import av  # slow, and only videos need it
        import av.logging
    except ImportError:
        raise ValueError(
            "videos need PyAV: pip install 'solov2_jax[video]', or pip install av"
        ) from None
    av.logging.set_level(av.logging.FATAL)  # its errors are raised, and said by us
    return av


def is_animation(path: str) -> bool:
    """Returns whether a file is an image of several frames: a GIF, WebP or PNG."""
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG")) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # whoever reads it says what is wrong


class VideoReader:
    """A video that is open, or raises why it is none; `frames` goes through it once.

    Args:
      name: a file, "camera:0", "camera:/dev/video2", or an rtsp address.
    """

    def __init__(self, name: str):
        self.name = name
        self._av = load_av()
        self.is_live = name.startswith(("camera:", "rtsp://"))
        self._container = self._open()
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{name}: has no pictures in it, only sound or data")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._check_pixels(self._stream.width, self._stream.height)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate and 0.1 <= rate <= 1000 else DEFAULT_FPS
        # As the file's header says: good enough for a progress bar.
        duration = self._container.duration or 0  # microseconds
        self.num_frames = self._stream.frames or round(duration / 1e6 * self.fps)
        self._rest = self._decode()
        self._first = next(self._rest)
        self.size = self._first.shape[:2]  # (height, width), upright

    def frames(self) -> Iterator[np.ndarray]:
        """Yields the frames, RGB uint8 [H, W, 3], upright; raises where damaged."""
        yield self._first
        yield from self._rest

    def _decode(self) -> Iterator[np.ndarray]:
        number = 0
        try:
            with self._container:
                for frame in self._container.decode(self._stream):
                    self._check_pixels(frame.width, frame.height)
                    image = frame.to_ndarray(format="rgb24")
                    turns = round(frame.rotation / 90) % 4  # counter-clockwise
                    yield np.ascontiguousarray(np.rot90(image, turns))
                    number += 1
        except self._av.error.FFmpegError as error:
            if number:
                raise ValueError(
                    f"{self.name}: the video is damaged after {number} frames "
                    f"({error.strerror}); these are done"
                ) from None
            raise ValueError(f"{self.name}: {_why(error, self.is_live)}") from None
        if not number:
            raise ValueError(f"{self.name}: {NO_FRAME}")

    def _open(self) -> Any:
        av = self._av
        try:
            if not self.name.startswith("camera:"):
                return av.open(self.name, timeout=None if not self.is_live else 20.0)
            device = self.name.removeprefix("camera:")
            if sys.platform not in CAMERAS:
                raise ValueError(f"{self.name}: cameras on {sys.platform} are not known")
            format_name, prefix = CAMERAS[sys.platform]
            device = prefix + device if device.isdigit() else device
            return av.open(device, format=format_name)
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(f"{self.name}: {_why(error, self.is_live)}") from None
        except ValueError as error:
            raise ValueError(f"{self.name}: cannot be opened ({error})") from None

    def _check_pixels(self, width: int, height: int) -> None:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise ValueError(
                f"{self.name}: frames of {width} x {height} have more than {limit} "
                "pixels; shrink the video, or raise PIL.Image.MAX_IMAGE_PIXELS"
            )


def _why(error: Any, live: bool) -> str:
    if isinstance(error, EOFError):
        return NO_FRAME
    if live:
        return (
            f"no such camera or stream, or it is in use ({error.strerror}); cameras "
            "are named camera:0, camera:1, ..."
        )
    return (
        f"is not a video that can be read ({error.strerror}). Convert it, for example "
        "by ffmpeg, or give images"
    )


class VideoWriter:
    """Writes frames of one size into a video; whole or not at all.

    Args:
      path: without a suffix, which is the codec's.
      fps: frames a second.
      codecs: (name, suffix, options), the first that works is taken.
    """

    def __init__(self, path: str, fps: float, codecs: Any = CODECS):
        self.fps, self._codecs = Fraction(fps).limit_denominator(1001), codecs
        self._base = path
        self._size: tuple[int, int] | None = None
        self._container: Any = None
        self.path = self._temporary = ""
        self.num_frames = 0

    def write(self, picture: np.ndarray) -> None:
        """Adds a frame, RGB uint8 [H, W, 3]; of another size than the first, padded."""
        if self._size is None:
            self._open(picture)
        assert self._size is not None
        height, width = self._size
        part = picture[:height, :width]
        missing = [(0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0)]
        fitted = np.pad(part, missing, mode="edge")
        frame = self._av.VideoFrame.from_ndarray(fitted, format="rgb24")
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> str:
        """Finishes the file and returns its path; "" if there was no frame."""
        if self._container is None:
            return ""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        os.replace(self._temporary, self.path)
        return self.path

    def discard(self) -> None:
        """Gives up what was written."""
        if self._container is not None:
            self._container.close()
            self._container = None
            os.unlink(self._temporary)

    def _open(self, picture: np.ndarray) -> None:
        self._av = load_av()
        # Chroma is stored for two by two pixels: sides must be even.
        self._size = tuple(-(-side // 2) * 2 for side in picture.shape[:2])
        os.makedirs(os.path.dirname(self._base) or ".", exist_ok=True)
        tried = []
        for codec, suffix, options in self._codecs:
            try:
                self._begin(codec, suffix, options)
            except (self._av.error.FFmpegError, ValueError, OSError) as error:
                tried.append(f"{codec}: {error}")
                self._container = None
                if os.path.exists(self._temporary):
                    os.unlink(self._temporary)
                continue
            if tried:
                log.info("codec %s; not usable: %s", codec, "; ".join(tried))
            return
        raise ValueError(
            f"{self._base}: this FFmpeg has no codec to write a video with "
            f"({'; '.join(tried)}); pip install --force-reinstall av"
        )

    def _begin(self, codec: str, suffix: str, options: dict[str, str]) -> None:
        folder, name = os.path.split(self._base + suffix)
        self.path = os.path.join(folder, name)
        self._temporary = os.path.join(folder, f".{os.getpid()}.{name}")
        assert self._size is not None
        container = self._av.open(self._temporary, "w")
        try:
            stream = container.add_stream(codec, rate=self.fps, options=dict(options))
            stream.height, stream.width = self._size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.open()
        except BaseException:
            container.close()
            raise
        self._container, self._stream = container, stream
