"""The evaluation of a training run, from its folder."""

import os
from collections.abc import Sequence

import jax

from solov2_jax.checkpoint import load_workdir_config
from solov2_jax.data.build import build_eval_batches, load_val_dataset
from solov2_jax.evaluation.evaluate import build_evaluator, build_reports, evaluate
from solov2_jax.inference.predictor import Predictor
from solov2_jax.tools.multiview.build import build_views
from solov2_jax.tools.multiview.tiling import TileOptions
from solov2_jax.tools.multiview.tta import TtaOptions
from solov2_jax.tools.report.expected_results import ExpectedResult, check_names
from solov2_jax.tools.report.full_resolution import FullResolutionBatches, FullResolutionPredictor


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

    Writes what `evaluation.evaluate.evaluate` and the reports of the config do.

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
