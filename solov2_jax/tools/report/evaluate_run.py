"""The evaluation of a training run, from its folder; with tiles or scales on the files' own
pixels."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from solov2_jax.checkpoint import load_workdir_config
from solov2_jax.data.build import build_eval_batches, load_val_dataset
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_sized
from solov2_jax.evaluation.evaluate import build_evaluator, build_reports, evaluate
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.predictor import Predictor
from solov2_jax.tools.multiview.build import build_views
from solov2_jax.tools.multiview.tiling import PicturePredictor, TileOptions
from solov2_jax.tools.multiview.tta import TtaOptions
from solov2_jax.tools.report.results_file import ExpectedResult, check_names
from solov2_jax.tools.report.thresholds import write_thresholds


def evaluate_run(
    workdir: str | os.PathLike[str],
    checkpoint: str = "last",
    overrides: Sequence[str] = (),
    *,
    tta: TtaOptions | None = None,
    tiles: TileOptions | None = None,
    output: str | os.PathLike[str] = "",
    report: bool = False,
    expectations: Sequence[ExpectedResult] = (),
) -> dict[str, float]:
    """Returns COCO's metrics of a training run on its validation data.

    Writes what `evaluation.evaluate.evaluate` and the reports of the config do, and the
    thresholds of the checkpoint where it is evaluated as in training.

    Args:
      checkpoint: "last", "best" or a step.
      overrides: of the run's config, such as "--config.eval.max_images=100".
      tta, tiles: several views of each image; None: a single one.
      output: folder for what is written; "": `eval` in the workdir.
      report: write a page with curves, errors and the worst images, too.
      expectations: their names are checked before anything is predicted.
    """
    config = load_workdir_config(workdir, overrides)
    predictor = Predictor.from_workdir(workdir, checkpoint, overrides)
    predictor.limit_score = 2.0  # tells of too many candidates; detections are counted below
    classes = zip(predictor.category_ids, predictor.class_names, strict=True)
    dataset = load_val_dataset(config, dict(classes))
    evaluator = build_evaluator(config, dataset)
    check_names(expectations, evaluator.metric_names())
    reports = build_reports(config)
    if report:
        from solov2_jax.tools.report.outcomes import require_hotcoco
        from solov2_jax.tools.report.page import report_writer

        require_hotcoco()
        run = os.path.basename(os.path.abspath(workdir))
        reports.append(report_writer(f"{run}, checkpoint {checkpoint}"))
    if predictor.step is not None and not checkpoint.endswith(":raw"):
        if is_own_validation(overrides) and not (tta or tiles or output):
            at = Path(workdir).absolute(), predictor.step
            reports.append(lambda done: write_thresholds(replace(done, checkpoint=at)))
    # Of several processes, each predicts a part of the images.
    shard = (jax.process_index(), jax.process_count())
    batches = build_eval_batches(config, dataset, shard)
    if tta or tiles:
        views = build_views(predictor, tta, tiles, batches.buckets)
        predictor = FullResolutionPredictor(views, config.eval.batch_size)
        batches = FullResolutionBatches(dataset, config.eval.max_images, shard)
    return evaluate(
        predictor,
        evaluator,
        dataset,
        batches,
        output or os.path.join(workdir, "eval"),
        num_pictures=config.eval.num_pictures,
        max_per_image=0 if tta or tiles else config.test.max_per_image,
        reports=reports,
    )


def is_own_validation(overrides: Sequence[str]) -> bool:
    """Returns whether a run is evaluated as in its training: no other data, limits or sizes."""
    others = ("data.", "input.", "test.", "eval.max_images", "eval.max_detections")
    return not any(o.removeprefix("--config.").startswith(others) for o in overrides)


class FullResolutionBatches:
    """Batches of one image each: image [1, H, W, C], as a predictor takes it, and
    image_id [1].

    Tiles and scales are made of the original image, so its size must not be lost before.

    Args:
      max_images: only the first ones; 0 for all.
      shard: (i, n) gives every n-th of them from the i-th on.
    """

    def __init__(self, dataset: CocoDataset, max_images: int = 0, shard: tuple[int, int] = (0, 1)):
        self._dataset = dataset
        number = min(max_images or len(dataset), len(dataset))
        self._chosen = range(shard[0], number, shard[1])

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        data = self._dataset
        for i in self._chosen:
            size = int(data.heights[i]), int(data.widths[i])
            file = data.annotation_file
            image = read_sized(data.path(i), *size, file, pixels=data.pixels)
            ids = np.array([data.image_ids[i]], np.int64)
            yield {"image": image[None], "image_id": ids}


class FullResolutionPredictor:
    """Predicts batches of `FullResolutionBatches`.

    Args:
      batch_size: views of an image that are computed together.
    """

    def __init__(self, predictor: PicturePredictor, batch_size: int = 1):
        self._predictor, self._batch_size = predictor, batch_size

    def predict_batch(self, batch: Mapping[str, np.ndarray]) -> list[Prediction]:
        """Returns a prediction for each image of the batch."""
        predictions = self._predictor.predict_images(batch["image"], self._batch_size)
        ids = batch["image_id"].tolist()
        return [replace(p, image_id=i) for p, i in zip(predictions, ids, strict=True)]
