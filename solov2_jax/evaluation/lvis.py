"""LVIS's average precision: federated, and by how often a class was trained on.

No image was searched for all classes. Detections of a class that an image neither shows
nor lists as negative are left out; those without an object, of a class that is not
annotated exhaustively in an image, are neither right nor wrong. Each image's 300 best
detections count, of all classes together.
Source: lvis-api, lvis/eval.py and lvis/results.py; Gupta et al. 2019, LVIS.
"""

import contextlib
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import coco as pycocotools_coco
from pycocotools import cocoeval

from solov2_jax.data.federated import Federated
from solov2_jax.evaluation.coco import CocoEvaluator, is_defined
from solov2_jax.evaluation.coco_score import (
    AREAS,
    GroundTruth,
    Kind,
    defined_mean,
    load,
    load_hotcoco,
    own_areas,
    size_metrics,
    to_indexed,
)
from solov2_jax.io import InputError

LVIS_LIMIT = 300  # detections per image
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
Results = Sequence[dict[str, Any]]


class LvisEvaluator(CocoEvaluator):
    """Collects predictions image by image, then computes LVIS's metrics.

    Its metrics are AP, AP50, AP75, APs, APm, APl, of rare, common and frequent classes APr,
    APc and APf, and AR@300, ARs@300, ARm@300, ARl@300. With `max_detections` above 300, all
    of them are added with that limit.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.max_detections = max(self.max_detections, LVIS_LIMIT)
        if self.truth.federated is None:
            raise InputError(
                f"{self.source}: is no LVIS json: no image has `neg_category_ids` or "
                '`not_exhaustive_category_ids`, which data.val.metric = "lvis" needs; set it to '
                '"coco", or give the json of LVIS.'
            )
        self.federated: Federated = self.truth.federated

    def groups(self) -> list[tuple[str, ...]]:
        """Returns the metrics that there are of each of `kinds`, a row of a table each."""
        precision = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
        groups = []
        for limit in self._limits():
            ap = precision if limit == LVIS_LIMIT else [f"{name}@{limit}" for name in precision]
            groups += [tuple(ap), tuple(f"{name}@{limit}" for name in ("AR", "ARs", "ARm", "ARl"))]
            sizes = itertools.chain(*size_metrics(self.size_ranges))
            groups += [tuple(sizes)] if self.size_ranges and limit == LVIS_LIMIT else []
        return groups

    def _limits(self) -> list[int]:
        return sorted({LVIS_LIMIT, self.max_detections})

    def compute(self) -> dict[str, float]:
        """Returns the metrics in any order."""
        frequencies = [self.federated.frequency[i] for i in sorted(self.category_ids)]
        metrics: dict[str, float] = {}
        for kind in self.kinds:
            values: list[float] = []
            for limit in self._limits():
                precision, recall = self._arrays(kind, limit, AREAS)
                values += _summarize(precision, recall, frequencies)
                if limit > LVIS_LIMIT:
                    continue
                if kind == "segm":
                    every_size = np.moveaxis(precision[..., 0], 2, 0)
                    metrics |= self.of_classes("segm/AP", [defined_mean(p) for p in every_size])
                if self.size_ranges:
                    # By themselves: hotcoco confuses a range with an equal one.
                    areas = [AREAS[0], *own_areas(self.size_ranges)]
                    arrays = self._arrays(kind, limit, areas)
                    for n in range(1, len(areas)):
                        values += [defined_mean(array[..., n]) for array in arrays]
            names = [f"{kind}/{name}" for name in itertools.chain(*self.groups())]
            metrics |= dict(zip(names, values, strict=True))
        return metrics

    def _arrays(
        self, kind: Kind, limit: int, areas: Sequence[tuple[float, float]]
    ) -> tuple[np.ndarray, np.ndarray]:
        return lvis_arrays(
            self.truth,
            best_of_images(self.results, limit),
            kind,
            image_ids=self.image_ids,
            category_ids=self.category_ids,
            limit=limit,
            areas=areas,
            backend=self._backend,
        )

    def counted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns the annotations and the results of classes that their image was searched for."""
        annotations, results = super().counted()
        shown = {(a["image_id"], a["category_id"]) for a in annotations}
        negative = self.federated.negative
        return annotations, [
            result
            for result in best_of_images(results, self.max_detections)
            if result["category_id"] in negative[result["image_id"]]
            or (result["image_id"], result["category_id"]) in shown
        ]

    def unjudged(self, results: Results) -> np.ndarray:
        """Returns which results are of a class that is not annotated exhaustively, bool [N]."""
        listed = self.federated.not_exhaustive
        return np.array([r["category_id"] in listed[r["image_id"]] for r in results], bool)

    def notes(self, metrics: Any) -> list[str]:
        """Returns a line for each reason why a metric is undefined or limited."""
        objects = {a["category_id"] for a in self.counted()[0]}
        lines = [
            f"AP{letter} is undefined: no object of a {word} class is annotated"
            for letter, word in FREQUENCIES.items()
            if not any(self.federated.frequency[i] == letter for i in objects)
        ]
        if not any(self.federated.frequency.values()):
            lines = [
                "APr, APc and APf are undefined: the json's categories have no `frequency`; take "
                "it from LVIS's own json"
            ]
        return [*super().notes(metrics), *(lines if is_defined(metrics["segm/AP"]) else [])]


def best_of_images(results: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Returns each image's results with the best scores, of all classes together."""
    of_image: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        of_image.setdefault(result["image_id"], []).append(result)
    for image, group in of_image.items():
        if len(group) > limit:
            of_image[image] = sorted(group, key=lambda r: r["score"], reverse=True)[:limit]
    return list(itertools.chain(*of_image.values()))


def lvis_arrays(
    truth: GroundTruth,
    results: Results,
    kind: Kind,
    *,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    limit: int = LVIS_LIMIT,
    areas: Sequence[tuple[float, float]] = AREAS,
    backend: str = "fast",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns precision float64 [T, R, K, A] and recall [T, K, A], as `Score` has them.

    Args:
      results: at most `limit` of each image.
      backend: "fast", hotcoco, or "pycocotools", whose matching is told what LVIS ignores.
    """
    federated = truth.federated
    assert federated is not None
    dataset, detections = to_indexed(truth, results, kind, image_ids, category_ids)
    place = {category: n for n, category in enumerate(sorted(category_ids), start=1)}

    def places(ids: Iterable[int]) -> list[int]:
        return sorted(place[i] for i in ids if i in place)

    for record, image in zip(dataset["images"], sorted(image_ids), strict=True):
        record["neg_category_ids"] = places(federated.negative[image])
        record["not_exhaustive_category_ids"] = places(federated.not_exhaustive[image])
    for record in dataset["categories"]:
        record["frequency"] = "f"  # the means by frequency are taken here
    for record in dataset["annotations"]:
        record["iscrowd"] = 0  # LVIS has no crowds
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _matched(dataset, detections, kind, limit, areas, backend)
        evaluation.evaluate()
        evaluation.accumulate()
    arrays = evaluation.eval
    return np.asarray(arrays["precision"])[..., -1], np.asarray(arrays["recall"])[..., -1]


def _matched(
    dataset: dict[str, Any],
    detections: list[dict[str, Any]],
    kind: Kind,
    limit: int,
    areas: Sequence[tuple[float, float]],
    backend: str,
) -> Any:
    """Returns the evaluation of either library, not yet computed."""
    shape = "bbox" if kind == "bbox" else "segm"
    if library := (backend == "fast" and load_hotcoco()):
        truth, loaded = load(library[0], dataset, detections)
        evaluation = library[1](truth, loaded, shape, lvis_style=True)
    else:
        shown = {(a["image_id"], a["category_id"]) for a in dataset["annotations"]}
        judged = {
            (image["id"], category)
            for image in dataset["images"]
            for category in image["neg_category_ids"]
        } | shown
        detections = [d for d in detections if (d["image_id"], d["category_id"]) in judged]
        truth, loaded = load(pycocotools_coco.COCO, dataset, detections)
        evaluation = FederatedEval(truth, loaded, shape)
    evaluation.params.imgIds = [image["id"] for image in dataset["images"]]
    evaluation.params.catIds = [category["id"] for category in dataset["categories"]]
    evaluation.params.maxDets = [limit]
    evaluation.params.areaRng = [[float(low), float(high)] for low, high in areas]
    evaluation.params.areaRngLbl = [str(n) for n in range(len(areas))]
    return evaluation


class FederatedEval(cocoeval.COCOeval):
    """pycocotools' COCOeval, but for detections that no object answers to.

    Where their class is not annotated exhaustively, they are ignored.
    """

    def evaluateImg(  # noqa: N802
        self,
        imgId: Any,
        catId: Any,
        aRng: Any,
        maxDet: Any,  # noqa: N803
    ) -> Any:
        """Returns what became of an image's detections of a class; None if there is nothing."""
        match = super().evaluateImg(imgId, catId, aRng, maxDet)
        image: Any = self.cocoGt.imgs[imgId]
        if match and catId in image["not_exhaustive_category_ids"]:
            match["dtIgnore"] = np.logical_or(match["dtIgnore"], match["dtMatches"] == 0)
        return match


def _summarize(
    precision: np.ndarray, recall: np.ndarray, frequencies: Sequence[str]
) -> list[float]:
    """Returns the metrics in the order of `groups`; thresholds 0 and 5 are IoU 0.5 and 0.75."""
    ap = precision[..., 0]
    values = [defined_mean(ap), defined_mean(ap[0]), defined_mean(ap[5])]
    values += [defined_mean(precision[..., size]) for size in (1, 2, 3)]
    for letter in FREQUENCIES:
        values.append(defined_mean(ap[..., [f == letter for f in frequencies]]))
    values += [defined_mean(recall[..., size]) for size in range(4)]
    return values
