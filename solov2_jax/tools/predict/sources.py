"""What `--input` names: image files, a video, a camera, or a file at an address.

A source gives calls that each read one frame, so that a pool of threads reads ahead:
several at a time from image files, one after the other from a video.
"""

import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.data.images import read_image
from solov2_jax.tools.predict.download import fetch
from solov2_jax.tools.predict.video import VideoReader, is_animation

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif"),
    *(".jp2", ".ppm", ".pgm"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"),
    *(".flv", ".ts", ".3gp", ".ogv"),
)
CAMERA = "camera:"
ADDRESSES = ("http://", "https://")


@dataclass(frozen=True)
class Frame:
    """A picture that was read, or what was wrong with it."""

    name: str  # stem of everything that is written about it, unique in a run
    file_name: str  # for the results: relative to the folder of all inputs
    path: str  # the file that the user gave
    image: np.ndarray | None = None  # RGB uint8 [H, W, 3]; None if it cannot be read
    index: int | None = None  # place in its video
    stays: bool = True  # the file is there after the run, and is this picture
    problem: str = ""


Read = Callable[[], Frame | None]


class ImageFiles:
    """Image files, read by several threads.

    Args:
      stay: the files are there after the run.
    """

    def __init__(self, paths: Sequence[str], threads: int, names: "Names", stay: bool = True):
        self.paths, self.threads, self.stay = list(paths), threads, stay
        folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
        self.root = os.path.commonpath(folders)
        self.names = [names.take(path) for path in paths]

    def total(self) -> int:
        """Returns how many images there are."""
        return len(self.paths)

    def calls(self) -> Iterator[Read]:
        """Yields what reads one image each."""
        for path, name in zip(self.paths, self.names, strict=True):
            yield lambda path=path, name=name: self._read(path, name)

    def _read(self, path: str, name: str) -> Frame:
        file_name = os.path.relpath(path, self.root)
        try:
            image = read_image(path)
            return Frame(name, file_name, path, image, stays=self.stay)
        except ValueError as error:
            return Frame(name, file_name, path, problem=str(error))


class VideoFile:
    """A video, an animation or a camera; a call reads the next frame.

    Args:
      limit: frames at most; 0: all.
      every: of so many frames, the first is taken.
    """

    threads = 1  # frames follow from each other

    def __init__(self, path: str, names: "Names", limit: int, every: int):
        self.reader = VideoReader(path)
        self.path, self.paths = path, [path]
        self.limit, self.every = limit, every
        self.fps = self.reader.fps / every
        self.name = names.take(path.replace(":", "_") if is_camera(path) else path)
        self.file_name = path if is_camera(path) else os.path.basename(path)

    def total(self) -> int | None:
        """Returns how many frames there are about, None if that is not known."""
        known = self.reader.num_frames
        number = -(-known // self.every) if known else None
        return min(number or self.limit, self.limit) if self.limit else number

    def calls(self) -> Iterator[Read]:
        """Yields, without an end, what reads the next frame; None after the last."""
        frames = self._frames()
        while True:
            yield lambda: next(frames, None)

    def _frames(self) -> Iterator[Frame]:
        index = -1
        try:
            for index, image in enumerate(self.reader.frames()):
                if index % self.every:
                    continue
                if self.limit and index // self.every >= self.limit:
                    return
                name = f"{self.name}_{index:06d}"
                yield Frame(name, self.file_name, self.path, image, index, False)
        except ValueError as error:
            name = f"{self.name}_{index + 1:06d}"
            yield Frame(name, self.file_name, self.path, problem=str(error))


class BrokenFile:
    """A file among others that cannot be opened: one frame that says why."""

    threads = 1

    def __init__(self, path: str, problem: str):
        self.paths, self.problem = [path], problem

    def total(self) -> int:
        """Returns 1."""
        return 1

    def calls(self) -> Iterator[Read]:
        """Yields what gives the problem."""
        (path,) = self.paths
        name = os.path.basename(path)
        yield lambda: Frame(name, name, path, problem=self.problem)


Source = ImageFiles | VideoFile | BrokenFile


class Names:
    """Gives each input a stem of its own; a name that is taken gets a number."""

    def __init__(self):
        self.taken: set[str] = set()

    def take(self, path: str) -> str:
        stem = os.path.splitext(os.path.basename(path))[0] or "input"
        name, number = stem, 2
        while name.lower() in self.taken:
            name, number = f"{stem}_{number}", number + 1
        self.taken.add(name.lower())
        return name


def is_camera(text: str) -> bool:
    """Returns whether an input names a camera or a live stream."""
    return text.startswith((CAMERA, "rtsp://"))


def open_sources(text: str, scratch: str, *, threads: int, limit: int, every: int) -> list[Source]:
    """Returns the sources that `--input` names: all images, then each video.

    Args:
      scratch: folder for what is downloaded.
      threads: that read image files.
      limit, every: see `VideoFile`.
    """
    if is_camera(text):
        return [VideoFile(text, Names(), limit, every)]
    if text.startswith(ADDRESSES):
        paths = [fetch(text, scratch)]
    elif "://" in text:
        raise ValueError(
            f"--input {text}: cannot fetch that; give http://, https:// or rtsp://, or a file"
        )
    else:
        paths = find_files(text)
    alone = len(paths) == 1
    videos = [p for p in paths if is_video(p) or (alone and is_animation(p))]
    images = [p for p in paths if p not in set(videos)]
    names = Names()
    sources: list[Source] = []
    if images:
        stay = not text.startswith(ADDRESSES)
        sources.append(ImageFiles(images, threads, names, stay))
    for path in videos:
        try:
            sources.append(VideoFile(path, names, limit, every))
        except ValueError as error:
            if alone:
                raise
            sources.append(BrokenFile(path, str(error)))
    return sources


def is_video(path: str) -> bool:
    """Returns whether a file's name ends like a video's."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def find_files(text: str) -> list[str]:
    """Returns the files of a file name, a folder or a glob, sorted.

    Of a folder, those whose names end like images' or videos'; of a glob, every file.
    """
    if os.path.isdir(text):
        suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
        found = [
            os.path.join(text, name)
            for name in sorted(os.listdir(text))
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
        if not found:
            raise ValueError(
                f"--input {text}: no image in this folder; names must end in "
                f"{', '.join(suffixes)}, and folders in it are not searched"
            )
        return found
    if os.path.exists(text):
        return [text]
    found = sorted(p for p in glob.glob(text, recursive=True) if os.path.isfile(p))
    if not found:
        raise ValueError(
            f"--input {text}: no such file, and as a pattern it matches none; give "
            "an image, a video, a folder or a quoted pattern such as 'photos/*.jpg'"
        )
    return found
