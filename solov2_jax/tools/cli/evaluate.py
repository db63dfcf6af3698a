r"""Evaluates a training run on its validation data, or files of predictions.

    solov2 evaluate --workdir runs/r50
    solov2 evaluate --workdir runs/r50 --checkpoint best --report \
        --config.data.val.images=other/images \
        --config.data.val.annotations=other/instances.json
    solov2 evaluate --workdir runs/r50 --expect segm/AP=0.42+-0.02
    solov2 evaluate --config r50_3x --weights r50_3x.pth --data FOLDER
    solov2 evaluate --model runs/r50/export/onnx_float32 --data FOLDER
    solov2 evaluate --workdir hf:USER/REPO --data FOLDER
    solov2 evaluate --annotations instances.json --predictions a.json \
        --against b.json
    solov2 evaluate --annotations lvis_v1_val.json --predictions a.json --metric lvis
    solov2 evaluate --annotations gtFine/val --predictions results --metric cityscapes

`--tta=flip,0.8,1,1.25` and `--tile=512` evaluate with several views of each image.

`--data` takes what `train --data` takes; classes are matched by name with the network's,
and what is evaluated is the validation part, else the test part, else all (`--split`).

`--metric` is auto (what the annotations are made for), coco, lvis, cityscapes, voc, boundary,
keypoints, or an import path of your own.

Writes `eval/metrics.json` and `eval/predictions.json` (COCO's results format) into the
workdir, and `eval/report/report.html` with `--report`. Predictions of any tool in that
format are scored with `--predictions` (of Cityscapes' also a folder of its own results);
`--output` names the folder for what is written.
Exit code 0: done; 1: a result is outside of a range that `--expect` gave; 2: an error
that the one line `error: ...` explains.
"""

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from solov2_jax.config_schema import METRIC_FORM, choice, several, switch, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

if TYPE_CHECKING:
    from solov2_jax.tools.importers.eval_data import EvalRequest

_REPORT = Flag("report", switch(False), "Write a page with curves, errors and the worst images.")
_EXPECT = Flag(
    "expect",
    several((), text()),
    "METRIC=VALUE+-TOLERANCE; exit code 1 outside of it.",
    repeated=True,
)
_PREDICTIONS = Flag(
    "predictions",
    text(),
    "Score this file in COCO's results format, or folder in Cityscapes'; no run.",
)
_AGAINST = Flag("against", text(), "Compare --predictions with this file.")
_ANNOTATIONS = Flag(
    "annotations",
    text(),
    "Instances json, or Cityscapes' gtFine/val, that --predictions are about.",
)
_IMAGES = Flag("images", text(), "Folder of the images, for the report of --predictions.")
_OUTPUT = Flag(
    "output",
    text(),
    "Folder to write. Default: WORKDIR/eval, WORKDIR/eval_NAME with --data; none without workdir.",
)
_DATA = Flag(
    "data",
    several((), text("", form=(r"[^\0]+", "a folder or file"))),
    "Folder or file of annotated images to evaluate on, in any of the formats of docs/data.md.",
    repeated=True,
)
_SPLITS = ("val", "test", "train", "all")
_SPLIT = Flag("split", choice("val", _SPLITS), "With --data: its part to take.", optional=True)
_CLASSES = Flag("classes", several((), text()), "With --data: classes of it that count.")
_OTHER_DATA = (_DATA, _SPLIT, _CLASSES)
_MAX_DETECTIONS = Flag(
    "max_detections",
    whole(0, high=1_000_000),
    "With --predictions: detections per image and class that count, beyond COCO's 100.",
)
_METRIC = Flag(
    "metric",
    text("auto", form=METRIC_FORM),
    "What scores them, instead of data.val.metric: auto, coco, lvis, cityscapes, voc, boundary, "
    "keypoints, or an import path.",
    optional=True,
)
_SIZE_RANGES = Flag(
    "size_ranges",
    several((), whole(32, 1, 65_536), (0, 100), rising="<"),
    "With --predictions: sides in pixels between size ranges of your own, such as 16,64.",
)
_FILES = (_PREDICTIONS, _ANNOTATIONS, _AGAINST, _IMAGES, _MAX_DETECTIONS, _SIZE_RANGES)
FLAGS = (*shared.MODEL, shared.EXPORT, *_OTHER_DATA, _METRIC, _REPORT, _EXPECT, *_FILES, _OUTPUT)
FLAGS += (*shared.VIEWS, *shared.PROCESSES)


def main(overrides: list[str]) -> None:
    from solov2_jax.evaluation.coco import format_metric, headlines
    from solov2_jax.tools.report.results_file import misses, parse_expectations

    expectations = parse_expectations(_EXPECT.value)
    if _PREDICTIONS.value:
        metrics = score_files(overrides, expectations)
    else:
        metrics = score_run(overrides, expectations)
    for name in headlines(metrics):
        print(f"{name} {format_metric(metrics[name])}")
    if lines := misses(expectations, metrics):
        for line in lines:
            print(f"unexpected: {line}", file=sys.stderr)
        sys.exit(1)


def score_run(overrides: list[str], expectations: list) -> dict[str, float]:
    from solov2_jax.weights.hub import is_remote

    for flag in _FILES[1:]:
        if flag.value:
            raise InputError(f"--{flag.name} goes with --predictions")
    if not any(f.value for f in (shared.WORKDIR, shared.CONFIG, shared.WEIGHTS, shared.EXPORT)):
        raise InputError(
            "give --workdir (of a training run), or --predictions; or --config and --weights, or "
            "--model"
        )
    shared.check_model()
    tta, tiles = shared.view_options()
    has_folder = shared.WORKDIR.value and not is_remote(shared.WORKDIR.value)
    if _REPORT.value and not (_OUTPUT.value or has_folder):
        raise InputError("--report needs --output, a folder to write to")
    if not shared.WORKDIR.value:
        return score_weights(overrides, expectations, tta=tta, tiles=tiles)
    from solov2_jax.tools.report.evaluate_run import evaluate_run

    return evaluate_run(
        shared.WORKDIR.value,
        shared.CHECKPOINT.value,
        overrides,
        tta=tta,
        tiles=tiles,
        output=_OUTPUT.value,
        report=_REPORT.value,
        expectations=expectations,
        data=other_data(),
        metric=_METRIC.value or "",
    )


def other_data() -> "EvalRequest | None":
    """Returns what --data and its flags name."""
    if not _DATA.value:
        for flag in _OTHER_DATA[1:]:
            if flag.present:
                raise InputError(f"--{flag.name} goes with --data")
        return None
    from solov2_jax.tools.importers.eval_data import EvalRequest

    return EvalRequest(tuple(_DATA.value), _SPLIT.value or "", tuple(_CLASSES.value))


def score_weights(
    overrides: list[str], expectations: list, *, tta: Any, tiles: Any
) -> dict[str, float]:
    """Returns the metrics of --weights or --model."""
    from solov2_jax.config import base_config, load_config
    from solov2_jax.tools.report.evaluate_run import evaluate_predictor

    name = shared.EXPORT.value or shared.WEIGHTS.value
    if shared.EXPORT.value:
        if not _DATA.value:
            raise InputError("--model needs --data, a folder of annotated images")
        predictor, config = shared.load_export(overrides), base_config()
    else:
        config = load_config(shared.CONFIG.value, overrides)
        predictor = shared.load_predictor(overrides)
        with config.unlocked():  # where it follows from the weights
            config.input.channel_order = predictor.input.channel_order
    return evaluate_predictor(
        predictor,
        config,
        tta=tta,
        tiles=tiles,
        output=_OUTPUT.value,
        title=os.path.basename(os.path.abspath(name)) if _REPORT.value else "",
        expectations=expectations,
        data=other_data(),
        metric=_METRIC.value or "",
    )


def score_files(overrides: list[str], expectations: list) -> dict[str, float]:
    others = (*shared.MODEL, shared.EXPORT, *_OTHER_DATA, *shared.VIEWS)
    if given := [*(f"--{f.name}" for f in others if f.present), *overrides]:
        text = "--predictions goes without --workdir and --config, --weights, --model, --data"
        raise InputError(f"{text} and what belongs to them: {given[0]}")
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
        size_ranges=_SIZE_RANGES.value,
        metric=_METRIC.value or "auto",
    )


run = functools.partial(app.run, main, FLAGS, shared.run_joined)
