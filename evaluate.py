"""Evaluates a training run on its validation data: COCO mask and box AP.

    python evaluate.py --workdir runs/r50
    python evaluate.py --workdir runs/r50 --checkpoint best \
        --config.data.val.images=other/images \
        --config.data.val.annotations=other/instances.json

Writes `eval/metrics.json` and `eval/predictions.json` (COCO's results format) into the
workdir. Exit code 0: done; 2: an error that the one line `error: ...` explains.
"""

import os

from absl import flags

from solov2_jax import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a training run.", required=True
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best or a step.")


def main(overrides: list[str]) -> None:
    """Evaluates as the flags say."""
    from solov2_jax.inference.predictor import Predictor, load_workdir_config

    workdir = _WORKDIR.value
    config = load_workdir_config(workdir, overrides)
    from solov2_jax.data.build import build_eval_batches, load_val_dataset
    from solov2_jax.evaluation.run import evaluate

    predictor = Predictor.from_workdir(workdir, _CHECKPOINT.value, overrides)
    classes = zip(predictor.category_ids, predictor.class_names, strict=True)
    dataset = load_val_dataset(config, dict(classes))
    batches = build_eval_batches(config, dataset)
    folder = os.path.join(workdir, "eval")
    options = config.eval.num_pictures, config.eval.backend
    metrics = evaluate(predictor, dataset, batches, folder, *options)
    for name in ("segm/AP", "segm/AP50", "bbox/AP"):
        print(f"{name} {metrics[name]:.4f}")


if __name__ == "__main__":
    cli.run(main)
