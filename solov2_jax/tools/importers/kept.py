"""What an import wrote into a run's folder, and whether it still stands for its sources.

A source is known by the names, sizes and times of its files, which is cheap to read; what
was written, by its hash. Where both are as they were, nothing is imported again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from solov2_jax.data.images import is_junk
from solov2_jax.io import InputError, read_json, unmade_if_empty, write_json, write_text
from solov2_jax.tools.importers.merge import MergedData

PARTS, ABOUT = ("train.json", "val.json"), "source.json"


def sources_fingerprint(places: Iterable[str], images: Iterable[str]) -> str:
    """Returns a hash of what lies in the places, "" where they do not hold all that is read.

    Args:
      places: the folders and files that were given; a file stands for its folder.
      images: the folders of the images that were found.
    """
    tops = [p if os.path.isdir(p) else os.path.dirname(p) for p in map(os.path.abspath, places)]
    for folder in map(os.path.abspath, images):
        if not any(Path(folder).is_relative_to(top) for top in tops):
            return ""
    digest = hashlib.sha256()
    for top in tops:
        for line in _entries(top):
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _entries(top: str) -> list[str]:
    """Returns name, size and time of every file below a folder, links followed, sorted."""
    lines, seen = [], set()
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not is_junk(name) and os.path.exists(path):
                status = os.stat(path)
                place = os.path.relpath(path, top)
                lines.append(f"{place}\0{status.st_size}\0{status.st_mtime_ns}")
    return lines


def text_hash(text: str) -> str:
    """Returns a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_kept(folder: Path, request: Mapping[str, Any]) -> MergedData | None:
    """Returns what an import for the same request left in the folder.

    None where there is nothing, something is damaged, or a source has changed since.

    Args:
      request: all that the import depends on besides the files; `data` are the places.
    """
    try:
        about = read_json(folder / ABOUT, "what --data found")
        texts = [(folder / name).read_text("utf-8") for name in PARTS]
        contents = tuple(json.loads(text) for text in texts)
    except (InputError, OSError, ValueError):
        return None
    if not isinstance(about, dict) or about.get("request") != json.loads(json.dumps(request)):
        return None
    if about.get("written") != [text_hash(text) for text in texts]:
        return None
    images, lines = about["images"], about["found"]
    now = sources_fingerprint(request["data"], about["image_folders"])
    if not now or now != about.get("sources"):
        return None
    files = [str((folder / name).absolute()) for name in PARTS]
    lines = (*lines, f"{folder}: as imported before; the data is unchanged since")
    return MergedData(
        images=(images[0], images[1]),
        contents=(contents[0], contents[1]),
        files=(files[0], files[1]),
        lines=lines,
    )


def was_written(folder: Path, texts: Sequence[str]) -> bool:
    """Returns whether these are the texts that an import wrote, as it noted itself."""
    try:
        about = read_json(folder / ABOUT, "what --data found")
    except InputError:
        return False
    hashes = [text_hash(text) for text in texts]
    return isinstance(about, dict) and about.get("written") == hashes


def write_kept(folder: Path, data: MergedData, request: Mapping[str, Any]) -> None:
    """Writes the two jsons and where they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = data.texts()
    for name, content in zip(PARTS, texts, strict=True):
        write_text(content, folder / name)
    about = {
        "request": request,
        "found": data.lines,
        "images": data.images,
        "image_folders": data.image_folders,
        "written": [text_hash(text) for text in texts],
        "sources": sources_fingerprint(request["data"], data.image_folders),
    }
    write_json(about, folder / ABOUT)


@contextlib.contextmanager
def forgotten_if_refused(folder: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Removes what `write_kept` wrote inside `with`, when an error ends it.

    Args:
      folder: an import that was there before stays.
      has_begun: whether the run has begun, which then needs the files.
    """
    new = not folder.exists()
    with unmade_if_empty(folder):
        try:
            yield
        except BaseException:
            if new and not has_begun():
                for name in (*PARTS, ABOUT):
                    (folder / name).unlink(missing_ok=True)
            raise
