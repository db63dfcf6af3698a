"""What is annotated, ready to be compared with predictions."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.data.annotations import AnnotationTable, read_instances
from solov2_jax.data.coco import find_files

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
    sides = zip(table.heights.tolist(), table.widths.tolist(), strict=True)
    records = {
        image_id: {"id": image_id, "file_name": name, "height": height, "width": width}
        for image_id, name, (height, width) in zip(table.image_ids, names, sides, strict=True)
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
