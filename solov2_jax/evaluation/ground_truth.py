"""What is annotated: an instances json, ready to be compared with predictions.

Predictions of any tool in COCO's results format, read and checked."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from solov2_jax.data.annotations import describe
from solov2_jax.evaluation.coco_tables import rle
from solov2_jax.rle import rle_from_string


@dataclass(frozen=True)
class GroundTruth:
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


def read_ground_truth(annotations: str | os.PathLike[str] | dict[str, Any]) -> GroundTruth:
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
    return GroundTruth(source, images, categories, usable, missing)


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


def index(truth: GroundTruth, annotations: Sequence[dict[str, Any]]) -> COCO:
    """Returns pycocotools' index of annotations of these images; it prints."""
    coco: Any = COCO()
    coco.dataset = {
        "images": list(truth.images.values()),
        "categories": [{"id": i, "name": n} for i, n in truth.categories.items()],
        "annotations": list(annotations),
    }
    coco.createIndex()
    return coco


_FORMAT = (
    "COCO's results format is a json list of objects with image_id, category_id, score "
    "and segmentation"
)


def read_results(path: str, truth: GroundTruth) -> list[dict[str, Any]]:
    """Returns the results of a file, masks as RLE, missing boxes taken from masks.

    Raises:
      ValueError: naming the file, the entry and the field, also where ids of images or
        categories are not the annotations'.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of predictions") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as json ({error}); {_FORMAT}") from None
    if not isinstance(content, list):
        kind = "an instances json" if "annotations" in content else "something else"
        raise ValueError(f"{path}: is {kind}, not a list of results; {_FORMAT}")
    for key in ("image_id", "category_id", "score", "segmentation"):
        bad = [n for n, r in enumerate(content) if not isinstance(r, dict) or key not in r]
        if bad:
            raise ValueError(
                f"{path}: {len(bad)} of {len(content)} entries have no `{key}`, the "
                f"first is number {bad[0]} (from 0); {_FORMAT}"
            )
    _check_ids(path, content, truth)
    return [_checked(path, n, r, truth) for n, r in enumerate(content)]


def _check_ids(path: str, content: list[dict[str, Any]], truth: GroundTruth) -> None:
    for key, known, mend in (
        ("image_id", truth.images, "are these predictions of other images?"),
        (
            "category_id",
            truth.categories,
            "write the ids of the annotations' `categories`, not places in a list of classes",
        ),
    ):
        wrong = [r[key] for r in content if not _is_known(r[key], known)]
        if wrong:
            there = sorted(known)
            raise ValueError(
                f"{path}: {len(wrong)} of {len(content)} entries have a `{key}` that "
                f"{truth.source} has not: {describe(wrong)} (there are "
                f"{describe(there)}); {mend}"
            )


def _is_known(value: Any, known: dict[int, Any]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in known


def _checked(path: str, n: int, result: dict[str, Any], truth: GroundTruth) -> dict[str, Any]:
    """Returns one result as the evaluation wants it."""
    record = truth.images[result["image_id"]]
    size = (int(record["height"]), int(record["width"]))
    where = f"{path}: entry {n} (image {result['image_id']})"
    score = result["score"]
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{where}: `score` must be a finite number, not {score!r}")
    mask = _mask(where, result["segmentation"], size)
    box = result.get("bbox")
    if box is None:
        box = np.asarray(rle.toBbox(mask)).tolist()
    elif not _is_box(box):
        raise ValueError(f"{where}: `bbox` must be [x, y, width, height], not {box!r}")
    return {
        "image_id": result["image_id"],
        "category_id": result["category_id"],
        "bbox": [float(v) for v in box],
        "score": float(score),
        "segmentation": mask,
    }


def _mask(where: str, segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Returns RLE that covers exactly the image."""
    if isinstance(segmentation, dict):
        given = segmentation.get("size")
        if given is None or tuple(given) != size:
            raise ValueError(
                f"{where}: `segmentation` has size {given}, the image has "
                f"{list(size)} (height, width); masks must be of the original image"
            )
    try:
        mask = to_rle(segmentation, size)
        runs = rle_from_string(_bytes(mask["counts"])) if mask else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: `segmentation` cannot be read: {error}") from None
    if runs is None:
        raise ValueError(f"{where}: `segmentation` has no polygon of 3 points or more")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(
            f"{where}: `segmentation` has run lengths that do not cover the image's "
            f"{size[0]} x {size[1]} pixels"
        )
    assert mask is not None
    return mask


def _bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else counts


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    )
