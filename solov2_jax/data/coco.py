"""A COCO-style data set: an image folder and an instances json, in flat arrays.

Nothing here is a Python object per annotation, so a data set of a million objects
costs a worker process a few mapped pages instead of gigabytes.
Source: detectron2 data/datasets/coco.py, load_coco_json (without its registry).
"""

import dataclasses
import logging
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data import records
from solov2_jax.data.annotations import AnnotationTable, describe, read_instances
from solov2_jax.data.outlines import Segmentations, covers, join_segmentations, rectangles
from solov2_jax.data.pixel_format import RGB, PixelFormat
from solov2_jax.io import InputError, list_folder
from solov2_jax.rle import offsets

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """N images in the json's order and their A usable objects, sorted by image.

    The objects of image i are `start[i]:start[i + 1]`, in the json's order. Crowds are
    not among them; `evaluation.coco_score` has those.
    """

    image_root: str
    annotation_file: str
    class_names: tuple[str, ...]  # in the order of category_ids
    category_ids: tuple[int, ...]  # sorted; label k is category_ids[k]
    image_ids: np.ndarray  # int64 [N], what batches carry: `AnnotationTable.batch_ids`
    file_names: np.ndarray  # str [N], relative to image_root, as on disk
    missing: np.ndarray  # int64 [m], the images that are not in the folder
    heights: np.ndarray  # int32 [N]
    widths: np.ndarray  # int32 [N]
    start: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float64 [A, 4], (x0, y0, x1, y1) as annotated, not clipped
    labels: np.ndarray  # int32 [A]
    annotation_ids: np.ndarray  # int64 [A], or text
    segmentations: Segmentations
    has_mask: np.ndarray  # bool [A]; False: the outline is the box, nothing else is known
    counts: Mapping[str, int]  # what was read and dropped, for `summary`
    weights: np.ndarray  # float64 [N], how often an epoch shows each image, on average
    table: AnnotationTable | None = None  # all that the json holds, for the evaluation
    pixels: PixelFormat = RGB  # of its pictures, as the config declares them

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> str:
        """Returns where image `index` is: a path, or a record for `records.source`."""
        if records.is_records(self.image_root):
            return records.record_path(self.image_root, index, str(self.file_names[index]))
        return os.path.join(self.image_root, str(self.file_names[index]))

    @property
    def objects_per_image(self) -> np.ndarray:
        """Returns the number of usable objects of each image, int64 [N]."""
        return np.diff(self.start)

    def summary(self) -> str:
        """Returns what the data set holds and what was dropped, several lines."""
        c = self.counts
        lines = [
            f"{self.annotation_file}: {c['images']} images "
            f"({c['images_without_objects']} without objects), {c['objects']} objects "
            f"of {len(self.class_names)} classes, at most {c['max_objects']} per image"
        ]
        lines += [f"  {c[key]} {text}" for key, text in DROPPED.items() if c.get(key, 0)]
        return "\n".join(lines)


DROPPED = {
    "crowds": "crowd regions: not trained on, ignored by the evaluation",
    "no_segmentation": "annotations dropped: no segmentation",
    "bad_polygons": "polygons dropped: fewer than 3 points or an odd number of values",
    "no_valid_polygon": "annotations dropped: none of their polygons was usable",
    "empty": "annotations dropped: zero area or outside of their image",
    "boxes_only": "objects have a box and no segmentation: their masks are learned from the "
    "box and the colours (loss.box_supervised)",
    "derived_boxes": "boxes derived from the segmentation: no bbox was given",
    "shared_files": "images have the same file as another image: annotations are split",
    "renamed_files": "file names found with other separators, without %20 escapes, or in "
    "another Unicode form",
}


def load_coco(
    images: str,
    annotations: str,
    *,
    categories: Mapping[int, str] | None = None,
    boxes: bool = False,
) -> CocoDataset:
    """Returns what `read_coco` returns; every image file must be there, too.

    Raises:
      InputError: one sentence that names file, field and fix.
    """
    dataset = read_coco(images, annotations, categories=categories, boxes=boxes)
    if missing := missing_files(dataset):
        names = dataset.file_names[missing].tolist()
        raise InputError(
            f"{annotations}: {len(missing)} of {len(dataset)} images are not in "
            f"{images}: {describe(names)}{_hint(images, names[0])}. `file_name` is relative "
            "to that folder: correct the folder, add the files, or remove the images from "
            "the json."
        )
    log.info("%s", dataset.summary())
    return dataset


def read_coco(
    images: str,
    annotations: str | AnnotationTable,
    *,
    categories: Mapping[int, str] | None = None,
    boxes: bool = False,
) -> CocoDataset:
    """Returns the data set of a json; the image files need not be there.

    What is dropped and counted instead of an error: crowds, objects without
    segmentation (unless `boxes`), unusable polygons, objects of zero area or outside of
    their image.

    Args:
      images: folder that the json's file names are relative to, or records, see
        `records.split_root`.
      annotations: COCO instances json, or what it holds.
      categories: id -> name that the json must have, e.g. the training data's.
      boxes: keep objects that have a box and no usable segmentation.
    """
    is_read = isinstance(annotations, AnnotationTable)
    table = annotations if is_read else read_instances(annotations)
    if categories is not None:
        _compare_categories(table.categories, categories, table.source)
    names, missing = find_files(images, table)
    counts = _counts_of_files(table, names)
    only_box = boxes & ~table.has_mask & ~np.isnan(table.boxes[:, 0])
    objects = np.flatnonzero((table.has_mask | only_box) & ~table.crowd)
    corners = _boxes(table, objects, counts)
    sizes = np.stack([table.heights, table.widths], axis=1)[table.image[objects]]
    keep = covers(corners, sizes) & (table.inside | only_box)[objects]
    counts["empty"] = int((~keep).sum())
    order = np.argsort(table.image[objects], kind="stable")
    order = order[keep[order]]
    rows = objects[order]
    num_objects = np.bincount(table.image[rows], minlength=len(names))
    counts["images"], counts["objects"] = len(names), int(num_objects.sum())
    counts["images_without_objects"] = int((num_objects == 0).sum())
    counts["max_objects"] = int(num_objects.max())
    return CocoDataset(
        image_root=images,
        annotation_file=table.source,
        class_names=tuple(table.categories.values()),
        category_ids=tuple(table.categories),
        image_ids=table.batch_ids(),
        file_names=np.array(names),
        missing=np.array(missing, np.int64),
        heights=table.heights,
        widths=table.widths,
        start=offsets(num_objects),
        boxes=corners[order],
        labels=table.label[rows],
        annotation_ids=table.ids[rows],
        segmentations=_with_rectangles(table, rows, corners[order], counts),
        has_mask=table.has_mask[rows],
        counts=dict(counts),
        weights=table.weights,
        table=table,
    )


def _counts_of_files(table: AnnotationTable, names: Sequence[str]) -> Counter[str]:
    """Returns the table's counts, and those of names that occur twice or were found changed."""
    counts = Counter(table.counts)
    counts["shared_files"] = len(names) - len(set(names))
    counts["renamed_files"] = sum(a != b for a, b in zip(names, table.file_names, strict=True))
    return counts


def _with_rectangles(
    table: AnnotationTable, rows: np.ndarray, boxes: np.ndarray, counts: Counter[str]
) -> Segmentations:
    """Returns the outlines of these objects, the box (x0, y0, x1, y1) where there is none.

    What is kept for its box no longer counts as dropped.
    """
    alone = ~table.has_mask[rows]
    if not alone.any():
        return table.segmentations.take(rows)
    counts["boxes_only"] = number = int(alone.sum())
    missing = min(number, counts["no_segmentation"])
    counts["no_segmentation"] -= missing
    counts["no_valid_polygon"] -= number - missing
    places = np.where(alone, len(table.ids) + np.cumsum(alone) - 1, rows)
    sizes = np.stack([table.heights, table.widths], axis=1)[table.image[rows[alone]]]
    return join_segmentations(table.segmentations, rectangles(boxes[alone], sizes)).take(places)


def with_share_of_masks(dataset: CocoDataset, share: float, seed: int) -> CocoDataset:
    """Returns the data set with the masks of so many of its objects; others keep their box.

    Args:
      share: of the objects that have a mask, 0 to 1.
      seed: chooses them.
    """
    masked = np.random.default_rng(seed).permutation(np.flatnonzero(dataset.has_mask))
    kept = masked[: round(share * len(masked))]
    log.info(
        "%s: %d of %d masks are used; of the other objects the boxes are (data.mask_share)",
        dataset.annotation_file,
        len(kept),
        len(masked),
    )
    rows = np.arange(len(dataset.has_mask))
    has_mask = np.isin(rows, kept)
    sizes = np.repeat(np.stack([dataset.heights, dataset.widths], 1), dataset.objects_per_image, 0)
    outlines = join_segmentations(dataset.segmentations, rectangles(dataset.boxes, sizes))
    return dataclasses.replace(
        dataset,
        has_mask=has_mask,
        segmentations=outlines.take(np.where(has_mask, rows, len(rows) + rows)),
    )


def _boxes(table: AnnotationTable, rows: np.ndarray, counts: Counter[str]) -> np.ndarray:
    """Returns (x0, y0, x1, y1), those of the segmentation where none is annotated."""
    boxes = table.boxes[rows]
    for i in np.flatnonzero(np.isnan(boxes[:, 0])):
        counts["derived_boxes"] += 1
        row = int(rows[i])
        if table.segmentations.polygons(row):
            (box,) = table.segmentations.extents(rows[i : i + 1])
            boxes[i] = [*box[:2], *(box[2:] - box[:2])]
        else:
            mask = table.segmentations.rle(row, table.size(int(table.image[row])))
            boxes[i] = coco_mask.toBbox(mask)  # pyright: ignore
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _compare_categories(actual: Mapping[int, str], expected: Mapping[int, str], path: str) -> None:
    """Raises unless a json has the categories of the training data."""
    differences = {
        "missing ids": [f"{i} ({n})" for i, n in expected.items() if i not in actual],
        "unknown ids": [f"{i} ({n})" for i, n in actual.items() if i not in expected],
        "other names": [
            f"{i} ({n!r} became {actual[i]!r})"
            for i, n in expected.items()
            if n != actual.get(i, n)
        ],
    }
    parts = [f"{what}: {describe(values)}" for what, values in differences.items() if values]
    if parts:
        raise InputError(
            f"{path}: `categories` differ from the training data's ({'; '.join(parts)}). "
            "List the same ids and names in both files, also classes without objects."
        )


def missing_files(dataset: CocoDataset) -> list[int]:
    """Returns the images whose file is missing; raises if there is no folder at all."""
    if records.is_records(dataset.image_root):
        records.check(dataset.image_root, len(dataset))
    elif list_folder(dataset.image_root) is None:
        raise InputError(
            f"{dataset.image_root}: no such image folder (for "
            f"{dataset.annotation_file}). Set data.train.images, data.val.images or the "
            "folder in data.vals to the one that holds these images."
        )
    return dataset.missing.tolist()


def find_files(images: str, table: AnnotationTable) -> tuple[list[str], list[int]]:
    """Returns the file names as they are on disk, and which images are not there.

    A name that is not there is tried with "/" for backslashes, without %20 escapes, and
    in Unicode's composed and decomposed form. Lists every folder once.

    Raises:
      InputError: if an image has no name, or its name leads out of the image folder.
    """
    names = list(table.file_names)
    if nameless := [i for i, n in zip(table.image_ids, names, strict=True) if not n]:
        raise InputError(
            f"{table.source}: {len(nameless)} of the images have no `file_name`, the first "
            f"has id {nameless[0]}; add it."
        )
    if records.is_records(images):
        return names, []
    folders: dict[str, set[str]] = {}
    missing = []
    for i, name in enumerate(names):
        if not is_inside(images, name):
            raise InputError(
                f"{table.source}: `file_name` {name!r} of image {table.image_ids[i]} leads "
                f"out of the image folder {images}; write it relative to the folder that "
                "holds all images, and set that folder."
            )
        if not _exists(images, name, folders):
            variants = [v for v in _variants(name) if is_inside(images, v)]
            names[i] = next((v for v in variants if _exists(images, v, folders)), name)
            if names[i] == name:
                missing.append(i)
    return names, missing


def is_inside(folder: str, name: str) -> bool:
    """Returns whether a file name stays in its folder, by its text alone."""
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    return os.path.commonpath([root, path]) == root


def _exists(images: str, name: str, folders: dict[str, set[str]]) -> bool:
    folder, base = os.path.split(os.path.join(images, name))
    if folder not in folders:
        folders[folder] = set(list_folder(folder) or ())
    return base in folders[folder]


def _variants(name: str) -> Sequence[str]:
    """Returns other spellings of a file name, likely ones first."""
    slashes, spaces = name.replace("\\", "/"), urllib.parse.unquote(name)
    spelled = [slashes, spaces, urllib.parse.unquote(slashes)]
    composed = [unicodedata.normalize(f, n) for n in (name, *spelled) for f in ("NFC", "NFD")]
    return list(dict.fromkeys([*spelled, *composed]))


def _hint(images: str, name: str) -> str:
    """Returns what a missing file may be called instead, "" if nothing is like it."""
    wanted = os.path.basename(name).casefold()
    for folder in dict.fromkeys([os.path.dirname(name), ""]):
        path = os.path.join(images, folder)
        for other in sorted(list_folder(path) or ()):
            if other.casefold() == wanted:
                return f" (the folder has {os.path.join(folder, other)})"
    return ""
