"""What scores the predictions of a data set: one protocol, chosen by `data.val.metric`.

    metric        wants                        AP is
    "coco"        an instances json            COCO's
    "boundary"    an instances json            COCO's, and that of masks' borders
    "lvis"        LVIS v1's json               federated, with rare, common, frequent
    "cityscapes"  the folder gtFine/val        Cityscapes', with void and groups ignored
                  or a json made from it
    "voc"         an instances json            VOC's AP^r at IoU 0.5 and 0.7
    "keypoints"   a person_keypoints json      COCO's, and OKS AP of key points
    "module:Class"  what it takes              COCO's, and what the class returns
    "auto"        any of these                 "lvis" or "cityscapes" by the files, else "coco"

Source: detectron2 evaluation/evaluator.py, DatasetEvaluator, and tools/train_net.py,
build_evaluator, which choose by the data set's name.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from solov2_jax.data.annotations import AnnotationTable
from solov2_jax.evaluation.boundary import BoundaryEvaluator
from solov2_jax.evaluation.cityscapes import CityscapesEvaluator
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import COCO_LIMIT, GroundTruth, read_ground_truth
from solov2_jax.evaluation.keypoints import KeypointEvaluator
from solov2_jax.evaluation.lvis import LvisEvaluator
from solov2_jax.evaluation.voc import VocEvaluator
from solov2_jax.inference.prediction import Prediction
from solov2_jax.io import InputError
from solov2_jax.rle import crop_of
from solov2_jax.user_code import check_call, failure, import_object

AUTO = "auto"
EVALUATORS: dict[str, type[CocoEvaluator]] = {
    "coco": CocoEvaluator,
    "lvis": LvisEvaluator,
    "cityscapes": CityscapesEvaluator,
    "voc": VocEvaluator,
    "boundary": BoundaryEvaluator,
    "keypoints": KeypointEvaluator,
}

log = logging.getLogger(__name__)


@runtime_checkable
class Evaluator(Protocol):
    """What scores predictions, image by image.

    A class of one's own is made with (ground truth, category ids, class names), see
    `coco_score.GroundTruth`; the i-th label is the i-th of the ids. It may have
    `metric_names() -> list[str]` too: `train.best_metric` and `--expect` are then checked
    before anything is predicted.
    """

    def reset(self) -> None:
        """Forgets every prediction."""

    def process(self, prediction: Prediction) -> None:
        """Takes one image's predictions; `image_id` is the file's own id."""

    def evaluate(self) -> Mapping[str, float]:
        """Returns the metrics by name; NaN where one is undefined."""
        ...


class OwnEvaluator(CocoEvaluator):
    """Computes COCO's metrics and those of an `Evaluator` that a user wrote.

    It gets every image of all processes, in the order of their ids, once all are
    predicted, so it need not know of processes and files.

    Args:
      own: what makes it; its arguments are those of `Evaluator`.
      key: of the config that names it, for messages.
    """

    def __init__(self, own: Any, key: str, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._key = key
        try:
            self._own = own(self.truth, self.category_ids, self.class_names)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{key}: cannot be made of (ground truth, category ids, class names): "
                f"{failure(error)}; see solov2_jax.evaluation.evaluators.Evaluator"
            ) from error
        for name, arguments in (("reset", ()), ("process", ("prediction",)), ("evaluate", ())):
            if getattr(type(self._own), name, None) in (None, getattr(Evaluator, name)):
                raise InputError(
                    f"{key}: has no method {name}; see solov2_jax.evaluation.evaluators.Evaluator"
                )
            check_call(getattr(self._own, name), arguments, f"{key}: {name}")

    @property
    def names_known(self) -> bool:
        """Whether `metric_names` has them all."""
        return hasattr(self._own, "metric_names")

    def metric_names(self) -> list[str]:
        """Returns the keys of what `evaluate` returns, as far as they are known."""
        own = self._own.metric_names() if self.names_known else []
        return [*super().metric_names(), *own]

    def evaluate(self) -> dict[str, float]:
        """Returns COCO's metrics and the user's."""
        metrics = self.compute()
        metrics = {name: metrics[name] for name in CocoEvaluator.metric_names(self)}
        for line in self.table(metrics) + self.notes(metrics):
            log.info("%s", line)
        return metrics | self._own_metrics()

    def _own_metrics(self) -> dict[str, float]:
        of_image: dict[Any, list[dict[str, Any]]] = {image: [] for image in self.image_ids}
        for result in self.results:
            of_image[result["image_id"]].append(result)
        try:
            self._own.reset()
            for image, results in of_image.items():
                self._own.process(self._prediction(image, results))
            metrics = {str(k): float(v) for k, v in self._own.evaluate().items()}
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self._key}: failed ({failure(error)})") from error
        if both := sorted(set(metrics) & set(CocoEvaluator.metric_names(self))):
            raise InputError(f"{self._key}: returns {both[0]!r}, which is COCO's; rename it")
        for name, value in metrics.items():
            log.info("%s %.4f", name, value)
        return metrics

    def _prediction(self, image_id: Any, results: list[dict[str, Any]]) -> Prediction:
        """Returns an image's results as a predictor gave them."""
        record = self.truth.images[image_id]
        results = sorted(results, key=lambda r: -r["score"])
        masks = np.zeros((len(results), record["height"], record["width"]), bool)
        for mask, result in zip(masks, results, strict=True):
            if crop := crop_of(result["segmentation"]):
                h, w = crop.pixels.shape
                mask[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
        boxes = np.array([r["bbox"] for r in results], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        label = {category: n for n, category in enumerate(self.category_ids)}
        return Prediction(
            masks=masks,
            boxes=boxes,
            scores=np.array([r["score"] for r in results], np.float32),
            labels=np.array([label[r["category_id"]] for r in results], np.int64),
            image_id=image_id,
            class_names=self.class_names,
        )


def make_evaluator(
    annotations: str | os.PathLike[str] | dict[str, Any] | AnnotationTable | GroundTruth,
    category_ids: Sequence[int],
    class_names: Sequence[str],
    *,
    metric: str = AUTO,
    key: str = "data.val.metric",
    backend: str = "fast",
    max_detections: int = COCO_LIMIT,
    size_ranges: Sequence[int] = (),
    keypoint_sigmas: Sequence[float] = (),
) -> CocoEvaluator:
    """Returns the evaluator of a metric; logs where the files ask for another one.

    Args:
      metric: see above.
      key: the config's key or the flag that names it, for messages.

    Raises:
      InputError: for files that the metric cannot be computed from, and a metric that does
        not exist.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(annotations)
    fitting = metric_of(truth)
    metric = fitting if metric == AUTO else metric
    options: dict[str, Any] = {
        "backend": backend,
        "max_detections": max_detections,
        "size_ranges": size_ranges,
    }
    if ":" in metric:
        name = f"{key} = {metric!r}"
        own = import_object(metric, key)
        if isinstance(own, type) and issubclass(own, CocoEvaluator):
            return own(truth, category_ids, class_names, **options)
        return OwnEvaluator(own, name, truth, category_ids, class_names, **options)
    if metric not in EVALUATORS:
        raise InputError(
            f"{key} = {metric!r} is no metric; use {AUTO!r}, one of {tuple(EVALUATORS)}, or an "
            'import path such as "mypackage.metrics:MyEvaluator"'
        )
    if fitting != "coco" and metric != fitting:
        log.warning("%s", _disagreement(truth, metric, fitting, key))
    if metric == "keypoints":
        options["sigmas"] = tuple(keypoint_sigmas)
    return EVALUATORS[metric](truth, category_ids, class_names, **options)


def metric_of(truth: GroundTruth) -> str:
    """Returns the metric that the files of a ground truth are made for."""
    if truth.federated is not None:
        return "lvis"
    return "cityscapes" if truth.gt_fine else "coco"


def _disagreement(truth: GroundTruth, metric: str, fitting: str, key: str) -> str:
    """Returns what is wrong with another metric than the one that fits."""
    if fitting == "lvis":
        why = (
            "is an LVIS json, whose images are not searched for all classes: detections of the "
            "other classes will count as false"
        )
    else:
        why = "is Cityscapes' gtFine: detections in void will count as false"
    return f"{truth.source} {why}, and AP be too low; set {key} = {fitting!r} or {AUTO!r}"
