r"""Evaluates a training run on its validation data, or files of predictions.

    solov2-evaluate --workdir runs/r50
    solov2-evaluate --workdir runs/r50 --checkpoint best --report \
        --config.data.val.images=other/images \
        --config.data.val.annotations=other/instances.json
    solov2-evaluate --workdir runs/r50 --expect segm/AP=0.42+-0.02
    solov2-evaluate --annotations instances.json --predictions a.json \
        --against b.json

`--tta=flip,0.8,1,1.25` and `--tile=512` evaluate with several views of each image.

Writes `eval/metrics.json` and `eval/predictions.json` (COCO's results format) into the
workdir, and `eval/report/report.html` with `--report`. Predictions of any tool in that
format are scored with `--predictions`; `--output` names the folder for what is written.
Exit code 0: done; 1: a result is outside of a range that `--expect` gave; 2: an error
that the one line `error: ...` explains.
"""

import sys

from absl import flags

from solov2_jax.tools.cli import app, process_flags
from solov2_jax.tools.cli.view_flags import view_options

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best or a step.")
_REPORT = flags.DEFINE_bool(
    "report", False, "Write a page with curves, errors and the worst images."
)
_EXPECT = flags.DEFINE_multi_string(
    "expect", [], "METRIC=VALUE+-TOLERANCE; exit code 1 outside of it. Repeatable."
)
_PREDICTIONS = flags.DEFINE_string(
    "predictions", "", "Score this file in COCO's results format instead of a run."
)
_AGAINST = flags.DEFINE_string("against", "", "Compare --predictions with this file.")
_ANNOTATIONS = flags.DEFINE_string(
    "annotations", "", "Instances json that --predictions are about."
)
_IMAGES = flags.DEFINE_string(
    "images", "", "Folder of the images, for the report of --predictions."
)
_MAX_DETECTIONS = flags.DEFINE_integer(
    "max_detections",
    0,
    "With --predictions: detections per image and class that AP counts, beyond COCO's 100. "
    "Of a run: --config.eval.max_detections.",
    lower_bound=0,
)
_OUTPUT = flags.DEFINE_string(
    "output", "", "Folder for what is written. Default: WORKDIR/eval; none otherwise."
)


def main(overrides: list[str]) -> None:
    """Evaluates as the flags say."""
    from solov2_jax.evaluation.coco import format_metric
    from solov2_jax.tools.report.expected_results import misses, parse_expectations

    expectations = parse_expectations(_EXPECT.value)
    if _PREDICTIONS.value:
        metrics = score_files(overrides, expectations)
    else:
        metrics = score_run(overrides, expectations)
    for name in ("segm/AP", "segm/AP50", "bbox/AP"):
        print(f"{name} {format_metric(metrics[name])}")
    if lines := misses(expectations, metrics):
        for line in lines:
            print(f"unexpected: {line}", file=sys.stderr)
        sys.exit(1)


def score_run(overrides: list[str], expectations: list) -> dict[str, float]:
    """Returns the metrics of a training run."""
    for flag in (_AGAINST, _ANNOTATIONS, _IMAGES, _MAX_DETECTIONS):
        if flag.value:
            raise ValueError(f"--{flag.name} goes with --predictions")
    workdir = _WORKDIR.value
    if not workdir:
        raise ValueError("give --workdir (of a training run), or --predictions")
    tta, tiles = view_options()
    from solov2_jax.tools.report.evaluate_run import evaluate_run

    return evaluate_run(
        workdir,
        _CHECKPOINT.value,
        overrides,
        tta=tta,
        tiles=tiles,
        output=_OUTPUT.value,
        report=_REPORT.value,
        expectations=expectations,
    )


def score_files(overrides: list[str], expectations: list) -> dict[str, float]:
    """Returns the metrics of a file of predictions."""
    if _WORKDIR.value or overrides:
        raise ValueError("--predictions goes without --workdir and --config")
    if not _ANNOTATIONS.value:
        raise ValueError("--predictions needs --annotations, an instances json")
    from solov2_jax.tools.report.results_file import evaluate_files

    return evaluate_files(
        _ANNOTATIONS.value,
        _PREDICTIONS.value,
        against=_AGAINST.value,
        out_dir=_OUTPUT.value,
        images=_IMAGES.value,
        report=_REPORT.value,
        expectations=expectations,
        max_detections=_MAX_DETECTIONS.value,
    )


def run() -> None:
    """Runs the command."""
    app.run(main, process_flags.joining)
