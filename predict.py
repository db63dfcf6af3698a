"""Predicts objects in images: overlay pictures and `predictions.json`.

    python predict.py --workdir runs/r50 --input photos/ --output outputs/
    python predict.py --config configs/r50_3x.py --weights r50_3x.npz \
        --input 'photos/*.jpg' --output outputs/ --score 0.5

Each image is padded to its own multiple of 32, exactly as the reference does with one
image; every new padded shape compiles once. `--config.input.buckets_test` restricts the
shapes. `--score 0` keeps every detection that the network's own thresholds
(`--config.test.*`) let through.

Exit code 0: done; 2: an error that the one line `error: ...` explains, also when only
some of the images could not be read: the others are done then.
"""

from absl import flags

from solov2_jax import cli
from solov2_jax.config import load_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Of the workdir: last, best or a step."
)
_CONFIG = flags.DEFINE_string("config", None, "Config file, with --weights.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Weights file, with --config.")
_INPUT = flags.DEFINE_string(
    "input", None, "An image, a folder of images, or a quoted pattern.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to; made if need be.", required=True
)
_SCORE = flags.DEFINE_float(
    "score", 0.3, "Least score of a detection.", lower_bound=0, upper_bound=1
)


def main(overrides: list[str]) -> None:
    """Predicts as the flags say."""
    from solov2_jax.inference.files import find_images, name_pictures, predict_files

    by_workdir, by_file = _WORKDIR.value, (_CONFIG.value, _WEIGHTS.value)
    if bool(by_workdir) == any(by_file) or any(by_file) != all(by_file):
        raise ValueError("give either --workdir, or --config and --weights together")
    paths = find_images(_INPUT.value)
    name_pictures(paths, _OUTPUT.value)  # before the slow part: names that clash
    from solov2_jax.inference.predictor import Predictor

    if by_workdir:
        predictor = Predictor.from_workdir(by_workdir, _CHECKPOINT.value, overrides)
    else:
        config = load_config(_CONFIG.value, overrides)
        predictor = Predictor.from_config(config, _WEIGHTS.value)
    problems = predict_files(predictor, paths, _OUTPUT.value, _SCORE.value)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(paths)} images could not be read, the others are "
            f"done: {' | '.join(problems)}"
        )


if __name__ == "__main__":
    cli.run(main)
