"""Evaluates a training run on its validation data: COCO mask and box AP.

    python evaluate.py --workdir runs/r50
    python evaluate.py --workdir runs/r50 --checkpoint best \
        --config.data.val.images=other/images \
        --config.data.val.annotations=other/instances.json

`--tta=flip,0.8,1,1.25` and `--tile=512` evaluate with several views of each image.

Writes `eval/metrics.json` and `eval/predictions.json` (COCO's results format) into the
workdir. Exit code 0: done; 2: an error that the one line `error: ...` explains.
"""

import os

from absl import flags

from solov2_jax import cli
from solov2_jax.view_flags import view_options

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a training run.", required=True
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best or a step.")


def main(overrides: list[str]) -> None:
    """Evaluates as the flags say."""
    from solov2_jax.inference.predictor import Predictor, load_workdir_config

    workdir = _WORKDIR.value
    tta, tiles = view_options()
    config = load_workdir_config(workdir, overrides)
    from solov2_jax.data.build import build_eval_batches, load_val_dataset
    from solov2_jax.evaluation.originals import OriginalPredictor, Originals
    from solov2_jax.evaluation.run import evaluate
    from solov2_jax.inference.views import build_views

    predictor = Predictor.from_workdir(workdir, _CHECKPOINT.value, overrides)
    classes = zip(predictor.category_ids, predictor.class_names, strict=True)
    dataset = load_val_dataset(config, dict(classes))
    batches = build_eval_batches(config, dataset)
    if tta or tiles:
        looking = build_views(predictor, tta, tiles, batches.buckets)
        predictor = OriginalPredictor(looking, config.eval.batch_size)
        batches = Originals(dataset, config.eval.max_images)
    folder = os.path.join(workdir, "eval")
    pictures = config.eval.num_pictures
    metrics = evaluate(predictor, dataset, batches, folder, pictures)
    for name in ("segm/AP", "segm/AP50", "bbox/AP"):
        print(f"{name} {metrics[name]:.4f}")


if __name__ == "__main__":
    cli.run(main)
