"""The evaluation of a training run, from its folder; with tiles or scales on the files' own
pixels."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from solov2_jax import distributed
from solov2_jax.data.build import (
    FurtherVal,
    build_eval_batches,
    load_further_vals,
    load_val_dataset,
)
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.images import read_sized
from solov2_jax.evaluation.evaluate import Report, build_evaluator, build_reports, evaluate
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.predictor import Predictor
from solov2_jax.io import unmade_if_empty
from solov2_jax.pretrained import check_data_known, load_run_config, local_folder
from solov2_jax.tools.importers.eval_data import EvalRequest, read_eval_data
from solov2_jax.tools.multiview.build import build_views
from solov2_jax.tools.multiview.tiling import InputPredictor, PicturePredictor, TileOptions
from solov2_jax.tools.multiview.tta import TtaOptions
from solov2_jax.tools.report.results_file import ExpectedResult, check_names
from solov2_jax.tools.report.thresholds import write_thresholds
from solov2_jax.weights.hub import is_remote

log = logging.getLogger(__name__)


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
    data: EvalRequest | None = None,
    metric: str = "",
) -> dict[str, float]:
    """Returns the metrics of a training run on its validation data, or on other data.

    Writes what `evaluation.evaluate.evaluate` and the reports of the config do, and the
    thresholds of the checkpoint where it is evaluated as in training.

    Args:
      workdir: the run's folder, or hf:USER/REPO.
      checkpoint: "last", "best" or a step.
      overrides: of the run's config, such as "--config.eval.max_images=100".
      tta, tiles: several views of each image; None: a single one.
      output: folder for what is written; "": `eval` in the workdir, `eval_NAME` for other
        data; of a repository, none.
      report: write a page with curves, errors and the worst images, too.
      expectations: their names are checked before anything is predicted.
      data: None: the run's.
      metric: see `evaluate_predictor`.
    """
    folder, config = local_folder(workdir), load_run_config(workdir, overrides)
    own = is_own_validation(overrides)
    if data is None:
        check_data_known(workdir, overrides, "--data FOLDER")
    predictor = Predictor.from_workdir(workdir, checkpoint, overrides)
    reports: list[Report] = []
    if predictor.step is not None and not checkpoint.endswith(":raw"):
        if own and not (tta or tiles or output or data or metric):
            at = folder.absolute(), predictor.step
            reports.append(lambda done: write_thresholds(replace(done, checkpoint=at)))
    if not output and not is_remote(os.fspath(workdir)):
        output = folder / (f"eval_{data.name}" if data else "eval")
    name = os.path.basename(os.path.abspath(workdir))
    return evaluate_predictor(
        predictor,
        config,
        tta=tta,
        tiles=tiles,
        output=output,
        title=f"{name}, checkpoint {checkpoint}" if report else "",
        expectations=expectations,
        data=data,
        metric=metric,
        reports=reports,
    )


def evaluate_predictor(
    predictor: Predictor | InputPredictor,
    config: Any,
    *,
    tta: TtaOptions | None = None,
    tiles: TileOptions | None = None,
    output: str | os.PathLike[str] = "",
    title: str = "",
    expectations: Sequence[ExpectedResult] = (),
    data: EvalRequest | None = None,
    metric: str = "",
    reports: Sequence[Report] = (),
) -> dict[str, float]:
    """Returns the metrics of a predictor of any kind, those of `data.vals` by their names.

    Args:
      predictor: one that is no `Predictor` gets each image in its own size.
      config: says which data, how many images and which reports.
      tta, tiles: of a `Predictor`.
      output: folder for what is written; "": nothing is.
      title: of the page with curves and errors; "": no page.
      data: None: the config's validation data.
      metric: instead of data.val.metric; "": that, or with `data` what its files are made for.
      reports: besides those of the config.
    """
    names, ids = predictor.class_names, predictor.category_ids
    if data is None:
        dataset = load_val_dataset(config, dict(zip(ids, names, strict=True)))
    else:
        dataset = replace(read_eval_data(data, names, ids), pixels=predictor.input.pixels)
    further = load_further_vals(config, dict(zip(ids, names, strict=True))) if data is None else []
    metric = metric or ("auto" if data else config.data.val.metric)
    sets = [FurtherVal("", dataset, metric), *further]
    evaluators = [build_evaluator(config, s.dataset, s.metric) for s in sets]
    if all(evaluator.names_known for evaluator in evaluators):
        each = zip(sets, evaluators, strict=True)
        check_names(expectations, [_prefix(s) + name for s, e in each for name in e.metric_names()])
    if isinstance(predictor, Predictor):
        predictor = predictor.on_devices(jax.local_devices())
        predictor.limit_score = 2.0  # tells of too many candidates; detections are counted
    metrics: dict[str, float] = {}
    with unmade_if_empty(output) if output else contextlib.nullcontext():
        for part, evaluator in zip(sets, evaluators, strict=True):
            if part.name:
                log.info("evaluating on %s", part.dataset.annotation_file)
            batches, source = _batches(predictor, config, part.dataset, tta, tiles)
            shown = f"{title}, {part.name}" if title and part.name else title
            own = reports if not part.name else []
            values = evaluate(
                source,
                evaluator,
                part.dataset,
                batches,
                os.path.join(output, part.name) if output and part.name else output,
                num_pictures=config.eval.num_pictures if output else 0,
                max_per_image=config.test.max_per_image if source is predictor else 0,
                reports=[*build_reports(config), *own, *_page(shown)] if output else [],
            )
            metrics |= {_prefix(part) + name: value for name, value in values.items()}
    return metrics


def _prefix(part: FurtherVal) -> str:
    return f"{part.name}/" if part.name else ""


def _batches(
    predictor: Predictor | InputPredictor,
    config: Any,
    dataset: CocoDataset,
    tta: TtaOptions | None,
    tiles: TileOptions | None,
) -> tuple[Any, Any]:
    """Returns (this process's batches of a data set, what predicts them)."""
    # Of several processes, each predicts a part of the images.
    shard = (jax.process_index(), jax.process_count())
    batches = FullResolutionBatches(dataset, config.eval.max_images, shard)
    if not isinstance(predictor, Predictor):
        return batches, FullResolutionPredictor(predictor)
    devices = distributed.devices_per_process()
    whole = build_eval_batches(config, dataset, shard, devices)
    if not (tta or tiles):
        return whole, predictor
    views = build_views(predictor, tta, tiles, whole.buckets)
    return batches, FullResolutionPredictor(views, config.eval.batch_size * devices)


def _page(title: str) -> list[Report]:
    """Returns what writes the page of an evaluation, [] without a title."""
    if not title:
        return []
    from solov2_jax.tools.report.outcomes import require_hotcoco
    from solov2_jax.tools.report.page import report_writer

    require_hotcoco()
    return [report_writer(title)]


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
