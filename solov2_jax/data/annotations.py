"""The annotation records of an instances json as flat, checked columns."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Shortest side of a box that still counts, in pixels.
# Source: detectron2 data/detection_utils.py, filter_empty_instances.
MIN_BOX_SIDE = 1e-5
# A polygon is walked pixel by pixel, so a wild coordinate would hang the reader.
MAX_COORDINATE = 1e6


@dataclasses.dataclass(frozen=True)
class Segmentations:
    """Outlines of A objects: polygons, or else run lengths.

    Object a has the polygons `part_start[a]:part_start[a + 1]`; polygon p has the
    values `points[point_start[p]:point_start[p + 1]]`. An object without polygons has
    the compressed run lengths `runs[run_start[a]:run_start[a + 1]]` instead.
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


def describe(values: Iterable[Any], limit: int = 5) -> str:
    """Returns the first few of the values, and how many there are."""
    values = list(values)
    text = ", ".join(str(v) for v in values[:limit])
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"


def collect(
    records: Sequence[dict[str, Any]],
    path: str,
    table: dict[str, np.ndarray],
    category_ids: tuple[int, ...],
) -> tuple[dict[str, Any], Counter[str]]:
    """Returns CocoDataset's columns of objects, and what was found and dropped.

    Args:
      records: the json's `annotations`.
      path: the json's name, for messages.
      table: the columns of the images.
      category_ids: sorted ids of the classes.
    """
    _check_references(records, path, table["image_ids"], category_ids)
    rows = {int(v): i for i, v in enumerate(table["image_ids"])}
    labels = {v: i for i, v in enumerate(category_ids)}
    builder = _Builder(path, table)
    counts = builder.counts
    counts["annotations"] = len(records)
    for position, record in enumerate(records):
        if record.get("iscrowd", 0):
            counts["crowds"] += 1
            continue
        row, label = rows[record["image_id"]], labels[record["category_id"]]
        builder.add(record, int(record.get("id", position)), row, label)
    return builder.finish(), counts


def _check_references(
    records: Sequence[Any],
    path: str,
    image_ids: np.ndarray,
    category_ids: tuple[int, ...],
) -> None:
    """Raises if an annotation names an image or a category that is not listed."""
    for key, kind, known in (
        ("image_id", "image", set(image_ids.tolist())),
        ("category_id", "category", set(category_ids)),
    ):
        lacking = [r for r in records if not isinstance(r, dict) or key not in r]
        if lacking:
            raise ValueError(
                f"{path}: {len(lacking)} annotations have no `{key}`, the first is "
                f"{str(lacking[0])[:120]}; add it."
            )
        bad = [r for r in records if r[key] not in known]
        if bad:
            unknown = sorted({r[key] for r in bad}, key=str)
            raise ValueError(
                f"{path}: {len(bad)} of {len(records)} annotations are for an unknown "
                f"{kind}: {key} {describe(unknown)}. Add the {kind} to the json or "
                "remove the annotations."
            )
    repeated = [i for i, n in Counter(r["id"] for r in records if "id" in r).items() if n > 1]
    if repeated:
        raise ValueError(
            f"{path}: annotation ids must be unique, the evaluation counts on it; "
            f"repeated: {describe(repeated)}. Renumber them."
        )


class _Builder:
    """Takes objects one by one; `finish` drops the empty ones and sorts by image."""

    def __init__(self, path: str, table: dict[str, np.ndarray]):
        self.path = path
        self.heights, self.widths = table["heights"], table["widths"]
        self.counts: Counter[str] = Counter()
        self.rows: list[int] = []
        self.labels: list[int] = []
        self.ids: list[int] = []
        self.boxes: list[Sequence[float]] = []
        self.points: list[np.ndarray] = []
        self.parts: list[int] = []  # polygons per object
        self.runs: list[bytes] = []

    def add(self, record: dict[str, Any], name: int, row: int, label: int) -> None:
        """Takes an annotation that is no crowd; `name` is its id for messages."""
        segmentation = record.get("segmentation")
        polygons: list[np.ndarray] = []
        runs = b""
        if not segmentation:
            self.counts["no_segmentation"] += 1
            return
        if isinstance(segmentation, dict):
            runs = self._run_lengths(segmentation, name, row)
        elif isinstance(segmentation, list):
            polygons = self._polygons(segmentation, name)
            if not polygons:
                self.counts["no_valid_polygon"] += 1
                return
        else:
            raise ValueError(
                f"{self.path}: annotation {name}: `segmentation` is a "
                f"{type(segmentation).__name__}; give polygons (a list of lists) or "
                "run lengths (size and counts)."
            )
        self.boxes.append(self._box(record, name, polygons, runs, row))
        self.rows.append(row)
        self.labels.append(label)
        self.ids.append(name)
        self.points.extend(polygons)
        self.parts.append(len(polygons))
        self.runs.append(runs)

    def _polygons(self, segmentation: list[Any], name: int) -> list[np.ndarray]:
        """Returns the usable polygons."""
        try:
            arrays = [np.asarray(p, np.float64) for p in segmentation]
        except (TypeError, ValueError):
            arrays = [np.zeros((0, 0))]
        if any(a.ndim != 1 for a in arrays):
            raise ValueError(
                f"{self.path}: annotation {name}: `segmentation` must be a list of "
                "polygons, each a flat list [x0, y0, x1, y1, ...]; rewrite it."
            )
        good = [a for a in arrays if len(a) >= 6 and len(a) % 2 == 0]
        self.counts["bad_polygons"] += len(arrays) - len(good)
        if any(not (np.abs(a) < MAX_COORDINATE).all() for a in good):
            raise ValueError(
                f"{self.path}: annotation {name}: `segmentation` has a coordinate "
                f"that is no number or beyond {MAX_COORDINATE:.0f} pixels; correct it."
            )
        return good

    def _run_lengths(self, segmentation: dict[str, Any], name: int, row: int) -> bytes:
        """Returns compressed run lengths of the image's size."""
        h, w = int(self.heights[row]), int(self.widths[row])
        where = f"{self.path}: annotation {name}: `segmentation`"
        counts = segmentation.get("counts")
        size = segmentation.get("size")
        if not isinstance(size, list) or size != [h, w]:
            raise ValueError(
                f"{where} has size {size}, but its image is {[h, w]} (height, width); "
                "encode the mask at the image's size."
            )
        if isinstance(counts, str):
            return counts.encode()
        if not isinstance(counts, list) or not all(isinstance(c, int) and c >= 0 for c in counts):
            raise ValueError(
                f"{where} needs `counts`: a list of run lengths or COCO's compressed "
                "string; write one of them."
            )
        if sum(counts) != h * w:
            raise ValueError(
                f"{where}: `counts` add up to {sum(counts)}, not to {h} x {w} = "
                f"{h * w} pixels; encode the mask again."
            )
        return coco_mask.frPyObjects(segmentation, h, w)["counts"]  # pyright: ignore

    def _box(
        self,
        record: dict[str, Any],
        name: int,
        polygons: list[np.ndarray],
        runs: bytes,
        row: int,
    ) -> list[float]:
        """Returns the annotated (x, y, width, height), or the segmentation's."""
        box = record.get("bbox")
        if box:
            numbers = all(
                isinstance(v, int | float) and np.isfinite(v) for v in box
            ) and not isinstance(box, str)
            if not numbers or len(box) != 4:
                raise ValueError(
                    f"{self.path}: annotation {name}: `bbox` is {box}, not four "
                    "numbers (x, y, width, height); correct it or leave it out."
                )
            return [float(v) for v in box]
        self.counts["derived_boxes"] += 1
        if polygons:
            xy = np.concatenate(polygons).reshape(-1, 2)
            low, high = xy.min(axis=0), xy.max(axis=0)
            return [*low.tolist(), *(high - low).tolist()]
        size = [int(self.heights[row]), int(self.widths[row])]
        return coco_mask.toBbox({"size": size, "counts": runs}).tolist()

    def finish(self) -> dict[str, Any]:
        """Returns the columns of the objects that cover something of their image."""
        rows = np.array(self.rows, np.int64)
        box = np.array(self.boxes, np.float64).reshape(-1, 4)
        box[:, 2:] += box[:, :2]
        keep = _covers(box, self.heights[rows], self.widths[rows])
        keep &= self._segmentation_covers(rows)
        self.counts["empty"] += int((~keep).sum())
        order = np.flatnonzero(keep)
        order = order[np.argsort(rows[order], kind="stable")]
        number = np.bincount(rows[order], minlength=len(self.heights))
        return {
            "start": _offsets(number),
            "boxes": box[order],
            "labels": np.array(self.labels, np.int32)[order],
            "annotation_ids": np.array(self.ids, np.int64)[order],
            "segmentations": self._segmentations(order),
        }

    def _segmentation_covers(self, rows: np.ndarray) -> np.ndarray:
        """Returns which outlines have an extent inside of their image, bool [A]."""
        keep = np.ones(len(rows), bool)
        first = np.concatenate([[0], np.cumsum(self.parts)]).astype(int)
        for i, row in enumerate(rows):
            polygons = self.points[first[i] : first[i + 1]]
            h, w = int(self.heights[row]), int(self.widths[row])
            if polygons:
                xy = np.concatenate(polygons).reshape(-1, 2)
                extent = np.concatenate([xy.min(axis=0), xy.max(axis=0)])
                keep[i] = _covers(extent[None], np.array([h]), np.array([w]))[0]
            else:
                keep[i] = coco_mask.area({"size": [h, w], "counts": self.runs[i]}) > 0
        return keep

    def _segmentations(self, order: np.ndarray) -> Segmentations:
        first = np.concatenate([[0], np.cumsum(self.parts)]).astype(int)
        points = [p for i in order for p in self.points[first[i] : first[i + 1]]]
        runs = [self.runs[i] for i in order]
        return Segmentations(
            points=np.concatenate(points) if points else np.zeros(0),
            point_start=_offsets([len(p) for p in points]),
            part_start=_offsets([self.parts[i] for i in order]),
            runs=np.frombuffer(b"".join(runs), np.uint8),
            run_start=_offsets([len(r) for r in runs]),
        )


def _covers(box: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Returns which (x0, y0, x1, y1) have an extent inside of the image, bool [A]."""
    limit = np.stack([widths, heights], axis=-1)
    side = np.clip(box[:, 2:], 0, limit) - np.clip(box[:, :2], 0, limit)
    return np.asarray((side > MIN_BOX_SIDE).all(axis=-1))


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where each of the consecutive pieces starts, and the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
