"""What `--input` names: image files, a video, a camera, or a file at an address.

A source gives calls that each read one frame, so that a pool of threads reads ahead:
several at a time from image files, one after the other from a video.
"""

import contextlib
import copy
import fnmatch
import functools
import glob
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.data.buckets import Bucket, derive_buckets
from solov2_jax.data.images import image_suffixes, is_junk, read_header, read_image, read_values
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.download import DEFAULT_LIMITS, DownloadLimits, fetch, without_secrets
from solov2_jax.io import InputError
from solov2_jax.tools.predict.video import PageReader, VideoReader, count_pages

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"),
    *(".flv", ".ts", ".3gp", ".ogv"),
)
CAMERA = "camera:"
STREAMS = ("rtsp://", "rtsps://")
ADDRESSES = ("http://", "https://")
SHAPE_TOLERANCE = 0.02  # share of all pixels that padding may add for one shape less
MAX_STEM = 180  # bytes of a file's name; what is added to it must fit into 255


@dataclass(frozen=True)
class Frame:
    """A picture that was read, or what was wrong with it."""

    name: str  # stem of everything that is written about it, unique in a run
    file_name: str  # for the results: relative to the folder of all inputs
    path: str  # the file that the user gave
    image: np.ndarray | None = None  # RGB uint8 [H, W, 3], shown; None if it cannot be read
    index: int | None = None  # place in its video or among its file's pages
    stays: bool = True  # the file is there after the run, and is this picture
    problem: str = ""
    seconds: float | None = None  # since its video's first frame
    in_video: bool = False  # its overlay goes into a video
    values: np.ndarray | None = None  # [H, W, C], what is predicted on if not `image`


Read = Callable[[], Frame | None]
Size = tuple[int, int] | None  # (height, width); None: it cannot be read


class ImageFiles:
    """Image files, read by several threads.

    Args:
      stays: the files are there after the run.
    """

    makes_video, name, fps = False, "", 0.0  # of a video of overlays

    def __init__(
        self,
        paths: Sequence[str],
        threads: int,
        names: "Names",
        stays: bool = True,
        pixels: PixelFormat = RGB,
    ):
        self.pixels = pixels
        self.paths, self.threads, self.stays = list(paths), threads, stays
        self.root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
        self.names = [names.reserve(path) for path in paths]

    def total(self) -> int | None:
        """Returns how many pictures there are about, None if that is not known."""
        return len(self.paths)

    def sizes(self) -> Iterator[Size]:
        """Yields the (height, width) of each picture, None of one that cannot be read."""
        for path in self.paths:
            try:
                header = read_header(path)
            except ValueError:  # its reader says it later
                yield None
            else:
                yield header.height, header.width

    def part(self, chosen: Sequence[int]) -> "ImageFiles":
        """Returns the source of some of the files, which keep their names."""
        part = copy.copy(self)
        part.paths = [self.paths[i] for i in chosen]
        part.names = [self.names[i] for i in chosen]
        return part

    def calls(self) -> Iterator[Read]:
        """Yields what reads one picture each; a call that returns None ends the source."""
        for path, name in zip(self.paths, self.names, strict=True):
            yield functools.partial(self._read, path, name)

    def _read(self, path: str, name: str) -> Frame:
        file_name = os.path.relpath(path, self.root)
        try:
            if self.pixels.is_rgb:
                return Frame(name, file_name, path, read_image(path), stays=self.stays)
            values = read_values(path, self.pixels)
            image = self.pixels.to_rgb(self.pixels.scaled(values, path))
            return Frame(name, file_name, path, image, stays=self.stays, values=values)
        except ValueError as error:
            return Frame(name, file_name, path, problem=str(error))


class VideoFile:
    """A video, a camera, or an image file of several pages; a call reads the next frame.

    Args:
      limit: frames at most; 0: all.
      every: of so many frames, the first is taken.
      pages: of an image file, see `count_pages`; 0: a video.
    """

    threads = 1  # frames follow from each other

    def __init__(self, path: str, names: "Names", limit: int, every: int, pages: int | None = 0):
        self.reader = VideoReader(path) if pages == 0 else PageReader(path, pages)
        shown = without_secrets(path)
        self.path, self.paths = shown, [path]
        self.limit, self.every = limit, every
        self.fps = self.reader.fps / every
        self.makes_video = self.reader.has_times
        live = is_live(path)
        self.name = names.reserve(re.sub("[:@]", "_", shown) if live else path, frames=True)
        self.file_name = shown if live else os.path.basename(path)

    def total(self) -> int | None:
        known = self.reader.num_frames
        number = -(-known // self.every) if known else None
        return min(number or self.limit, self.limit) if self.limit else number

    def sizes(self) -> Iterator[Size]:
        yield self.reader.size

    def calls(self) -> Iterator[Read]:
        frames = self._frames()
        while True:
            yield lambda: next(frames, None)

    def _frames(self) -> Iterator[Frame]:
        index = -1
        try:
            for index, (image, seconds) in enumerate(self.reader.frames()):
                if index % self.every:
                    continue
                if self.limit and index // self.every >= self.limit:
                    return
                yield Frame(
                    f"{self.name}_{index:06d}",
                    self.file_name,
                    self.path,
                    image,
                    index=index,
                    stays=False,
                    seconds=seconds,
                    in_video=self.makes_video,
                )
        except ValueError as error:
            name = f"{self.name}_{index + 1:06d}"
            yield Frame(name, self.file_name, self.path, problem=str(error))


class BrokenFile:
    """A file among others that cannot be opened: one frame that says why."""

    threads, makes_video, fps = 1, False, 0.0

    def __init__(self, path: str, problem: str):
        self.paths, self.name, self.problem = [path], os.path.basename(path), problem

    def total(self) -> int:
        return 1

    def sizes(self) -> Iterator[Size]:
        yield None

    def part(self, chosen: Sequence[int]) -> "BrokenFile":
        return self

    def calls(self) -> Iterator[Read]:
        (path,) = self.paths
        yield lambda: Frame(self.name, self.name, path, problem=self.problem)


Source = ImageFiles | VideoFile | BrokenFile


def sizes_of(sources: Sequence[Source]) -> list[Size]:
    """Returns the (height, width) of every image, and of each video one."""
    return [size for source in sources for size in source.sizes()]


def shapes_of(
    sizes: Sequence[Size], padded_shape: Callable[[int, int], Bucket], limit: int
) -> tuple[Bucket, ...]:
    """Returns at most `limit` padded shapes that hold pictures of these sizes.

    Args:
      padded_shape: (height, width) -> the shape that a picture would have alone.
    """
    shapes = [padded_shape(*size) for size in sizes if size is not None]
    if not shapes:
        return ()  # nothing can be read; each file says why
    return derive_buckets(np.array(shapes), limit, SHAPE_TOLERANCE)


class Names:
    """Gives each input a stem of its own; one that is in use gets a number.

    Two stems are one if a file system might take them for one: upper and lower case,
    composed and decomposed letters.
    """

    def __init__(self):
        self._used: set[str] = set()

    def reserve(self, path: str, frames: bool = False) -> str:
        """Returns the stem for an input, at most `MAX_STEM` bytes long.

        Args:
          frames: names with a number behind the stem must be free too.
        """
        stem = os.path.splitext(os.path.basename(path))[0] or "input"
        while len(os.fsencode(stem)) > MAX_STEM:
            stem = stem[:-1]
        name, number = stem, 2
        while not self._is_free(name, frames):
            name, number = f"{stem}_{number}", number + 1
        self._used.add(_folded(name))
        return name

    def _is_free(self, name: str, frames: bool) -> bool:
        name = _folded(name)
        if name in self._used:
            return False
        numbered = re.compile(re.escape(name) + r"_\d{6,}")
        return not frames or not any(numbered.fullmatch(used) for used in self._used)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def is_live(text: str) -> bool:
    """Returns whether an input names a camera or a live stream, and no file."""
    return text.lower().startswith((CAMERA, *STREAMS)) and not os.path.lexists(text)


def open_sources(
    text: str,
    scratch: str,
    *,
    threads: int,
    limit: int,
    every: int,
    download: DownloadLimits = DEFAULT_LIMITS,
    pixels: PixelFormat = RGB,
) -> list[Source]:
    """Returns the sources that `--input` names: all images, then each video.

    Args:
      scratch: folder for what is downloaded.
      threads: that read image files.
      limit, every: see `VideoFile`.
      pixels: of the pictures. Other than 8-bit RGB there are files only, no videos and no
        pages, which may be channels.
    """
    if not pixels.is_rgb and (is_live(text) or is_video(text)):
        raise InputError(
            f"--input {without_secrets(text)}: a video has 8-bit RGB pictures, the network takes "
            f"{pixels.describe()}; give image files"
        )
    if is_live(text):
        return [VideoFile(text, Names(), limit, every)]
    is_address = text.lower().startswith(ADDRESSES) and not os.path.lexists(text)
    if is_address:
        paths = [fetch(text, scratch, download)]
    elif "://" in text and not os.path.lexists(text):
        raise InputError(
            f"--input {without_secrets(text)}: cannot fetch that; give http://, https:// or "
            "rtsp://, or a file"
        )
    else:
        paths = find_files(text, pixels)
    alone = len(paths) == 1
    problems = {path: why for path in paths if (why := why_unreadable(path))}
    if alone and problems:
        raise InputError(next(iter(problems.values())))
    readable = [path for path in paths if path not in problems]
    pages = {path: 0 if is_video(path) else count_pages(path) for path in readable}
    sequences = [path for path in readable if is_video(path) or pages[path] not in (0, 1)]
    sequences = sequences if pixels.is_rgb else []
    images = [path for path in readable if path not in set(sequences)]
    names = Names()
    sources: list[Source] = []
    if images:
        sources.append(ImageFiles(images, threads, names, not is_address, pixels))
    for path in sequences:
        try:
            sources.append(VideoFile(path, names, limit, every, pages[path]))
        except ValueError as error:
            if alone:
                raise
            sources.append(BrokenFile(path, str(error)))
    return sources + [BrokenFile(path, why) for path, why in problems.items()]


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


def why_unreadable(path: str) -> str:
    """Returns why a path is no file to read from, "" if it is one.

    Reading a FIFO, socket or device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return f"{path}: is {kind}, not a file; name an image or a video"


def find_files(text: str, pixels: PixelFormat = RGB, flag: str = "--input") -> list[str]:
    """Returns the files of a file name, a folder or a glob, sorted.

    Of a folder, what is named like an image or a video; of a glob, every file.
    """
    if os.path.isdir(text):
        suffixes = (*image_suffixes(), *(VIDEO_SUFFIXES if pixels.is_rgb else (".npy",)))
        paths = [
            os.path.join(text, name)
            for name in sorted(os.listdir(text))
            if name.lower().endswith(suffixes) and not is_junk(name)
        ]
        if not paths:
            raise InputError(
                f"{flag} {text}: no image in this folder; names must end as images' and "
                "videos' do (.jpg, .png, .mp4, ...), and folders in it are not searched"
            )
        return paths
    if os.path.lexists(text):
        return [text]
    paths = sorted(path for path in expand_pattern(text) if not os.path.isdir(path))
    if not paths:
        raise InputError(
            f"{flag} {text}: no such file, and as a pattern it matches none; give "
            "an image, a video, a folder or a quoted pattern such as 'photos/*.jpg'"
        )
    return paths


def expand_pattern(pattern: str) -> Iterator[str]:
    """Yields the paths that match a glob; `**` visits each folder once.

    `glob` follows links that lead back to where they are until the system refuses.
    """
    parts = [part for part in pattern.split(os.sep) if part]
    yield from _expand(os.sep if pattern.startswith(os.sep) else "", parts)


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for inner in _folders_below(folder):
            if rest:
                yield from _expand(inner, rest)
        return
    names = [part]
    if glob.has_magic(part):
        names = []
        with contextlib.suppress(OSError):  # no folder, or one that may not be read
            names = fnmatch.filter(os.listdir(folder or os.curdir), part)
        names = [name for name in names if part[0] == "." or not name.startswith(".")]
    for path in (os.path.join(folder, name) for name in names):
        if rest:
            yield from _expand(path, rest)
        elif os.path.lexists(path):
            yield path


def _folders_below(folder: str) -> Iterator[str]:
    """Yields the folder and all in it, also behind links, each once."""
    visited = set()
    for path, names, _ in os.walk(folder or os.curdir, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names[:] = [name for name in names if not name.startswith(".")]
        yield path
