"""The one reader of instances jsons: checked columns of all that a file holds.

Training, the doctor, evaluation, reports and the record builder read through
`read_instances`, so all of them accept the same files and refuse the others in the same
words. A field that is null counts as absent. Ids may be whole numbers of any size, or
text that holds one; an annotation's own id may be any text. An outline may be nested
deeper or less deep than COCO's list of lists, as long as it has only one meaning.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from solov2_jax.data.cityscapes import find_gt_fine, read_cityscapes
from solov2_jax.data.federated import Federated, read_federated
from solov2_jax.data.fields import Fields, describe, read_box, whole_number
from solov2_jax.data.outlines import (
    NUMBERS,
    Segmentations,
    are_numbers,
    as_json,
    covers,
    is_polygon,
    make_segmentations,
    read_outline,
    rle_areas,
)
from solov2_jax.io import InputError, exists, read_json
from solov2_jax.progress import track

WEIGHT = "sampling_weight"  # a field of an image that is ours, not COCO's
# Batches carry image ids as int32, with -1 as padding; run lengths count in uint32.
_LARGEST_ID, _MOST_PIXELS = 2**31 - 1, 2**32 - 1
_LEAST_WEIGHT, _LARGEST_WEIGHT = 0.001, 100
_FORM = "A COCO instances file is a json object with images, annotations and categories."


@dataclasses.dataclass(frozen=True)
class AnnotationTable:
    """N images and all of their A annotations, crowds included, in the file's order."""

    source: str  # what to call the file in a message
    categories: dict[int, str]  # id -> name, sorted by id
    image_ids: list[int]  # as in the file, of any size
    file_names: list[str]  # "" where the file has none
    heights: np.ndarray  # int32 [N]
    widths: np.ndarray  # int32 [N]
    weights: np.ndarray  # float64 [N], how often each image is trained on in an epoch
    ids: np.ndarray  # of the annotations, int64 [A], or text where one does not fit
    image: np.ndarray  # int64 [A], place among the images
    label: np.ndarray  # int32 [A], place among the categories
    crowd: np.ndarray  # bool [A]
    boxes: np.ndarray  # float64 [A, 4], x, y, width, height; NaN where none is given
    areas: np.ndarray  # float64 [A], pixels; NaN where none is given
    segmentations: Segmentations
    has_mask: np.ndarray  # bool [A], whether there is a usable outline
    inside: np.ndarray  # bool [A], whether it has an extent inside of its image
    counts: Counter[str]  # crowds, no_segmentation, bad_polygons, no_valid_polygon, ...
    federated: Federated | None = None  # of an LVIS json
    gt_fine: str = ""  # of Cityscapes: the folder of gtFine

    def batch_ids(self) -> np.ndarray:
        """Returns the number that stands for each image in batches, int64 [N].

        Its id, unless one of the file's is negative or beyond int32: then its place.
        """
        if all(0 <= i <= _LARGEST_ID for i in self.image_ids):
            return np.array(self.image_ids, np.int64)
        return np.arange(len(self.image_ids))

    def size(self, image: int) -> tuple[int, int]:
        """Returns (height, width) of an image, by its place."""
        return int(self.heights[image]), int(self.widths[image])


def read_instances(
    annotations: str | os.PathLike[str] | Mapping[str, Any], source: str = ""
) -> AnnotationTable:
    """Returns the content of an instances json.

    Args:
      annotations: the file, or its parsed content.
      source: what to call parsed content in messages.

    Raises:
      InputError: one sentence that names the file, the annotation and the field.
    """
    if isinstance(annotations, Mapping):
        content, source = annotations, source or "the annotations"
        _check_lists(content, source)
    else:
        content, source = read_content(annotations), os.fspath(annotations)
    categories = _read_categories(content["categories"], source)
    images = _read_images(content["images"], source)
    records = content["annotations"]
    ids = annotation_ids(records, source)
    field = Fields(records, source, lambda i: f"annotation {ids[i]}")
    image = _references(field, "image_id", "image", images["image_ids"])
    label = _references(field, "category_id", "category", list(categories))
    crowd = np.array(field("iscrowd", _flag, "0 or 1", 0), bool)
    box = field("bbox", read_box, "four numbers (x, y, width, height)", [np.nan] * 4)
    area = field("area", _area, "a number of pixels", np.nan)
    sizes = np.stack([images["heights"], images["widths"]], axis=1)[image]
    segmentations, counts = _read_outlines(field, sizes)
    encoded = np.flatnonzero(np.diff(segmentations.run_start))
    drawn = np.flatnonzero(np.diff(segmentations.part_start))
    inside = np.zeros(len(records), bool)
    inside[encoded] = 0 < rle_areas(
        [segmentations.run_lengths(i) for i in encoded.tolist()],
        sizes[encoded].astype(np.int64).prod(axis=1).tolist(),
        lambda i: field.name(int(encoded[i])),
    )
    inside[drawn] = covers(segmentations.extents(drawn), sizes[drawn])
    counts["annotations"], counts["crowds"] = len(records), int(crowd.sum())
    return AnnotationTable(
        source=source,
        categories=categories,
        **images,
        ids=ids,
        image=image,
        label=label.astype(np.int32),
        crowd=crowd,
        boxes=np.array(box, np.float64).reshape(-1, 4),
        areas=np.array(area, np.float64),
        segmentations=segmentations,
        has_mask=np.isin(np.arange(len(records)), [*drawn, *encoded]),
        inside=inside,
        counts=counts,
        federated=read_federated(content, images["image_ids"], list(categories), source),
        gt_fine=find_gt_fine(content),
    )


def read_content(annotations: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the parsed content of an instances json with its three lists.

    A folder is taken for the ground truth of Cityscapes, see `data.cityscapes`.
    """
    if os.path.isdir(annotations):
        return read_cityscapes(annotations)
    if not exists(annotations):
        raise InputError(
            f"{annotations}: no such annotation file. Set data.train.annotations and "
            "data.val.annotations, or the flag, to a COCO instances json."
        )
    content = read_json(annotations, "json", _FORM)
    _check_lists(content, os.fspath(annotations))
    return content


def _check_lists(content: Any, source: str) -> None:
    """Raises unless the three lists are there, with at least an image and a category."""
    if not isinstance(content, Mapping):
        what = "list" if isinstance(content, list) else type(content).__name__
        raise InputError(
            f"{source}: holds a json {what}, not an object with images, annotations and "
            "categories. Is it a results file?"
        )
    for key in ("images", "annotations", "categories"):
        records = content.get(key)
        if not isinstance(records, list):
            raise InputError(
                f"{source}: has no list `{key}`. {_FORM} Add it, even if there are no annotations."
            )
        if key != "annotations" and not records:
            raise InputError(f"{source}: `{key}` is empty; list at least one.")
        for i, record in enumerate(records):
            if type(record) is not dict:
                raise InputError(
                    f"{source}: entry {i} of `{key}` (from 0) is {as_json(record)}, not an "
                    "object; correct or remove it."
                )


def _side(value: Any) -> int | None:
    pixels = whole_number(value)
    return pixels if pixels is not None and 1 <= pixels <= _LARGEST_ID else None


def _text(value: Any) -> str | None:
    return str(value) if type(value) in NUMBERS | {str} else None


def _flag(value: Any) -> int | None:
    flag = int(value) if isinstance(value, bool) else whole_number(value)
    return flag if flag in (0, 1) else None


def _area(value: Any) -> float | None:
    return float(value) if are_numbers([value]) and value >= 0 else None


def _weight(value: Any) -> float | None:
    fits = are_numbers([value]) and _LEAST_WEIGHT <= value <= _LARGEST_WEIGHT
    return float(value) if fits else None


def _own_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else whole_number(value)


def _check_unique(ids: Iterable[Any], kind: str, source: str) -> None:
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise InputError(
            f"{source}: {kind} ids must be unique; repeated: {describe(repeated)}. "
            "Renumber them or remove the duplicates."
        )


def _read_categories(records: list[Any], source: str) -> dict[int, str]:
    """Returns id -> name, sorted by id; a name that is a number becomes text."""
    field = Fields(records, source, lambda i: f"category {as_json(records[i].get('id'))}")
    ids = field("id", whole_number, "a whole number")
    _check_unique(ids, "category", source)
    return dict(sorted(zip(ids, field("name", _text, "text"), strict=True)))


def _read_images(records: list[Any], source: str) -> dict[str, Any]:
    """Returns the table's columns of images."""
    field = Fields(records, source, lambda i: f"image {as_json(records[i].get('id'))}")
    ids = field("id", whole_number, "a whole number")
    _check_unique(ids, "image", source)
    heights, widths = (
        np.array(field(key, _side, "a whole number of at least 1"), np.int64)
        for key in ("height", "width")
    )
    if (large := np.flatnonzero(heights * widths > _MOST_PIXELS)).size:
        raise InputError(
            f"{field.name(int(large[0]))}: `height` times `width` is more than {_MOST_PIXELS} "
            "pixels, which run lengths cannot count; cut it into tiles."
        )
    return {
        "image_ids": ids,
        "file_names": _file_names(field),
        "heights": heights.astype(np.int32),
        "widths": widths.astype(np.int32),
        "weights": np.array(
            field(WEIGHT, _weight, f"a number from {_LEAST_WEIGHT} to {_LARGEST_WEIGHT}", 1.0)
        ),
    }


def _file_names(field: Fields) -> list[str]:
    """Returns `file_name`, or where there is none the last two parts of LVIS's `coco_url`.

    These are the folder and file in COCO: val2017/000000397133.jpg.
    """

    def text(value: Any) -> str | None:
        return value if type(value) is str else None

    names = field("file_name", text, "text", "")
    urls = field("coco_url", text, "text", "") if "" in names else names
    return [n or "/".join(url.split("/")[-2:]) for n, url in zip(names, urls, strict=True)]


def _references(field: Fields, key: str, kind: str, known: Sequence[int]) -> np.ndarray:
    """Returns the place of each annotation's image or category, int64 [A]."""
    ids = field(key, whole_number, "a whole number")
    places = {value: i for i, value in enumerate(known)}
    if unknown := [i for i, value in enumerate(ids) if value not in places]:
        raise InputError(
            f"{field.source}: {len(unknown)} of {len(ids)} annotations are for an unknown "
            f"{kind}: {key} {describe(sorted({ids[i] for i in unknown}))} "
            f"({describe(map(field.title, unknown))}). Add the {kind} to the json or remove "
            "the annotations."
        )
    return np.array([places[value] for value in ids], np.int64)


def annotation_ids(records: Sequence[Any], source: str) -> np.ndarray:
    """Returns the annotations' ids, int64 [A], or text [A] if one does not fit in there.

    Annotations without an id get numbers that come after all others.
    """
    field = Fields(records, source, lambda i: f"annotation at place {i} (from 0)")
    ids = field("id", _own_id, "a whole number or text", default="")
    _check_unique((i for i in ids if i != ""), "annotation", source)
    largest = max((i for i in ids if type(i) is int), default=-1)
    for i, value in enumerate(ids):
        if value == "":
            ids[i] = largest = largest + 1
    fits = all(type(i) is int and abs(i) < 2**63 for i in ids)
    return np.array(ids, np.int64) if fits else np.array([str(i) for i in ids])


def _read_outlines(field: Fields, sizes: np.ndarray) -> tuple[Segmentations, Counter[str]]:
    """Returns the usable outlines, and how many were not.

    Args:
      sizes: (height, width) of each annotation's image.
    """
    counts: Counter[str] = Counter()
    outlines = []
    records = track(field.records, "reading annotations", unit="objects")
    for i, (record, size) in enumerate(zip(records, sizes.tolist(), strict=True)):
        segmentation = record.get("segmentation")
        if segmentation in (None, [], {}):
            counts["no_segmentation"] += 1
            outlines.append(([], b""))
            continue
        polygons, runs = read_outline(segmentation, size, lambda i=i: field.name(i))
        usable = [p for p in polygons if is_polygon(p)]
        counts["bad_polygons"] += len(polygons) - len(usable)
        counts["no_valid_polygon"] += not usable and not runs
        outlines.append((usable, runs))
    return make_segmentations(outlines), counts
