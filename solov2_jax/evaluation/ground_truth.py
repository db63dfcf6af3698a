"""What is annotated, ready to be compared with predictions, and predictions from files.

The annotations are what `data.annotations.read_instances` reads; results of any tool in
COCO's format are read by the same rules.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.annotations import (
    AnnotationTable,
    Fields,
    describe,
    read_box,
    read_instances,
    whole_number,
)
from solov2_jax.data.coco import find_files
from solov2_jax.data.outlines import are_numbers, as_json, is_polygon, read_outline, rle_areas
from solov2_jax.io import InputError, read_json
from solov2_jax.rle import polygons_to_rle

rle: Any = coco_mask  # its type stubs are narrower than what it takes


@dataclass(frozen=True)
class GroundTruth:
    """The images, categories and usable annotations of an instances json.

    Annotations have every key that COCO's evaluation reads, crowds are among them,
    their masks are RLE, and their ids count from 1: pycocotools takes a match with an
    object of id 0 for no match.
    """

    source: str  # what to call it in a message
    images: dict[int, dict[str, Any]]  # by id: id, file_name, height, width
    categories: dict[int, str]  # id -> name
    annotations: list[dict[str, Any]]
    num_without_mask: int  # annotations that are left out
    image_ids: dict[int, int]  # of a prediction, as batches carry it -> of the json


def read_ground_truth(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | AnnotationTable, images: str = ""
) -> GroundTruth:
    """Returns the ground truth of an instances json: its file, its content, or as read.

    Objects without a usable mask are left out; missing `area`, `bbox` and `iscrowd` are
    filled in.

    Args:
      images: folder of the images, to find their files there; "": names stay as they are.
    """
    known = isinstance(annotations, AnnotationTable)
    table = annotations if known else read_instances(annotations)
    names = find_files(images, table)[0] if images else table.file_names
    records = {
        image_id: {"id": image_id, "file_name": name, "height": size[0], "width": size[1]}
        for i, (image_id, name) in enumerate(zip(table.image_ids, names, strict=True))
        for size in [table.size(i)]
    }
    category_ids = list(table.categories)
    usable = []
    for row in np.flatnonzero(table.has_mask).tolist():
        image = int(table.image[row])
        mask = table.segmentations.rle(row, table.size(image))
        box, area = table.boxes[row], float(table.areas[row])
        usable.append(
            {
                "id": len(usable) + 1,
                "image_id": table.image_ids[image],
                "category_id": category_ids[table.label[row]],
                "segmentation": mask,
                "area": float(rle.area(mask)) if np.isnan(area) else area,
                "bbox": (rle.toBbox(mask) if np.isnan(box[0]) else box).tolist(),
                "iscrowd": int(table.crowd[row]),
            }
        )
    return GroundTruth(
        source=table.source,
        images=records,
        categories=table.categories,
        annotations=usable,
        num_without_mask=len(table.ids) - len(usable),
        image_ids=dict(zip(table.batch_ids().tolist(), table.image_ids, strict=True)),
    )


_FORMAT = (
    "COCO's results format is a json list of objects with image_id, category_id, score "
    "and segmentation"
)


def read_results(path: str, truth: GroundTruth) -> list[dict[str, Any]]:
    """Returns the results of a file, masks as RLE, missing boxes taken from masks.

    Raises:
      InputError: naming the file, the entry and the field, also where ids of images or
        categories are not the annotations'.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file of predictions")
    content = read_json(path, "json", _FORMAT)
    if not isinstance(content, list):
        instances = isinstance(content, dict) and "annotations" in content
        kind = "an instances json" if instances else "something else"
        raise InputError(f"{path}: is {kind}, not a list of results; {_FORMAT}")
    for i, record in enumerate(content):
        if not isinstance(record, dict):
            raise InputError(f"{path}: entry {i} is {as_json(record)}, not an object; {_FORMAT}")
    field = Fields(content, path, lambda i: f"entry {i}")
    images = _ids(field, "image_id", truth.images, truth.source)
    categories = _ids(field, "category_id", truth.categories, truth.source)
    field = Fields(content, path, lambda i: f"entry {i} (image {images[i]})")
    scores = field("score", lambda v: float(v) if are_numbers([v]) else None, "a finite number")
    boxes = field("bbox", read_box, "four numbers (x, y, width, height)", default=())
    outlines = field("segmentation", lambda v: v, "polygons or run lengths")
    sizes = [(truth.images[i]["height"], truth.images[i]["width"]) for i in images]
    results = [
        {
            "image_id": images[i],
            "category_id": categories[i],
            "bbox": boxes[i],
            "score": scores[i],
            "segmentation": _mask(outline, size, field.name(i)),
        }
        for i, (outline, size) in enumerate(zip(outlines, sizes, strict=True))
    ]
    rle_areas(
        [r["segmentation"]["counts"] for r in results],
        [height * width for height, width in sizes],
        field.name,
    )
    for result in results:  # only now: run lengths are known to be sound
        if not result["bbox"]:
            result["bbox"] = rle.toBbox(result["segmentation"]).tolist()
    return results


_FIXES = {
    "image_id": "are these predictions of other images?",
    "category_id": "write the ids of the annotations' `categories`, not places in a list of "
    "classes",
}


def _ids(field: Fields, key: str, known: Mapping[int, Any], source: str) -> list[int]:
    """Returns the image or category ids of all results."""
    ids = field(key, whole_number, "a whole number")
    if wrong := [i for i in ids if i not in known]:
        raise InputError(
            f"{field.source}: {len(wrong)} of {len(ids)} entries have a `{key}` that {source} has "
            f"not: {describe(wrong)} (there are {describe(sorted(known))}); {_FIXES[key]}"
        )
    return ids


def _mask(segmentation: Any, size: tuple[int, int], name: str) -> dict[str, Any]:
    """Returns the RLE of a result."""
    polygons, counts = read_outline(segmentation, size, lambda: name)
    if counts:
        return {"size": list(size), "counts": counts}
    usable = [p for p in polygons if is_polygon(p)]
    if not usable:
        raise InputError(f"{name}: `segmentation` has no polygon of 3 points or more")
    return polygons_to_rle(usable, size)
