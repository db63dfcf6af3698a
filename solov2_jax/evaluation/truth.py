"""What is annotated: an instances json, ready to be compared with predictions."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from solov2_jax.evaluation.tables import rle


@dataclass(frozen=True)
class Truth:
    """The images, categories and usable annotations of an instances json.

    Annotations have every key that COCO's evaluation reads, their masks are RLE, and
    their ids count from 1: pycocotools takes a match with an object of id 0 for no
    match.
    """

    source: str  # what to call it in a message
    images: dict[int, dict[str, Any]]  # by id
    categories: dict[int, str]  # id -> name
    annotations: list[dict[str, Any]]
    num_without_mask: int  # annotations that are left out


def read_truth(annotations: str | os.PathLike[str] | dict[str, Any]) -> Truth:
    """Returns the content of an instances json: a file, or its parsed content.

    Objects without a usable mask are left out; missing `area`, `bbox` and `iscrowd` are
    filled in.
    """
    if isinstance(annotations, dict):
        source, content = "the annotations", annotations
    else:
        source = os.fspath(annotations)
        content = _read_json(Path(annotations))
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{source}: has no list `{key}`; a COCO instances json has the lists "
                "images, annotations and categories"
            )
    sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in content["images"]}
    categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    usable = []
    for a in content["annotations"]:
        for key, known in (("image_id", sizes), ("category_id", categories)):
            if a[key] not in known:
                raise ValueError(
                    f"{source}: annotation {a.get('id')} has {key} {a[key]}, which is "
                    "not in the file; remove the annotation or add the entry"
                )
        mask = to_rle(a.get("segmentation"), sizes[a["image_id"]])
        if mask is None:
            continue
        usable.append(
            {
                "id": len(usable) + 1,
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "segmentation": mask,
                "area": float(a["area"]) if "area" in a else float(rle.area(mask)),
                "bbox": a["bbox"] if a.get("bbox") else rle.toBbox(mask).tolist(),
                "iscrowd": int(a.get("iscrowd", 0)),
            }
        )
    images = {int(i["id"]): i for i in content["images"]}
    missing = len(content["annotations"]) - len(usable)
    return Truth(source, images, categories, usable, missing)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such annotation file") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read as json ({error}); a COCO instances json is wanted"
        ) from None


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Returns polygons, RLE or uncompressed RLE as RLE; None without a usable one."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return rle.frPyObjects(segmentation, *size)
        return segmentation
    polygons = [p for p in segmentation or () if len(p) >= 6 and len(p) % 2 == 0]
    return rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None


def index(truth: Truth, annotations: Sequence[dict[str, Any]]) -> COCO:
    """Returns pycocotools' index of annotations of these images; it prints."""
    coco: Any = COCO()
    coco.dataset = {
        "images": list(truth.images.values()),
        "categories": [{"id": i, "name": n} for i, n in truth.categories.items()],
        "annotations": list(annotations),
    }
    coco.createIndex()
    return coco
