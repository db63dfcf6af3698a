"""Ground truth and predictions -> COCO's metrics, by hotcoco or by pycocotools.

pycocotools defines the numbers; hotcoco computes the same arrays bit for bit, in about a
twentieth of the time. Source: pycocotools cocoeval.py, COCOeval.
"""

import contextlib
import functools
import io
import itertools
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
from solov2_jax.data.federated import Federated
from solov2_jax.evaluation.boundary_eval import BoundaryEval
from solov2_jax.io import reason

Kind = Literal["segm", "bbox", "boundary"]
# In the order of pycocotools' summary.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
BACKENDS = ("fast", "pycocotools")
COCO_LIMIT = 100  # detections per image and class that COCO's AP counts at most
# COCO's size ranges, areas in pixels of the original image, both ends included; the first
# is every size. The end is pycocotools'.
MOST_PIXELS = 1e10
AREAS = ((0.0, MOST_PIXELS), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, MOST_PIXELS))

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
    federated: Federated | None = None  # of an LVIS json
    gt_fine: str = ""  # of Cityscapes: the folder of gtFine


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
        federated=table.federated,
        gt_fine=table.gt_fine,
    )


@dataclass(frozen=True)
class Score:
    """Shapes: T IoU thresholds, R recalls, K classes, A size ranges, M detection limits."""

    # By the names in METRICS, `extra_metrics` and `size_metrics`; NaN: undefined.
    metrics: dict[str, float]
    precision: np.ndarray  # float64 [T, R, K, A, M], -1 where nothing is annotated
    recall: np.ndarray  # float64 [T, K, A, M]

    def class_ap(self) -> list[float]:
        """Returns AP of each class over all sizes, with COCO's limit; NaN: undefined."""
        return [defined_mean(self.precision[:, :, k, 0, 2]) for k in range(self.precision.shape[2])]


def compute_ap(
    truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_detections: int = COCO_LIMIT,
    size_ranges: Sequence[int] = (),
    backend: str = "fast",
) -> Score:
    """Returns COCO's metrics over these images and categories.

    Args:
      results: in COCO's format; those of other images and categories are left out.
      kind: "segm" compares masks, "bbox" boxes, "boundary" the borders of masks.
      max_detections: per image and class; above COCO's 100 the metrics with both limits
        are computed.
      size_ranges: sides in pixels between further size ranges, see `size_metrics`.
    """
    dataset, detections = to_indexed(truth, results, kind, image_ids, category_ids)
    library = (backend == "fast" and load_hotcoco()) or _PYCOCOTOOLS
    if kind == "boundary":
        library = (_PYCOCOTOOLS[0], BoundaryEval)
    limits = [1, 10, COCO_LIMIT]
    limits += [max_detections] if max_detections > COCO_LIMIT else []
    with contextlib.redirect_stdout(io.StringIO()):
        precision, recall = _evaluate(library, dataset, detections, kind, limits, AREAS)
        metrics = _summarize(precision, recall, limits[-1])
        if size_ranges:
            # By themselves: hotcoco confuses a range with an equal one.
            areas = [AREAS[0], *own_areas(size_ranges)]
            arrays = _evaluate(library, dataset, detections, kind, limits[:3], areas)
            for n, names in enumerate(size_metrics(size_ranges), start=1):
                values = (defined_mean(array[..., n, 2]) for array in arrays)
                metrics |= dict(zip(names, values, strict=True))
    return Score(metrics, precision, recall)


def to_indexed(
    truth: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    kind: Kind,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns an instances json and results of these images and categories.

    Their ids are places in the sorted ids, from 1: a file's may be numbers of any size.
    """
    images = {image: n for n, image in enumerate(sorted(image_ids), start=1)}
    labels = {category: n for n, category in enumerate(sorted(category_ids), start=1)}

    def known(record: Mapping[str, Any]) -> bool:
        return record["image_id"] in images and record["category_id"] in labels

    def places(record: Mapping[str, Any]) -> dict[str, int]:
        image, label = images[record["image_id"]], labels[record["category_id"]]
        return {"image_id": image, "category_id": label}

    # With a box beside the mask, a detection's area would be the box's, and the size
    # ranges of mask AP would no longer be those of masks.
    shape = "bbox" if kind == "bbox" else "segmentation"
    sizes = {i: {k: int(truth.images[i][k]) for k in ("height", "width")} for i in images}
    dataset = {
        "images": [{"id": n, **sizes[i]} for i, n in images.items()],
        "categories": [{"id": n, "name": str(n)} for n in labels.values()],
        "annotations": [{**a, **places(a)} for a in truth.annotations if known(a)],
    }
    detections = [{**places(r), "score": r["score"], shape: r[shape]} for r in results if known(r)]
    return dataset, detections


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
    areas: Sequence[tuple[float, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arrays of `Score`; both libraries have the same interface."""
    coco, coco_eval = library
    truth, loaded = load(coco, dataset, detections)
    evaluation = coco_eval(truth, loaded, "bbox" if kind == "bbox" else "segm")
    evaluation.params.imgIds = [image["id"] for image in dataset["images"]]
    evaluation.params.catIds = [category["id"] for category in dataset["categories"]]
    evaluation.params.maxDets = limits
    if areas is not AREAS:
        evaluation.params.areaRng = [[float(low), float(high)] for low, high in areas]
        evaluation.params.areaRngLbl = [str(n) for n in range(len(areas))]
    evaluation.evaluate()
    evaluation.accumulate()
    arrays = evaluation.eval
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"])


def load(coco: Any, dataset: dict[str, Any], detections: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Returns a library's COCO of the ground truth and of the detections, none or more."""

    def index(content: dict[str, Any]) -> Any:
        indexed = coco()
        indexed.dataset = content
        indexed.createIndex()
        return indexed

    truth = index(dataset)
    if not detections:
        return truth, index({**dataset, "annotations": []})
    return truth, truth.loadRes([dict(d) for d in detections])  # pycocotools adds fields


def own_areas(size_ranges: Sequence[int]) -> list[tuple[float, float]]:
    """Returns the ranges of area that these sides in pixels are between, from 0 on."""
    ends = [0.0, *(float(side) ** 2 for side in size_ranges), MOST_PIXELS]
    return list(itertools.pairwise(ends)) if size_ranges else []


def size_metrics(size_ranges: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the names of AP and AR of each range: AP_0-16, AR_0-16, ..., AP_96-inf."""
    ends = [*map(str, (0, *size_ranges)), "inf"]
    ranges = itertools.pairwise(ends) if size_ranges else ()
    return [(f"AP_{low}-{high}", f"AR_{low}-{high}") for low, high in ranges]


def extra_metrics(max_detections: int) -> tuple[str, ...]:
    """Returns the names of the metrics with a limit beyond COCO's, such as AP@300."""
    names = (*METRICS[:6], "AR", *METRICS[9:])
    return tuple(f"{n}@{max_detections}" for n in names) if max_detections > COCO_LIMIT else ()


def _summarize(precision: np.ndarray, recall: np.ndarray, limit: int) -> dict[str, float]:
    """Returns the means that COCO reports, and those with a limit beyond COCO's."""

    def at_limit(m: int) -> list[float]:
        """Returns AP and AR of each size; thresholds 0 and 5 are IoU 0.5 and 0.75."""
        p, r = precision[..., m], recall[..., m]
        ap = [defined_mean(p[..., 0]), defined_mean(p[0, ..., 0]), defined_mean(p[5, ..., 0])]
        ap += [defined_mean(p[..., size]) for size in (1, 2, 3)]
        return ap + [defined_mean(r[..., size]) for size in range(4)]

    values = at_limit(2)
    values[6:6] = [defined_mean(recall[..., 0, m]) for m in (0, 1)]  # AR1, AR10
    metrics = dict(zip(METRICS, values, strict=True))
    if extra := extra_metrics(limit):
        metrics |= dict(zip(extra, at_limit(3), strict=True))
    return metrics


def defined_mean(values: np.ndarray) -> float:
    """Returns the mean of what is defined, as pycocotools sums it; NaN without any."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else math.nan
