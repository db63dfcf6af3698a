"""Ground truth and predictions -> COCO's metrics, by hotcoco or by pycocotools.

pycocotools defines the numbers; hotcoco computes the same arrays bit for bit, in about a
twentieth of the time. Source: pycocotools cocoeval.py, COCOeval.
"""

import contextlib
import functools
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import coco as pycocotools_coco
from pycocotools import cocoeval as pycocotools_eval
from pycocotools import mask

from solov2_jax.data.annotations import AnnotationTable, read_instances
from solov2_jax.data.coco import find_files
from solov2_jax.io import reason

Kind = Literal["segm", "bbox"]
# In the order of pycocotools' summary.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
BACKENDS = ("fast", "pycocotools")
COCO_LIMIT = 100  # detections per image and class that COCO's AP counts at most

log = logging.getLogger(__name__)
coco_mask: Any = mask  # its type stubs are narrower than what it takes


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
    is_read = isinstance(annotations, AnnotationTable)
    table = annotations if is_read else read_instances(annotations)
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
        rle = table.segmentations.rle(row, table.size(image))
        box, area = table.boxes[row], float(table.areas[row])
        usable.append(
            {
                "id": len(usable) + 1,
                "image_id": table.image_ids[image],
                "category_id": category_ids[table.label[row]],
                "segmentation": rle,
                "area": float(coco_mask.area(rle)) if np.isnan(area) else area,
                "bbox": (coco_mask.toBbox(rle) if np.isnan(box[0]) else box).tolist(),
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


@dataclass(frozen=True)
class Score:
    """Shapes: T IoU thresholds, R recalls, K classes, A size ranges, M detection limits."""

    metrics: dict[str, float]  # by the names in METRICS and `extra_metrics`; NaN: undefined
    precision: np.ndarray  # float64 [T, R, K, A, M], -1 where nothing is annotated
    recall: np.ndarray  # float64 [T, K, A, M]

    def class_ap(self) -> list[float]:
        """Returns AP of each class over all sizes, with COCO's limit; NaN: undefined."""
        return [_mean(self.precision[:, :, k, 0, 2]) for k in range(self.precision.shape[2])]


def compute_score(
    truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_detections: int = COCO_LIMIT,
    backend: str = "fast",
) -> Score:
    """Returns COCO's metrics over these images and categories.

    Args:
      results: in COCO's format; those of other images and categories are left out.
      kind: "segm" compares masks, "bbox" boxes.
      max_detections: per image and class; above COCO's 100 the metrics with both limits
        are computed.
    """
    # Places instead of ids, in the ids' order: a file's ids may be numbers of any size.
    images = {image: n for n, image in enumerate(sorted(image_ids), start=1)}
    labels = {category: n for n, category in enumerate(sorted(category_ids), start=1)}

    def known(record: Mapping[str, Any]) -> bool:
        return record["image_id"] in images and record["category_id"] in labels

    def places(record: Mapping[str, Any]) -> dict[str, int]:
        image, label = images[record["image_id"]], labels[record["category_id"]]
        return {"image_id": image, "category_id": label}

    # With a box beside the mask, a detection's area would be the box's, and the size
    # ranges of mask AP would no longer be those of masks.
    shape = "segmentation" if kind == "segm" else "bbox"
    sizes = {i: {k: int(truth.images[i][k]) for k in ("height", "width")} for i in images}
    dataset = {
        "images": [{"id": n, **sizes[i]} for i, n in images.items()],
        "categories": [{"id": n, "name": str(n)} for n in labels.values()],
        "annotations": [{**a, **places(a)} for a in truth.annotations if known(a)],
    }
    detections = [{**places(r), "score": r["score"], shape: r[shape]} for r in results if known(r)]
    library = (backend == "fast" and load_hotcoco()) or _PYCOCOTOOLS
    limits = [1, 10, COCO_LIMIT]
    limits += [max_detections] if max_detections > COCO_LIMIT else []
    with contextlib.redirect_stdout(io.StringIO()):
        precision, recall = _evaluate(library, dataset, detections, kind, limits)
    return Score(_summarize(precision, recall, limits[-1]), precision, recall)


_PYCOCOTOOLS = (pycocotools_coco.COCO, pycocotools_eval.COCOeval)


@functools.cache
def load_hotcoco() -> tuple[Any, Any] | None:
    """Returns hotcoco's (COCO, COCOeval); None, with a line in the log, without it."""
    try:
        import hotcoco
    except ImportError as error:
        log.warning(
            "eval.backend = 'fast' needs the package hotcoco, which cannot be imported (%s): "
            "pycocotools computes the same AP, about twenty times slower",
            reason(error),
        )
        return None
    return hotcoco.COCO, hotcoco.COCOeval


def _evaluate(
    library: tuple[Any, Any],
    dataset: dict[str, Any],
    detections: list[dict[str, Any]],
    kind: Kind,
    limits: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arrays of `Score`; both libraries have the same interface."""
    coco, coco_eval = library

    def index(content: dict[str, Any]) -> Any:
        indexed = coco()
        indexed.dataset = content
        indexed.createIndex()
        return indexed

    truth = index(dataset)
    loaded = truth.loadRes(detections) if detections else index({**dataset, "annotations": []})
    evaluation = coco_eval(truth, loaded, kind)
    evaluation.params.imgIds = [image["id"] for image in dataset["images"]]
    evaluation.params.catIds = [category["id"] for category in dataset["categories"]]
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    arrays = evaluation.eval
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"])


def extra_metrics(max_detections: int) -> tuple[str, ...]:
    """Returns the names of the metrics with a limit beyond COCO's, such as AP@300."""
    names = (*METRICS[:6], "AR", *METRICS[9:])
    return tuple(f"{n}@{max_detections}" for n in names) if max_detections > COCO_LIMIT else ()


def _summarize(precision: np.ndarray, recall: np.ndarray, limit: int) -> dict[str, float]:
    """Returns the means that COCO reports, and those with a limit beyond COCO's."""

    def at_limit(m: int) -> list[float]:
        """Returns AP and AR of each size; thresholds 0 and 5 are IoU 0.5 and 0.75."""
        p, r = precision[..., m], recall[..., m]
        ap = [_mean(p[..., 0]), _mean(p[0, ..., 0]), _mean(p[5, ..., 0])]
        ap += [_mean(p[..., size]) for size in (1, 2, 3)]
        return ap + [_mean(r[..., size]) for size in range(4)]

    values = at_limit(2)
    values[6:6] = [_mean(recall[..., 0, m]) for m in (0, 1)]  # AR1, AR10
    metrics = dict(zip(METRICS, values, strict=True))
    if extra := extra_metrics(limit):
        metrics |= dict(zip(extra, at_limit(3), strict=True))
    return metrics


def _mean(values: np.ndarray) -> float:
    """Returns the mean of what is defined, as pycocotools sums it; NaN without any."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else math.nan
