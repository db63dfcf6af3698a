"""Cityscapes' average precision of instances, from the pictures of its gtFine folder.

Unlike COCO's: detections that lie in void, in groups or on objects of less than 100 pixels
are ignored by the share of their pixels, AP is the area below the curve of all scores, and
IoU must be above a threshold. Source: cityscapesscripts
evaluation/evalInstanceLevelSemanticLabeling.py (without its distances).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.data.annotations import describe
from solov2_jax.data.cityscapes import CLASSES, FIRST_OBJECT, instance_ids_of, read_instance_ids
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import defined_mean
from solov2_jax.io import InputError
from solov2_jax.progress import track
from solov2_jax.rle import crop_of

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # of IoU
MIN_PIXELS = 100  # of an object that counts
# Pixels of these values are void: classes that are not evaluated, where they are no objects.
VOID = (-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


class CityscapesEvaluator(CocoEvaluator):
    """Collects predictions image by image, then computes Cityscapes' metrics, AP and AP50.

    As many detections count as there are. The annotations are a folder of gtFine, or a json
    that says which one it was made from.
    """

    kinds = ("segm",)
    limited = False
    per_class = ("segm/AP", "segm/AP50")

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        folder = self.truth.gt_fine
        if not folder:
            raise InputError(
                f'{self.source}: data.val.metric = "cityscapes" needs the folder gtFine/val as '
                "data.val.annotations (--annotations): void pixels and groups are in its "
                "*_gtFine_instanceIds.png only."
            )
        records = self.truth.images.values()
        paths = [instance_ids_of(folder, str(record["file_name"])) for record in records]
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise InputError(
                f"{self.source}: was made from {folder}, which lacks {len(missing)} of its "
                f"{len(paths)} pictures of instance ids: {describe(missing)}; restore them, or set "
                'data.val.metric (--metric) to "coco".'
            )
        if unknown := sorted(set(self.category_ids) - set(CLASSES)):
            raise InputError(
                f"{self.source}: category ids {unknown[:5]} are none of Cityscapes' classes "
                f"with objects, {CLASSES}; correct the ids."
            )

    def groups(self) -> list[tuple[str, ...]]:
        """Returns the metrics that there are, a row of a table each."""
        return [("AP", "AP50")]

    def compute(self) -> dict[str, float]:
        """Returns the metrics in any order."""
        categories = sorted(self.category_ids)
        matches: dict[int, list[ImageMatch]] = {category: [] for category in categories}
        for _, of_classes in self._matches(self.counted()[1]):
            for category, match in of_classes.items():
                matches[category].append(match)
        ap = np.array([[class_ap(matches[c], t) for t in THRESHOLDS] for c in categories])
        defined = np.nan_to_num(ap, nan=-1.0)
        metrics = {"segm/AP": defined_mean(defined), "segm/AP50": defined_mean(defined[:, 0])}
        metrics |= self.of_classes("segm/AP", ap.mean(axis=1).tolist())
        return metrics | self.of_classes("segm/AP50", ap[:, 0].tolist())

    def counted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns annotations and results; objects too small to count become crowds."""
        annotations, results = super().counted()
        small = [a["area"] < MIN_PIXELS for a in annotations]
        return [
            {**a, "iscrowd": 1} if s else a for a, s in zip(annotations, small, strict=True)
        ], results

    def unjudged(self, results: Sequence[dict[str, Any]]) -> np.ndarray:
        """Returns which results have no pixel, or most in void, groups and small objects."""
        unjudged = np.ones(len(results), bool)
        for rows, of_classes in self._matches(results):
            for match in of_classes.values():
                unjudged[rows[match.row]] = match.ignored > THRESHOLDS[0]
        return unjudged

    def _matches(
        self, results: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[np.ndarray, dict[int, "ImageMatch"]]]:
        """Yields each image's rows of `results`, and what there is of each class."""
        of_image: dict[Any, list[int]] = {image: [] for image in self.image_ids}
        for row, result in enumerate(results):
            of_image[result["image_id"]].append(row)
        categories = sorted(self.category_ids)
        for image, rows in track(of_image.items(), "comparing with gtFine", unit="images"):
            path = instance_ids_of(self.truth.gt_fine, str(self.truth.images[image]["file_name"]))
            yield np.array(rows, int), match_image(path, [results[r] for r in rows], categories)


@dataclass(frozen=True)
class ImageMatch:
    """Detections and objects of one class in one image; groups are among the objects."""

    row: np.ndarray  # int64 [D], of the results
    score: np.ndarray  # float64 [D]
    pixels: np.ndarray  # int64 [D], of the detections
    void: np.ndarray  # int64 [D], pixels in void
    common: np.ndarray  # int64 [D, G], pixels
    size: np.ndarray  # int64 [G], pixels
    is_group: np.ndarray  # bool [G]

    @property
    def iou(self) -> np.ndarray:
        """Returns the IoU of each detection with each object, float64 [D, G]."""
        return self.common / (self.size + self.pixels[:, None] - self.common)

    @property
    def ignored(self) -> np.ndarray:
        """Returns the share of each detection in void, groups and small objects, float64 [D].

        A small group counts twice, as it does in Cityscapes' own program.
        """
        times = self.is_group.astype(int) + (self.size < MIN_PIXELS)
        return (self.void + self.common @ times) / self.pixels


def match_image(
    path: Path, results: Sequence[dict[str, Any]], categories: Sequence[int]
) -> dict[int, ImageMatch]:
    """Returns what there is of each class in an image.

    Args:
      path: its `_instanceIds.png`.
      results: in COCO's format.
    """
    values, size, place = _distinct(read_instance_ids(path))
    rows = [(n, r, _common(r, place, len(values))) for n, r in enumerate(results)]
    label = np.where(values >= FIRST_OBJECT, values // FIRST_OBJECT, values)
    void = np.isin(values, VOID)
    matches = {}
    for category in categories:
        # A mask without a pixel is no detection.
        own = [row for row in rows if row[1]["category_id"] == category and row[2].any()]
        common = np.array([c for _, _, c in own], np.int64).reshape(-1, len(values))
        objects = label == category
        matches[category] = ImageMatch(
            row=np.array([n for n, _, _ in own], np.int64),
            score=np.array([r["score"] for _, r, _ in own], np.float64),
            pixels=common.sum(axis=1),
            void=common[:, void].sum(axis=1),
            common=common[:, objects],
            size=size[objects],
            is_group=values[objects] < FIRST_OBJECT,
        )
    return matches


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the values of int [H, W], sorted, how often there are, and each pixel's place.

    As `np.unique`, without its sorting; the values have 16 bits.
    """
    least = ids.min()
    counts = np.bincount((ids - least).ravel())
    values = np.flatnonzero(counts)
    places = np.zeros(len(counts), np.int32)
    places[values] = np.arange(len(values))
    return values + least, counts[values], places[ids - least]


def _common(result: dict[str, Any], place: np.ndarray, num_values: int) -> np.ndarray:
    """Returns how many pixels of a mask each value of the ground truth has, int64."""
    if (crop := crop_of(result["segmentation"])) is None:
        return np.zeros(num_values, np.int64)
    h, w = crop.pixels.shape
    part = place[crop.top : crop.top + h, crop.left : crop.left + w]
    return np.bincount(part[crop.pixels.view(bool)], minlength=num_values)


def class_ap(images: Sequence[ImageMatch], threshold: float) -> float:
    """Returns AP of one class at one IoU threshold, NaN without an object."""
    scores: list[float] = []
    right: list[bool] = []
    missed = num_objects = num_detections = 0
    for match in images:
        hits = match.iou > threshold
        counts = ~match.is_group & (match.size >= MIN_PIXELS)
        num_objects += int(counts.sum())
        num_detections += len(match.score)
        for found in hits[:, counts].T:
            # The detection with the best score is right, the others are wrong.
            of_object = sorted(match.score[found].tolist(), reverse=True)
            missed += not of_object
            scores += of_object
            right += [n == 0 for n in range(len(of_object))]
        wrong = ~hits.any(axis=1) & (match.ignored <= threshold)
        scores += match.score[wrong].tolist()
        right += [False] * int(wrong.sum())
    if not num_objects:
        return float("nan")
    return _area(np.array(scores), np.array(right, bool), missed) if scores else 0.0


def _area(scores: np.ndarray, right: np.ndarray, missed: int) -> float:
    """Returns the area below the curve of precision over recall, by the trapezoids' widths.

    Args:
      scores, right: float [N], bool [N], in any order.
      missed: objects without a detection.
    """
    order = np.argsort(scores)
    first = np.unique(scores[order], return_index=True)[1]  # of each score, from the least on
    below = np.append(0, np.cumsum(right[order]))[first]  # right ones with a lower score
    true = right.sum() - below
    precision = np.append(true / (len(scores) - first), 1.0)
    recall = np.append(true / (right.sum() + missed), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:])) / 2
