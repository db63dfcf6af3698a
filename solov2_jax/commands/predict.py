r"""Predicts objects in images: overlay pictures and `predictions.json`.

    solov2-predict --workdir runs/r50 --input photos/ --output outputs/
    solov2-predict --config configs/r50_3x.py --weights r50_3x.npz \
        --input 'photos/*.jpg' --output outputs/ --score 0.5

Each image is padded to its own multiple of 32, exactly as the reference does with one
image; every new padded shape compiles once. `--config.input.buckets_test` restricts the
shapes. `--tile 512` cuts large images into overlapping tiles, `--tta flip,0.8,1,1.25`
averages several views. `--score 0` keeps every detection that the network's own
thresholds (`--config.test.*`) let through.

Exit code 0: done; 2: an error that the one line `error: ...` explains, also when only
some of the images could not be read: the others are done then.
"""

from typing import TYPE_CHECKING

from absl import flags

from solov2_jax import cli
from solov2_jax.inference.files import find_images, name_pictures, predict_files
from solov2_jax.view_flags import view_options

if TYPE_CHECKING:
    from solov2_jax.inference.predictor import Predictor

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Of the workdir: last, best or a step."
)
_CONFIG = flags.DEFINE_string("config", "", "Config file, with --weights.")
_WEIGHTS = flags.DEFINE_string("weights", "", "Weights file, with --config.")
_INPUT = flags.DEFINE_string(
    "input", None, "An image, a folder of images, or a quoted pattern.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to; made if need be.", required=True
)
_SCORE = flags.DEFINE_float(
    "score", 0.3, "Least score of a detection.", lower_bound=0, upper_bound=1
)


def load_predictor(overrides: list[str]) -> "Predictor":
    """Returns the predictor that the flags name."""
    from solov2_jax import Predictor  # slow: after the checks

    if _WORKDIR.value:
        return Predictor.from_workdir(_WORKDIR.value, _CHECKPOINT.value, overrides)
    return Predictor.from_weights(_WEIGHTS.value, _CONFIG.value, overrides)


def main(overrides: list[str]) -> None:
    """Predicts as the flags say."""
    given = tuple(bool(f.value) for f in (_WORKDIR, _CONFIG, _WEIGHTS))
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError("give either --workdir, or --config and --weights together")
    paths = find_images(_INPUT.value)
    name_pictures(paths, _OUTPUT.value)  # raises now instead of after a compilation
    tta, tiles = view_options()
    predictor = load_predictor(overrides)
    if tta or tiles:
        from solov2_jax.inference.views import build_views

        predictor = build_views(predictor, tta, tiles)
    problems = predict_files(predictor, paths, _OUTPUT.value, _SCORE.value)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(paths)} images could not be read, the others are "
            f"done: {' | '.join(problems)}"
        )


def run() -> None:
    """Runs the command."""
    cli.run(main)
