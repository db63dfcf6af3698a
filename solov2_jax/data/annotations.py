"""The one reader of instances jsons: checked columns of all that a file holds.

Training, the doctor, evaluation, reports and the record builder read through
`read_instances`, so all of them accept the same files and refuse the others in the same
words. A field that is null counts as absent. Ids may be whole numbers of any size, or
text that holds one; an annotation's own id may be any text. An outline may be nested
deeper or less deep than COCO's list of lists, as long as it has only one meaning.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.io import InputError, read_json
from solov2_jax.rle import rle_from_strings

# Shortest side of a box that still counts, in pixels.
# Source: detectron2 data/detection_utils.py, filter_empty_instances.
MIN_BOX_SIDE = 1e-5
# A polygon is walked pixel by pixel, so a wild coordinate would hang the reader.
MAX_COORDINATE = 1e6
# Batches carry image ids as int32, with -1 as padding; run lengths count in uint32.
_LARGEST_ID, _MOST_PIXELS = 2**31 - 1, 2**32 - 1
_NUMBERS = {int, float}  # json's booleans are no numbers, though Python's are
_RLE_CHUNK = 4096  # masks that are decoded at once


@dataclasses.dataclass(frozen=True)
class Segmentations:
    """Outlines of A objects: polygons, or run lengths, or neither.

    Object a has the polygons `part_start[a]:part_start[a + 1]`; polygon p has the
    values `points[point_start[p]:point_start[p + 1]]`. An object without polygons has
    the compressed run lengths `runs[run_start[a]:run_start[a + 1]]`.
    """

    points: np.ndarray  # float64 [V], x, y, x, y, ... in pixels of the original image
    point_start: np.ndarray  # int64 [P + 1]
    part_start: np.ndarray  # int64 [A + 1]
    runs: np.ndarray  # uint8 [R], COCO's compressed string, at the original size
    run_start: np.ndarray  # int64 [A + 1]

    def polygons(self, index: int) -> list[np.ndarray]:
        """Returns the polygons of an object, each float64 [2 * points]."""
        first, last = self.part_start[index], self.part_start[index + 1]
        edges = self.point_start[first : last + 1]
        return [self.points[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]

    def run_lengths(self, index: int) -> bytes:
        """Returns COCO's compressed run lengths, empty if the object has polygons."""
        return self.runs[self.run_start[index] : self.run_start[index + 1]].tobytes()

    def rle(self, index: int, size: tuple[int, int]) -> dict[str, Any] | None:
        """Returns an object's mask as pycocotools' RLE, None without an outline.

        Args:
          size: (height, width) of its image.
        """
        if counts := self.run_lengths(index):
            return {"size": list(size), "counts": counts}
        return polygons_to_rle(self.polygons(index), size)

    def take(self, rows: np.ndarray) -> "Segmentations":
        """Returns the outlines of some objects, int [n], in that order."""
        parts, part_start = _gather(self.part_start, rows)
        values, point_start = _gather(self.point_start, parts)
        letters, run_start = _gather(self.run_start, rows)
        return Segmentations(
            self.points[values], point_start, part_start, self.runs[letters], run_start
        )


def _gather(start: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the elements of these pieces, and the pieces' new starts."""
    lengths = np.diff(start)[rows]
    first = offsets(lengths)
    return np.arange(first[-1]) + np.repeat(start[rows] - first[:-1], lengths), first


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where each of the consecutive pieces starts, and the end, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class AnnotationTable:
    """N images and all of their A annotations, crowds included, in the file's order."""

    source: str  # what to call the file in a message
    categories: dict[int, str]  # id -> name, sorted by id
    image_ids: list[int]  # as in the file, of any size
    file_names: list[str]  # "" where the file has none
    heights: np.ndarray  # int32 [N]
    widths: np.ndarray  # int32 [N]
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


def describe(values: Iterable[Any], limit: int = 5) -> str:
    """Returns the first few of the values, and how many there are."""
    values = list(values)
    text = ", ".join(str(v) for v in values[:limit])
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"


def as_json(value: Any) -> str:
    """Returns a value as it stands in the file, text in quotes, at most 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
    else:
        content, source = read_content(annotations), os.fspath(annotations)
    _check_lists(content, source)
    categories = _read_categories(content["categories"], source)
    images = _read_images(content["images"], source)
    records = content["annotations"]
    image, label = (
        _references(records, key, kind, known, source)
        for key, kind, known in (
            ("image_id", "image", images["image_ids"]),
            ("category_id", "category", list(categories)),
        )
    )
    outlines = _OutlineReader(source, images["heights"], images["widths"])
    ids = annotation_ids(records, source)
    crowd = np.zeros(len(records), bool)
    boxes, areas = np.full((len(records), 4), np.nan), np.full(len(records), np.nan)
    for i, record in enumerate(records):
        where = _name(source, ids[i])
        crowd[i] = _crowd(record.get("iscrowd"), where)
        if (box := record.get("bbox")) not in (None, []):
            boxes[i] = read_box(box, where)
        if (area := record.get("area")) is not None:
            areas[i] = _read_area(area, where)
        outlines.add(record.get("segmentation"), int(image[i]), where)
    counts = outlines.counts
    counts["annotations"], counts["crowds"] = len(records), int(crowd.sum())
    segmentations, has_mask, inside = outlines.finish(image, ids)
    return AnnotationTable(
        source=source,
        categories=categories,
        **images,
        ids=ids,
        image=image,
        label=label.astype(np.int32),
        crowd=crowd,
        boxes=boxes,
        areas=areas,
        segmentations=segmentations,
        has_mask=has_mask,
        inside=inside,
        counts=counts,
    )


_FORM = "A COCO instances file is a json object with images, annotations and categories."


def read_content(annotations: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the parsed content of an instances json with its three lists."""
    if not os.path.exists(annotations):
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
        if not set(map(type, records)) <= {dict}:
            bad = next(i for i, r in enumerate(records) if type(r) is not dict)
            raise InputError(
                f"{source}: entry {bad} of `{key}` (from 0) is {as_json(records[bad])}, "
                "not an object; correct or remove it."
            )


def _required(records: Sequence[Any], key: str, kind: str, source: str) -> list[Any]:
    """Returns one field of every record."""
    values = [record.get(key) for record in records]
    if None in values:
        bad = [r for r, value in zip(records, values, strict=True) if value is None]
        raise InputError(
            f"{source}: {len(bad)} of the {kind} have no `{key}`, the first is "
            f"{as_json(bad[0])}; add it."
        )
    return values


def whole_number(value: Any) -> int | None:
    """Returns the whole number that a json value is or, as text, holds; else None."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,100}", value, re.ASCII):
        return int(value)
    return None


def _whole_numbers(records: Sequence[Any], key: str, kind: str, source: str) -> list[int]:
    """Returns one field of every record, whole numbers."""
    values = _required(records, key, kind, source)
    if set(map(type, values)) == {int}:
        return values
    numbers = [whole_number(value) for value in values]
    if None in numbers:
        bad = [i for i, number in enumerate(numbers) if number is None]
        texts = [as_json(values[i]) for i in bad]
        if kind == "annotations":
            texts = [
                f"{t} (annotation {records[i].get('id')})" for i, t in zip(bad, texts, strict=True)
            ]
        raise InputError(
            f"{source}: `{key}` of the {kind} must be whole numbers; {len(bad)} of "
            f"{len(values)} are not: {describe(texts)}. Renumber them."
        )
    return [number for number in numbers if number is not None]


def _check_unique(ids: Iterable[Any], kind: str, source: str) -> None:
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise InputError(
            f"{source}: {kind} ids must be unique; repeated: {describe(repeated)}. "
            "Renumber them or remove the duplicates."
        )


def _read_categories(records: list[Any], source: str) -> dict[int, str]:
    """Returns id -> name, sorted by id; a name that is a number becomes text."""
    ids = _whole_numbers(records, "id", "categories", source)
    names = _required(records, "name", "categories", source)
    for i, name in zip(ids, names, strict=True):
        if type(name) not in _NUMBERS | {str}:
            raise InputError(
                f"{source}: `name` of category {i} must be text, not {as_json(name)}; correct it."
            )
    _check_unique(ids, "category", source)
    return {i: str(name) for i, name in sorted(zip(ids, names, strict=True))}


def _read_images(records: list[Any], source: str) -> dict[str, Any]:
    """Returns the table's columns of images."""
    ids = _whole_numbers(records, "id", "images", source)
    _check_unique(ids, "image", source)
    heights = _whole_numbers(records, "height", "images", source)
    widths = _whole_numbers(records, "width", "images", source)
    sizes = list(zip(ids, heights, widths, strict=True))
    if bad := [i for i, h, w in sizes if min(h, w) < 1]:
        raise InputError(
            f"{source}: `height` and `width` must be at least 1; image ids {describe(bad)} "
            "are not. Correct them."
        )
    if bad := [i for i, h, w in sizes if h * w > _MOST_PIXELS]:
        raise InputError(
            f"{source}: `height` times `width` is more than {_MOST_PIXELS} pixels, which run "
            f"lengths cannot count: image ids {describe(bad)}. Cut the images into tiles."
        )
    names = [record.get("file_name") for record in records]
    if not set(map(type, names)) <= {str, type(None)}:
        bad = next(i for i, name in enumerate(names) if not isinstance(name, str | None))
        raise InputError(
            f"{source}: `file_name` of image {ids[bad]} must be text, not "
            f"{as_json(names[bad])}; correct it."
        )
    return {
        "image_ids": ids,
        "file_names": [name or "" for name in names],
        "heights": np.array(heights, np.int64).astype(np.int32),
        "widths": np.array(widths, np.int64).astype(np.int32),
    }


def _references(
    records: Sequence[Any], key: str, kind: str, known: Sequence[int], source: str
) -> np.ndarray:
    """Returns the place of each annotation's image or category, int64 [A]."""
    ids = _whole_numbers(records, key, "annotations", source)
    places = {value: i for i, value in enumerate(known)}
    if unknown := [i for i, value in enumerate(ids) if value not in places]:
        raise InputError(
            f"{source}: {len(unknown)} of {len(records)} annotations are for an unknown "
            f"{kind}: {key} {describe(sorted({ids[i] for i in unknown}))} (annotation "
            f"{describe(records[i].get('id') for i in unknown)}). Add the {kind} to the json or "
            "remove the annotations."
        )
    return np.array([places[value] for value in ids], np.int64)


def annotation_ids(records: Sequence[Any], source: str) -> np.ndarray:
    """Returns the annotations' ids, int64 [A], or text [A] if one does not fit in there.

    Annotations without an id get numbers that come after all others.
    """
    ids: list[Any] = []
    for i, record in enumerate(records):
        value = record.get("id")
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) not in (int, str, type(None)):
            raise InputError(
                f"{source}: `id` of the annotation at place {i} (from 0) must be a whole number "
                f"or text, not {as_json(value)}; correct it."
            )
        ids.append(value)
    _check_unique((i for i in ids if i is not None), "annotation", source)
    number = max((i for i in ids if type(i) is int), default=-1)
    for i, value in enumerate(ids):
        if value is None:
            ids[i] = number = number + 1
    fits = all(type(i) is int and abs(i) < 2**63 for i in ids)
    return np.array(ids, np.int64) if fits else np.array([str(i) for i in ids])


def _name(source: str, annotation: Any) -> str:
    return f"{source}: annotation {annotation}"


def _crowd(value: Any, where: str) -> bool:
    if value is None:
        return False
    number = int(value) if isinstance(value, bool) else whole_number(value)
    if number not in (0, 1):
        raise InputError(f"{where}: `iscrowd` is {as_json(value)}; it must be 0 or 1.")
    return bool(number)


def are_numbers(values: Any) -> bool:
    """Returns whether a json value is a list of finite numbers, no booleans or text."""
    return (
        isinstance(values, list | tuple)
        and set(map(type, values)) <= _NUMBERS
        and all(-1e300 < v < 1e300 for v in values)
    )


def read_box(box: Any, where: str) -> list[float]:
    """Returns a `bbox`, four finite numbers."""
    if not are_numbers(box) or len(box) != 4:
        raise InputError(
            f"{where}: `bbox` is {as_json(box)}, not four numbers (x, y, width, height); "
            "correct it or leave it out."
        )
    return [float(v) for v in box]


def _read_area(area: Any, where: str) -> float:
    if not are_numbers([area]) or area < 0:
        raise InputError(
            f"{where}: `area` is {as_json(area)}, not a number of pixels; correct or remove it."
        )
    return float(area)


def read_outline(
    segmentation: Any, size: tuple[int, int], where: str
) -> tuple[list[np.ndarray], bytes]:
    """Returns a segmentation's polygons, float64 [2 * points] each, or its run lengths.

    Polygons with fewer than 3 points or an odd number of values are among them; the
    run lengths are COCO's compressed string, which `rle_areas` checks.

    Args:
      size: (height, width) of the image.
      where: names the place in messages.
    """
    if isinstance(segmentation, Mapping):
        return [], _run_lengths(segmentation, size, where)
    if not isinstance(segmentation, list | tuple):
        raise InputError(
            f"{where}: `segmentation` is a {type(segmentation).__name__}; give polygons (a "
            "list of lists) or run lengths (size and counts)."
        )
    flat = _flat_outlines(segmentation)
    lone = flat is not None and len(flat) == 1 and flat[0] is segmentation
    if flat is None or (lone and segmentation and not is_polygon(segmentation)):
        raise InputError(
            f"{where}: `segmentation` must be a list of polygons, each a flat list of "
            "numbers [x0, y0, x1, y1, ...]; rewrite it."
        )
    try:
        polygons = [np.array(p, np.float64) for p in flat]
    except OverflowError:
        polygons = [np.full(6, np.inf)]
    if not all(np.abs(p).max() < MAX_COORDINATE for p in polygons if is_polygon(p)):
        raise InputError(
            f"{where}: `segmentation` has a coordinate that is no number or beyond "
            f"{MAX_COORDINATE:.0f} pixels; correct it."
        )
    return polygons, b""


def is_polygon(outline: Any) -> bool:
    """Returns whether a flat outline has 3 points or more."""
    return len(outline) >= 6 and len(outline) % 2 == 0


def _flat_outlines(value: Any, depth: int = 0) -> list[Any] | None:
    """Returns the flat lists of numbers in nested ones; None if there is anything else.

    A list of pairs is one outline; lists around an outline mean nothing.
    """
    types = set(map(type, value))
    if types <= _NUMBERS:
        return [value]
    if not types <= {list, tuple} or depth > 8:
        return None
    if len(value) > 2 and all(len(p) == 2 and set(map(type, p)) <= _NUMBERS for p in value):
        return [[v for pair in value for v in pair]]
    outlines = []
    for part in value:
        inner = _flat_outlines(part, depth + 1)
        if inner is None:
            return None
        outlines += inner
    return outlines


def _run_lengths(segmentation: Mapping[str, Any], size: tuple[int, int], where: str) -> bytes:
    """Returns compressed run lengths of the image's size."""
    counts, stated = segmentation.get("counts"), segmentation.get("size")
    where = f"{where}: `segmentation`"
    if not are_numbers(stated) or list(stated or ()) != list(size):
        raise InputError(
            f"{where} has size {as_json(stated)}, but its image is {list(size)} (height, "
            "width); encode the mask at the image's size."
        )
    if isinstance(counts, str | bytes) and counts:
        return counts if isinstance(counts, bytes) else counts.encode()
    if not isinstance(counts, list) or not set(map(type, counts)) == {int} or min(counts) < 0:
        raise InputError(
            f"{where} needs `counts`: a list of run lengths or COCO's compressed string; "
            "write one of them."
        )
    if sum(counts) != size[0] * size[1]:
        raise InputError(
            f"{where}: `counts` add up to {sum(counts)}, not to {size[0]} x {size[1]} = "
            f"{size[0] * size[1]} pixels; encode the mask again."
        )
    whole: Any = {"size": list(size), "counts": counts}
    return coco_mask.frPyObjects(whole, *size)["counts"]  # pyright: ignore


def polygons_to_rle(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> dict | None:
    """Returns the union of the usable polygons as pycocotools' RLE, None without one."""
    usable: Any = [p for p in polygons if is_polygon(p)]
    return coco_mask.merge(coco_mask.frPyObjects(usable, *size)) if usable else None


def rle_areas(
    counts: Sequence[bytes], pixels: Sequence[int], where: Callable[[int], str]
) -> np.ndarray:
    """Returns the number of pixels of each mask, int64 [n].

    Args:
      counts: COCO's compressed run lengths.
      pixels: of each mask's image.
      where: names the i-th mask in messages.

    Raises:
      InputError: naming the first mask whose run lengths do not cover its image.
    """
    areas = []
    for first in range(0, len(counts), _RLE_CHUNK):
        chunk = slice(first, first + _RLE_CHUNK)
        area, covers = _rle_areas(counts[chunk], pixels[chunk])
        if not covers:  # one by one, to know which
            one_by_one = range(first, min(first + _RLE_CHUNK, len(counts)))
            bad = next(i for i in one_by_one if not _rle_areas([counts[i]], [pixels[i]])[1])
            raise InputError(
                f"{where(bad)}: `segmentation` has damaged run lengths, which do not cover the "
                f"image's {pixels[bad]} pixels; encode the mask again."
            )
        areas.append(area)
    return np.concatenate(areas) if areas else np.zeros(0, np.int64)


def _rle_areas(counts: Sequence[bytes], pixels: Sequence[int]) -> tuple[np.ndarray, bool]:
    """Returns the masks' pixels, and whether all run lengths cover their images."""
    try:
        runs, lengths = rle_from_strings(counts)
    except ValueError:
        return np.zeros(0), False
    start = offsets(lengths)
    place = np.arange(len(runs)) - np.repeat(start[:-1], lengths)
    total, covered = offsets(runs), offsets(runs * (place & 1))
    covers = not (runs < 0).any() and (total[start[1:]] - total[start[:-1]] == pixels).all()
    return covered[start[1:]] - covered[start[:-1]], bool(covers)


class _OutlineReader:
    """Takes segmentations one by one; `finish` gives them as columns."""

    def __init__(self, source: str, heights: np.ndarray, widths: np.ndarray):
        self.source = source
        self.sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))
        self.counts: Counter[str] = Counter()
        self.points: list[np.ndarray] = []
        self.parts: list[int] = []  # polygons per object
        self.runs: list[bytes] = []

    def add(self, segmentation: Any, image: int, where: str) -> None:
        """Takes an annotation's segmentation, which may be absent."""
        usable, runs = [], b""
        if segmentation in (None, [], {}):
            self.counts["no_segmentation"] += 1
        else:
            polygons, runs = read_outline(segmentation, self.sizes[image], where)
            usable = [p for p in polygons if is_polygon(p)]
            self.counts["bad_polygons"] += len(polygons) - len(usable)
            self.counts["no_valid_polygon"] += not usable and not runs
        self.points += usable
        self.parts.append(len(usable))
        self.runs.append(runs)

    def finish(
        self, image: np.ndarray, ids: np.ndarray
    ) -> tuple[Segmentations, np.ndarray, np.ndarray]:
        """Returns the outlines, which objects have one, and which are in their image."""
        point_start = offsets([len(p) for p in self.points])
        segmentations = Segmentations(
            points=np.concatenate(self.points) if self.points else np.zeros(0),
            point_start=point_start,
            part_start=offsets(self.parts),
            runs=np.frombuffer(b"".join(self.runs), np.uint8),
            run_start=offsets([len(r) for r in self.runs]),
        )
        drawn = np.flatnonzero(self.parts)
        encoded = np.flatnonzero(np.diff(segmentations.run_start))
        inside = np.zeros(len(self.parts), bool)
        pixels = [self.sizes[image[i]][0] * self.sizes[image[i]][1] for i in encoded]
        areas = rle_areas(
            [self.runs[i] for i in encoded], pixels, lambda i: _name(self.source, ids[encoded[i]])
        )
        inside[encoded] = areas > 0
        if len(drawn):
            xy = segmentations.points.reshape(-1, 2)
            first = point_start[segmentations.part_start[drawn]] // 2
            low, high = (f.reduceat(xy, first, axis=0) for f in (np.minimum, np.maximum))
            sizes = np.array(self.sizes)[image[drawn]]
            inside[drawn] = covers(np.concatenate([low, high], axis=1), sizes)
        has_mask = np.diff(segmentations.part_start) + np.diff(segmentations.run_start) > 0
        return segmentations, has_mask, inside


def covers(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns which boxes have an extent inside of their image, bool [A].

    Args:
      boxes: (x0, y0, x1, y1) [A, 4].
      sizes: (height, width) [A, 2].
    """
    limit = sizes[:, ::-1]
    side = np.clip(boxes[:, 2:], 0, limit) - np.clip(boxes[:, :2], 0, limit)
    return np.asarray((side > MIN_BOX_SIDE).all(axis=-1))
