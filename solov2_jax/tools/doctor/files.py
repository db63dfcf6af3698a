"""The image files of a data set, read one by one: sizes, damage, equal files."""

import dataclasses
import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from solov2_jax.data.coco import CocoDataset, missing_files
from solov2_jax.data.images import read_header, read_image
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.data.records import read_bytes
from solov2_jax.progress import track
from solov2_jax.tools.doctor.findings import ERROR, NOTE, WARNING, Finding, counted

THREADS = 4
_THUMB = 16  # side of the small picture that is compared for looks
_SAME = 3.0  # mean difference of two small pictures that look the same, of 255
_MANY = 500  # flat pictures, which all look the same, are not compared


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """One image file as it is on disk."""

    problem: str = ""  # why it cannot be read
    height: int = 0  # upright
    width: int = 0
    orientation: int = 1
    digest: str = ""  # of the file's bytes
    look: np.ndarray | None = None  # uint8 [16, 16], a small grey version


def read_files(dataset: CocoDataset, indices: Sequence[int]) -> list[FileFacts]:
    """Returns the facts of these images, decoded completely, in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda i: read_file(dataset.path(i), dataset.pixels), indices)
        return list(track(read, "reading images", total=len(indices)))


def read_file(path: str, pixels: PixelFormat = RGB) -> FileFacts:
    """Returns what a file holds; what is wrong with it stands in `problem`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: what matters is raised
            header = read_header(path)
            image = read_image(path, pixels)
        digest = hashlib.sha256(read_bytes(path)).hexdigest()
    except (ValueError, OSError) as error:
        return FileFacts(problem=str(error))
    h, w = image.shape[:2]
    return FileFacts("", h, w, header.orientation, digest, look(image))


def look(image: np.ndarray) -> np.ndarray:
    """Returns a small grey version, uint8 [16, 16]."""
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((_THUMB, _THUMB), Image.Resampling.BOX))


def alike(looks: np.ndarray) -> list[tuple[int, int]]:
    """Returns pairs of pictures that look the same, whatever their compression.

    Candidates have nearly the same signs of brightness steps (64 bits, at most 3
    differ, so that one of four parts is equal); their small versions are compared.

    Args:
      looks: uint8 [n, 16, 16].
    """
    small = looks.reshape(-1, 8, 2, 8, 2).mean((2, 4))
    steps = small > np.roll(small, 1, axis=2)
    parts = np.packbits(steps.reshape(-1, 64), axis=1).view(np.uint16)
    pairs: set[tuple[int, int]] = set()
    for part in parts.T:
        order = np.argsort(part, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if 1 < len(group) <= _MANY:
                pairs |= {(a, b) for a in group.tolist() for b in group.tolist() if a < b}
    return sorted(
        (a, b)
        for a, b in pairs
        if (steps[a] != steps[b]).sum() <= 3
        and np.abs(looks[a].astype(int) - looks[b]).mean() < _SAME
    )


def file_findings(
    dataset: CocoDataset, indices: Sequence[int], facts: Sequence[FileFacts]
) -> list[Finding]:
    """Returns unreadable files, wrong sizes, orientations and equal images."""
    name = {i: str(dataset.file_names[i]) for i in indices}
    known = dict(zip(indices, facts, strict=True))
    total, absent = len(known), sorted(missing_files(dataset))
    bad = [i for i, f in known.items() if f.problem and i not in set(absent)]
    good = {i: f for i, f in known.items() if not f.problem}
    stated = {i: (int(dataset.heights[i]), int(dataset.widths[i])) for i in good}
    wrong = [i for i, f in good.items() if (f.height, f.width) != stated[i]]
    turned = [
        i
        for i in wrong
        if good[i].orientation != 1 and (good[i].width, good[i].height) == stated[i]
    ]
    resized = [i for i in wrong if i not in set(turned)]
    sizes = [
        f"{name[i]} is {good[i].height} x {good[i].width}, json {stated[i][0]} x {stated[i][1]}"
        for i in resized
    ]
    tagged = [i for i, f in good.items() if f.orientation != 1 and i not in wrong]
    text = f"of {len(dataset)} images are not in the folder"
    findings = counted(ERROR, len(absent), text, [str(dataset.file_names[i]) for i in absent])
    text, problems = "images cannot be read", [known[i].problem for i in bad]
    findings += counted(ERROR, len(bad), text, problems, of=total)
    text = (
        "images have annotations for the picture before its EXIF orientation is applied; "
        "annotate the upright picture or remove the tag"
    )
    findings += counted(ERROR, len(turned), text, [name[i] for i in turned], of=total)
    text = "images have another size than the json says"
    findings += counted(ERROR, len(resized), text, sizes, of=total)
    text = "images are rotated by their EXIF tag, as the json expects"
    findings += counted(NOTE, len(tagged), text, of=total)
    return findings + _equal_images(name, good)


def _equal_images(name: dict[int, str], facts: dict[int, FileFacts]) -> list[Finding]:
    same = defaultdict(list)
    for i, f in facts.items():
        same[f.digest].append(i)
    groups = [g for g in same.values() if len(g) > 1]
    findings = counted(
        WARNING,
        sum(len(g) - 1 for g in groups),
        "images are copies of another one, byte for byte",
        [" = ".join(name[i] for i in g) for g in groups],
        [i for g in groups for i in g],
    )
    first = [g[0] for g in same.values()]
    looks = np.array([facts[i].look for i in first], np.uint8)
    near = alike(looks) if len(first) > 1 else []
    pairs = [f"{name[first[a]]} ~ {name[first[b]]}" for a, b in near]
    shown = [first[i] for pair in near for i in pair]
    text = "pairs of different files look the same"
    return findings + counted(NOTE, len(near), text, pairs, shown)


def leaked(
    train: CocoDataset,
    train_facts: Sequence[tuple[int, FileFacts]],
    val: CocoDataset,
    val_facts: Sequence[tuple[int, FileFacts]],
) -> list[Finding]:
    """Returns images that are in the training and in the validation data."""
    seen = {f.digest: i for i, f in train_facts if f.digest}
    both = [(i, seen[f.digest]) for i, f in val_facts if f.digest in seen]
    names = [
        f"{os.path.basename(str(val.file_names[i]))} = {os.path.basename(str(train.file_names[j]))}"
        for i, j in both
    ]
    text = "validation images are in the training data too: its AP would be too high"
    return counted(WARNING, len(both), text, names, of=len(val_facts))
