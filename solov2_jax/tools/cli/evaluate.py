r"""Evaluates a training run on its validation data, or files of predictions.

    solov2 evaluate --workdir runs/r50
    solov2 evaluate --workdir runs/r50 --checkpoint best --report \
        --config.data.val.images=other/images \
        --config.data.val.annotations=other/instances.json
    solov2 evaluate --workdir runs/r50 --expect segm/AP=0.42+-0.02
    solov2 evaluate --annotations instances.json --predictions a.json \
        --against b.json

`--tta=flip,0.8,1,1.25` and `--tile=512` evaluate with several views of each image.

Writes `eval/metrics.json` and `eval/predictions.json` (COCO's results format) into the
workdir, and `eval/report/report.html` with `--report`. Predictions of any tool in that
format are scored with `--predictions`; `--output` names the folder for what is written.
Exit code 0: done; 1: a result is outside of a range that `--expect` gave; 2: an error
that the one line `error: ...` explains.
"""

import functools
import sys

from solov2_jax.config_schema import several, switch, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_REPORT = Flag("report", switch(False), "Write a page with curves, errors and the worst images.")
_EXPECT = Flag(
    "expect",
    several((), text()),
    "METRIC=VALUE+-TOLERANCE; exit code 1 outside of it.",
    repeated=True,
)
_PREDICTIONS = Flag("predictions", text(), "Score this file in COCO's results format, no run.")
_AGAINST = Flag("against", text(), "Compare --predictions with this file.")
_ANNOTATIONS = Flag("annotations", text(), "Instances json that --predictions are about.")
_IMAGES = Flag("images", text(), "Folder of the images, for the report of --predictions.")
_OUTPUT = Flag("output", text(), "Folder to write. Default: WORKDIR/eval; none without workdir.")
_MAX_DETECTIONS = Flag(
    "max_detections",
    whole(0, high=1_000_000),
    "With --predictions: detections per image and class that count, beyond COCO's 100.",
)
_FILES = (_PREDICTIONS, _ANNOTATIONS, _AGAINST, _IMAGES, _MAX_DETECTIONS)
FLAGS = (shared.WORKDIR, shared.CHECKPOINT, _REPORT, _EXPECT, *_FILES, _OUTPUT)
FLAGS += (*shared.VIEWS, *shared.PROCESSES)


def main(overrides: list[str]) -> None:
    from solov2_jax.evaluation.coco import format_metric
    from solov2_jax.tools.report.results_file import misses, parse_expectations

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
    for flag in (_AGAINST, _ANNOTATIONS, _IMAGES, _MAX_DETECTIONS):
        if flag.value:
            raise InputError(f"--{flag.name} goes with --predictions")
    workdir = shared.WORKDIR.value
    if not workdir:
        raise InputError("give --workdir (of a training run), or --predictions")
    tta, tiles = shared.view_options()
    from solov2_jax.tools.report.evaluate_run import evaluate_run

    return evaluate_run(
        workdir,
        shared.CHECKPOINT.value,
        overrides,
        tta=tta,
        tiles=tiles,
        output=_OUTPUT.value,
        report=_REPORT.value,
        expectations=expectations,
    )


def score_files(overrides: list[str], expectations: list) -> dict[str, float]:
    if shared.WORKDIR.value or overrides:
        raise InputError("--predictions goes without --workdir and --config")
    if not _ANNOTATIONS.value:
        raise InputError("--predictions needs --annotations, an instances json")
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


run = functools.partial(app.run, main, FLAGS, shared.run_joined)
