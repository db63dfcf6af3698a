"""Videos, cameras and images of several pages: frames in, frames out, with their times.

By PyAV (the extra `video`), imported when a video is opened; images need nothing of it.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from solov2_jax.data.image_files import opened
from solov2_jax.data.images import _to_rgb
from solov2_jax.download import without_secrets
from solov2_jax.io import InputError, atomic_path, printable

log = logging.getLogger(__name__)

# Tried in this order: the first plays everywhere, the second is in every FFmpeg.
CODECS = (
    ("libx264", ".mp4", {"crf": "20", "preset": "veryfast"}),
    ("libopenh264", ".mp4", {}),
    ("libvpx-vp9", ".webm", {"crf": "32", "b:v": "0", "deadline": "realtime"}),
    ("mpeg4", ".mp4", {"qscale": "4"}),
    ("mjpeg", ".avi", {"qscale": "3"}),
)
# Containers that hold their frames themselves: no playlists, no scripts, no devices.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,wtv,mxf,nut,"
    "ivf,obu,av1,wav,h261,h263,h264,hevc,vvc,m4v,mjpeg,dv,rm,gif,apng,yuv4mpegpipe,vc1"
)
PAGED_FORMATS = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
DEFAULT_FPS = 25.0
NO_FRAME = "the video has no frame that can be read"
# How FFmpeg calls a camera on each platform, and what stands before its number.
CAMERAS = {
    "linux": ("v4l2", "/dev/video"),
    "darwin": ("avfoundation", ""),
    "win32": ("dshow", "video="),
}
Replacing = Callable[[str], contextlib.AbstractContextManager[Any]]


def load_av() -> Any:
    """Returns the module `av`, or raises with how to get it."""
    try:
        import av  # slow, and only videos need it
        import av.logging
    except ImportError:
        raise InputError(
            "videos need PyAV: pip install 'solov2_jax[video]', or pip install av"
        ) from None
    av.logging.set_level(av.logging.FATAL)  # its errors are raised, and said by us
    return av


def count_pages(path: str) -> int | None:
    """Returns how many pages or frames an image file has, 0 if it is no such file.

    Told by what it holds (GIF, PNG, WebP, TIFF, AVIF), not by its name. None if it is
    broken behind its first page: reading tells where.
    """
    with open(path, "rb") as file:
        start = file.read(12)
    magic = (b"GIF8", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    if not start.startswith(magic) and start[8:] != b"WEBP" and start[4:] != b"ftypavis":
        return 0
    try:
        image = Image.open(path, formats=PAGED_FORMATS)
    except Exception:  # of any kind, for a broken file: whoever reads it says what is wrong
        return 0
    with image:
        try:
            return int(getattr(image, "n_frames", 1))
        except Exception:
            return None


class PageReader:
    """An image file of several pages: an animation, whose frames have times, or a stack.

    Args:
      num_frames: None: not known, because the file is broken.
    """

    def __init__(self, name: str, num_frames: int | None):
        self.name, self.num_frames = name, num_frames or 0
        with opened(name) as image:
            self.size = image.size[1], image.size[0]
            self.has_times = image.format != "TIFF"
            image.load()
            duration = image.info.get("duration")  # milliseconds of the first frame
        self.fps = 1000 / duration if duration else DEFAULT_FPS

    def frames(self) -> Iterator[tuple[np.ndarray, float | None]]:
        """Yields (RGB uint8 [H, W, 3], seconds or None); raises where damaged."""
        seconds, number = 0.0, 0
        try:
            with opened(self.name) as image:
                is_gif = image.format == "GIF"
                for page in ImageSequence.Iterator(image):
                    pixels = _to_rgb(ImageOps.exif_transpose(page), self.name)
                    yield np.array(pixels), seconds if self.has_times else None
                    seconds += (page.info.get("duration") or 1000 / self.fps) / 1000
                    number += 1
            if number < self.num_frames or (is_gif and not _has_trailer(self.name)):
                raise InputError("the file ends there")
        except ValueError as error:
            pages = f"{number} of {self.num_frames}" if self.num_frames else f"{number}"
            raise InputError(
                f"{self.name}: {pages} pages were read and are done; then: "
                f"{str(error).removeprefix(f'{self.name}: ')}"
            ) from None


def _has_trailer(path: str) -> bool:
    """Returns whether a GIF ends as it must; Pillow takes one that is cut for whole."""
    with open(path, "rb") as file:
        file.seek(-min(os.path.getsize(path), 1024), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(b";")


class VideoReader:
    """A video that is open, or raises why it is none; `frames` goes through it once.

    A file may neither be a script that names others (a playlist, a list to concatenate)
    nor open one: only containers that hold their frames are tried.

    Args:
      name: a file, "camera:0", "camera:/dev/video2", or an rtsp address.
    """

    has_times = True

    def __init__(self, name: str):
        self.name = without_secrets(name)
        self._av = load_av()
        self.is_live = name.startswith("camera:") or "://" in name
        self._container = self._open(name)
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{self.name}: has no pictures in it, only sound or data")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._check_pixels(self._stream.width, self._stream.height)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate and 0.1 <= rate <= 1000 else DEFAULT_FPS
        # As the file's header says; sound may be longer than the frames.
        seconds = (self._container.duration or 0) / 1e6
        self._seconds = float((self._stream.duration or 0) * (self._stream.time_base or 0))
        if not self._seconds and len(self._container.streams) == 1:
            self._seconds = seconds
        self.num_frames = self._stream.frames or round((self._seconds or seconds) * self.fps)
        self._rest = self._decode()
        self._first = next(self._rest)
        self.size = self._first[0].shape[:2]  # (height, width), upright

    def frames(self) -> Iterator[tuple[np.ndarray, float]]:
        """Yields (RGB uint8 [H, W, 3], upright, seconds since the first frame).

        Raises:
          InputError: after the last frame, if the file is damaged or cut off.
        """
        yield self._first
        yield from self._rest

    def _decode(self) -> Iterator[tuple[np.ndarray, float]]:
        number = damaged = 0
        start, seconds, reason = 0.0, -1.0 / self.fps, ""
        with self._container:
            packets = self._container.demux(self._stream)
            while True:
                try:
                    packet = next(packets, None)
                    decoded = packet.decode() if packet is not None else []
                except self._av.error.InvalidDataError:
                    damaged += 1  # this one; the next may be whole
                    continue
                except self._av.error.FFmpegError as error:
                    reason, packet, decoded = error.strerror, None, []
                for frame in decoded:
                    self._check_pixels(frame.width, frame.height)
                    damaged += bool(frame.is_corrupt)
                    time = frame.time
                    if number == 0:
                        start = time or 0.0
                    elapsed = -math.inf if time is None else time - start
                    seconds = elapsed if elapsed > seconds else seconds + 1 / self.fps
                    number += 1
                    turns = round(frame.rotation / 90) % 4  # counter-clockwise
                    image = np.rot90(frame.to_ndarray(format="rgb24"), turns)
                    yield np.ascontiguousarray(image), max(seconds, 0.0)
                if packet is None:
                    break
        if not number:
            raise InputError(f"{self.name}: {NO_FRAME}")
        if not self.is_live:
            self._check_complete(number, seconds, damaged, reason)

    def _check_complete(self, number: int, seconds: float, damaged: int, reason: str) -> None:
        """Raises if fewer frames were read than there should be, or damaged ones."""
        missing = self._seconds - seconds - 1 / self.fps  # seconds
        if expected := self._stream.frames:
            # Fewer frames that last to the end are no damage: AVI counts pauses as frames.
            short = number < expected and (missing > 0.5 / self.fps or not self._seconds)
        else:
            expected = self.num_frames
            short = missing > max(1.0, 0.05 * self._seconds)
        told = [f"{number} of {expected} frames were read"] if short else []
        told += [f"{damaged} frames are damaged"] if damaged else []
        told += [f"reading ended with: {reason}"] if reason else []
        if told:
            raise InputError(
                f"{self.name}: the video is damaged or cut off: {', '.join(told)}; what was read "
                "is done"
            )

    def _open(self, name: str) -> Any:
        av = self._av
        try:
            if not name.startswith("camera:") or os.path.lexists(name):
                self.is_live = self.is_live and not os.path.lexists(name)
                if self.is_live:
                    return av.open(name, timeout=20.0, options={"format_whitelist": "rtsp,rtp,sdp"})
                options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
                return av.open(f"file:{name}", options=options)
            device = name.removeprefix("camera:")
            if sys.platform not in CAMERAS:
                raise InputError(f"{name}: cameras on {sys.platform} are not known")
            format_name, prefix = CAMERAS[sys.platform]
            device = prefix + device if device.isdigit() else device
            return av.open(device, format=format_name)
        except InputError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"{self.name}: {_why(error, self.is_live)}") from None
        except ValueError as error:
            raise InputError(f"{self.name}: cannot be opened ({printable(str(error))})") from None

    def _check_pixels(self, width: int, height: int) -> None:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise InputError(
                f"{self.name}: frames of {width} x {height} have more than {limit} "
                "pixels; shrink the video, or raise --max_pixels"
            )


def _why(error: Any, live: bool) -> str:
    if isinstance(error, EOFError):
        return NO_FRAME
    if live:
        why, fix = "no such camera or stream, or it is in use", "name camera:0, camera:1, ..."
    else:
        why, fix = (
            "is not a video that can be read",
            "convert it, such as by ffmpeg, or give images",
        )
    return f"{why} ({error.strerror}); {fix}"


class VideoWriter:
    """Writes frames of one size into a video; whole or not at all.

    Args:
      path: without a suffix, which is the codec's.
      fps: frames a second, where no times are given.
      codecs: (name, suffix, options), the first that works is taken.
      replacing: gives a temporary path that becomes the named one.
    """

    def __init__(
        self, path: str, fps: float, codecs: Any = CODECS, replacing: Replacing = atomic_path
    ):
        self.fps, self._codecs = Fraction(fps).limit_denominator(1001), codecs
        self._base, self._replacing = path, replacing
        self._size: tuple[int, int] | None = None
        self._container: Any = None
        self._file: contextlib.ExitStack | None = None
        self.path = ""
        self.num_frames = 0
        self._tick = -1  # of the last frame, in units of the time base

    def write(self, picture: np.ndarray, seconds: float | None = None) -> None:
        """Adds a frame, RGB uint8 [H, W, 3]; of another size than the first, padded.

        Args:
          seconds: when it is shown; None: after the one before, by `fps`.
        """
        if self._size is None:
            self._open(picture)
        assert self._size is not None
        height, width = self._size
        part = picture[:height, :width]
        missing = [(0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0)]
        fitted = np.pad(part, missing, mode="edge")
        frame = self._av.VideoFrame.from_ndarray(fitted, format="rgb24")
        seconds = float(self.num_frames / self.fps) if seconds is None else seconds
        self._tick = max(round(seconds / self._time_base), self._tick + 1)
        frame.pts, frame.time_base = self._tick, self._time_base
        with self._named_errors():
            self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> str:
        """Finishes the file and returns its path; "" if there was no frame."""
        if self._container is None or self._file is None:
            return ""
        with self._named_errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()
        self._container = None
        self._file.close()
        return self.path

    def discard(self) -> None:
        """Gives up what was written, if it is not closed."""
        if self._container is not None and self._file is not None:
            with contextlib.suppress(self._av.error.FFmpegError, OSError):
                self._container.close()  # writes what it still holds
            self._container = None
            self._file.__exit__(InputError, InputError("discarded"), None)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Names the video where FFmpeg names a temporary file, such as on a full disk."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            text = f"cannot be written: {error.strerror}"
            raise OSError(error.errno, text, self.path) from error

    def _open(self, picture: np.ndarray) -> None:
        self._av = load_av()
        # Chroma is stored for two by two pixels: sides must be even.
        self._size = tuple(-(-side // 2) * 2 for side in picture.shape[:2])
        os.makedirs(os.path.dirname(self._base) or ".", exist_ok=True)
        tried = []
        for codec, suffix, options in self._codecs:
            try:
                self._begin(codec, suffix, options)
            except InputError:
                raise
            except (self._av.error.FFmpegError, ValueError) as error:
                tried.append(f"{codec}: {error}")
            else:
                if tried:
                    log.info("codec %s; not usable: %s", codec, "; ".join(tried))
                return
        raise InputError(
            f"{self._base}: this FFmpeg has no codec to write a video with "
            f"({'; '.join(tried)}); pip install --force-reinstall av"
        )

    def _begin(self, codec: str, suffix: str, options: dict[str, str]) -> None:
        assert self._size is not None
        # AVI has no times, only a rate. 60,000 holds every usual rate's frames exactly.
        self._time_base = 1 / self.fps if suffix == ".avi" else Fraction(1, 60_000)
        with contextlib.ExitStack() as file:
            path = self._base + suffix
            temporary = file.enter_context(self._replacing(path))
            container = self._av.open(str(temporary), "w", format=suffix.removeprefix("."))
            try:
                stream = container.add_stream(codec, rate=self.fps, options=dict(options))
                stream.height, stream.width = self._size
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                stream.codec_context.time_base = self._time_base
                stream.codec_context.open()
            except BaseException:
                container.close()
                raise
            self._container, self._stream, self.path = container, stream, path
            self._file = file.pop_all()
