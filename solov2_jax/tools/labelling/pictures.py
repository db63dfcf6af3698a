"""PictureFolder without labels: which there are, reading them, putting them beside a result."""

import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from solov2_jax.checkpoint import load_workdir_config
from solov2_jax.data import records
from solov2_jax.data.annotations import read_instances
from solov2_jax.data.build import data_files
from solov2_jax.data.images import list_images
from solov2_jax.inference.preprocess import default_buckets
from solov2_jax.io import InputError, printable
from solov2_jax.pretrained import is_pretrained
from solov2_jax.progress import track
from solov2_jax.tools.predict.output_folder import OutputFolder
from solov2_jax.tools.predict.pipeline import ahead
from solov2_jax.tools.predict.sources import (
    ImageFiles,
    Names,
    find_files,
    is_video,
    shapes_of,
    why_unreadable,
)

log = logging.getLogger(__name__)

THREADS, WINDOW = 2, 6  # that read; pictures read ahead
MOST_SHAPES = 2  # programs for all pictures
IMAGES = "images"  # the folder of pictures beside a result


@dataclass
class PictureFolder:
    """Picture files below a folder.

    Attributes:
      names: relative to `root`, with "/", sorted.
      problems: what could not be read, a sentence each; grows while reading.
      num_unusable: files that are not among `names`, being no pictures.
    """

    root: str
    names: list[str]
    problems: list[str] = field(default_factory=list)
    num_unusable: int = 0

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def report(self, problem: str) -> None:
        """Logs what is wrong with a picture, and keeps it."""
        self.problems.append(printable(problem))
        log.error("%s", self.problems[-1])


def find_pictures(text: str) -> PictureFolder:
    """Returns the pictures of a folder and its subfolders, of a pattern, or one picture.

    Raises:
      InputError: if there is none.
    """
    if os.path.isdir(text):
        root, names = text, list_images(text)
        if not names:
            raise InputError(f"--input {text}: no picture in this folder or below; correct it.")
        paths = [os.path.join(root, name) for name in names]
    else:
        paths = find_files(text)
        root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
        names = [os.path.relpath(p, root).replace(os.sep, "/") for p in paths]
    pictures = PictureFolder(root, [])
    for name, path in sorted(zip(names, paths, strict=True)):
        if is_video(path):
            pictures.report(f"{path}: is a video; give its frames as pictures")
        elif why := why_unreadable(path):
            pictures.report(why)
        else:
            pictures.names.append(name)
    pictures.num_unusable = len(pictures.problems)
    return pictures


def leave_out(pictures: PictureFolder, known: Iterable[str]) -> tuple[PictureFolder, list[str]]:
    """Returns the pictures without those that are known, byte for byte, and these.

    Args:
      known: paths of files; those that are not there are no obstacle.
    """
    sizes: dict[int, list[str]] = {}
    for path in known:
        if os.path.isfile(path):
            sizes.setdefault(os.path.getsize(path), []).append(path)
    hashes: dict[int, set[str]] = {}
    kept, left = [], []
    for name in pictures.names:
        size = os.path.getsize(pictures.path(name))
        if size in sizes and size not in hashes:
            hashes[size] = {_hash(path) for path in sizes[size]}
        is_known = size in sizes and _hash(pictures.path(name)) in hashes[size]
        (left if is_known else kept).append(name)
    return replace(pictures, names=kept), left


def _hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def own_pictures(workdir: str) -> tuple[list[str], list[str]]:
    """Returns the training images' paths of a run, and those of its validation sets, as far as
    its data is where it was."""
    if not os.path.isdir(workdir) or is_pretrained(workdir):  # what was handed on has no data
        return [], []
    config = load_workdir_config(workdir)
    places = [] if config.data.name else [*data_files(config), *(v[1:3] for v in config.data.vals)]
    found: list[list[str]] = []
    for images, annotations in places:
        paths = []
        if not records.is_records(images) and os.path.isfile(annotations):
            paths = [os.path.join(images, n) for n in read_instances(annotations).file_names]
        found.append(paths)
    if not any(found):
        log.warning("%s: the run's own images are not at hand: none is left out", workdir)
        return [], []
    return found[0], list(itertools.chain(*found[1:]))


@dataclass(frozen=True)
class NewPictures:
    """The pictures of an `--input` that a run does not know, and where the result goes."""

    folder: OutputFolder
    paths: list[str]  # of the result's files
    pictures: PictureFolder
    left: list[str]  # names of those that the run knows
    train: list[str]  # paths of its training images

    def check(self, names: Iterable[str]) -> None:
        """Raises an InputError for a file of the user's where the result or pictures go."""
        self.folder.check([*self.paths, *(_target(self.folder, name) for name in names)])


def open_pictures(
    workdir: str, text: str, output: str, files: Iterable[str], *, overwrite: bool
) -> NewPictures:
    """Returns what `--input` names, after checking that the result's files can be written."""
    folder = OutputFolder(output, overwrite)
    paths = [os.path.join(output, name) for name in files]
    pictures = find_pictures(text)
    folder.check(paths)
    train, val = own_pictures(workdir)
    pictures, left = leave_out(pictures, [*train, *val])
    if left:
        log.info("%d pictures are the run's own data: left out", len(left))
    return NewPictures(folder, paths, pictures, left, train)


def fit_shapes(predictor: Any, pictures: Iterable[str]) -> Any:
    """Returns the predictor with few padded shapes that hold all pictures, by path."""
    input_ = predictor.input
    if input_.buckets != default_buckets(input_.min_size, input_.max_size):
        return predictor
    alone = predictor.with_shapes(())
    paths = list(pictures)
    if not paths:
        return alone
    files = ImageFiles(paths, THREADS, Names())
    shapes = shapes_of(list(files.sizes()), alone.padded_shape, MOST_SHAPES)
    return predictor.with_shapes(shapes) if shapes else alone


def read_pictures(
    pictures: PictureFolder, load: Callable[[str], Any], what: str
) -> Iterator[tuple[str, Any]]:
    """Yields (name, what `load` makes of its path) in order; notes what cannot be read."""

    def read(name: str) -> tuple[str, Any, str]:
        try:
            return name, load(pictures.path(name)), ""
        except (ValueError, OSError) as error:
            return name, None, str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        items = ahead(pool, read, pictures.names, WINDOW)
        for name, loaded, problem in track(items, what, total=len(pictures.names)):
            if loaded is None:
                pictures.report(problem)
            else:
                yield name, loaded


def _target(folder: OutputFolder, name: str) -> str:
    return os.path.join(folder.path, IMAGES, *name.split("/"))


def place_pictures(
    folder: OutputFolder, pictures: PictureFolder, names: Iterable[str], *, link: bool
) -> None:
    """Puts pictures below `images`, in the subfolders that they had; those that an earlier
    run put there and are not among them go.

    Args:
      link: as links where the system allows them, else as copies.
    """
    targets = {_target(folder, name): name for name in names}
    stale = [path for path in folder.listed(IMAGES) if path not in targets]
    folder.remove_ours(path for path in stale if os.path.lexists(path))
    for target, name in track(list(targets.items()), "placing pictures"):
        source = os.path.abspath(pictures.path(name))
        if link and _is_linked(folder, source, target):
            continue
        with folder.replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _is_linked(folder: OutputFolder, source: str, target: str) -> bool:
    """Returns whether the target is a link to the source, now or already."""
    if os.path.islink(target) and os.readlink(target) == source:
        return True
    folder.remove_ours([target] if os.path.lexists(target) else [])
    if os.path.lexists(target):
        return False
    os.makedirs(os.path.dirname(target), exist_ok=True)
    folder.record(target)
    try:
        os.symlink(source, target)
    except (OSError, NotImplementedError):  # a system or file system without links
        return False
    return True
