r"""Exports a trained network with its post-processing, and compares it by running it.

    solov2 export --workdir runs/r50 --format onnx
    solov2 export --workdir runs/r50 --format onnx --precision int8 --evaluate
    solov2 export --config configs/r50_3x.py --weights r50_3x.safetensors \
        --format stablehlo --shape 800x1344,1344x800 --images photos --output out

Formats: stablehlo runs wherever JAX does, without this package; onnx in ONNX Runtime;
savedmodel and tflite in TensorFlow, the extra "export-tf". One file for each padded
shape, whose weights, thresholds and NMS are inside; `metadata.json` names classes and
preprocessing, and `export.json` holds the measured differences. Inputs and outputs:
docs/export_and_serving.md.

Exit code 0: done; 2: an error that the one line `error: ...` explains.
"""

import functools
import os
from typing import TYPE_CHECKING, Any

from solov2_jax.config import load_config
from solov2_jax.config_schema import choice, several, switch, text, whole
from solov2_jax.io import InputError, write_json
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

if TYPE_CHECKING:
    from solov2_jax.inference.predictor import Predictor

_FORMATS = ("stablehlo", "onnx", "savedmodel", "tflite")
_FORMAT = Flag("format", choice("onnx", _FORMATS), "To write.", required=True)
_PRECISION = Flag(
    "precision",
    choice("float32", ("float32", "float16", "int8")),
    "float16: of the stored weights; int8: of the convolutions.",
)
_SHAPES = Flag(
    "shape",
    several((), text()),
    "Padded HEIGHTxWIDTH, multiples of 32, separated by commas. Default: input.buckets_test, "
    "or a landscape and a portrait shape that hold every image.",
)
_BATCH = Flag("batch", whole(1, 1, 4096), "Images per call.")
_MASKS = Flag(
    "masks",
    choice("input", ("input", "quarter")),
    "input: masks of 0 and 1 at the input's size; quarter: probabilities at a quarter of it.",
)
_IMAGES = Flag("images", text(), "File, folder or pattern to compare on. Default: the val data.")
_NUM_IMAGES = Flag("num_images", whole(8, 1), "Images that are compared.")
_EVALUATE = Flag("evaluate", switch(False), "Measure AP of both on the run's validation data.")
_OVERWRITE = Flag("overwrite", switch(False), "Replace files in the output that no export wrote.")
_OUTPUT = Flag("output", text(), "Folder to write. Default: WORKDIR/export/FORMAT_PRECISION.")
_SHOWN = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP", "num_images")  # of --evaluate
FLAGS = (*shared.MODEL, _FORMAT, _PRECISION, _SHAPES, _BATCH, _MASKS, _IMAGES, _NUM_IMAGES)
FLAGS += (_EVALUATE, _OVERWRITE, _OUTPUT)


def main(overrides: list[str]) -> None:
    from solov2_jax.pretrained import check_data_known

    shared.check_model()
    if not shared.WORKDIR.value and not (_OUTPUT.value and _IMAGES.value):
        raise InputError("--config and --weights need --output and --images")
    if shared.WORKDIR.value.startswith("hf:") and not _OUTPUT.value:
        raise InputError("--workdir hf:... needs --output, a folder to write to")
    if shared.WORKDIR.value and (_EVALUATE.value or not _IMAGES.value):
        fix = "--config.data.val.images and .annotations" if _EVALUATE.value else "--images FOLDER"
        check_data_known(shared.WORKDIR.value, overrides, fix)
    if _EVALUATE.value and not shared.WORKDIR.value:
        raise InputError("--evaluate needs --workdir: the run's validation data")
    buckets = tuple(_parse_shape(text) for text in _SHAPES.value)
    from solov2_jax.tools.export.formats import find_format

    find_format(_FORMAT.value)  # raises now instead of after loading weights
    config, predictor = _load(overrides)
    from solov2_jax.data.build import load_val_dataset
    from solov2_jax.models import build_model
    from solov2_jax.tools.export.run import ExportOptions, export

    options = ExportOptions(
        _FORMAT.value,
        _PRECISION.value,
        _MASKS.value,
        _BATCH.value,
        buckets or predictor.input.buckets,
        shared.known_best_scores(predictor),
    )
    source = shared.WEIGHTS.value or os.path.basename(os.path.abspath(shared.WORKDIR.value))
    name = f"{_FORMAT.value}_{_PRECISION.value}"
    folder = _OUTPUT.value or os.path.join(shared.WORKDIR.value, "export", name)
    dataset = None
    if not _IMAGES.value or _EVALUATE.value:  # read now where it cannot be, not after exporting
        classes = zip(predictor.category_ids, predictor.class_names, strict=True)
        dataset = load_val_dataset(config, dict(classes))
    model = build_model(config, len(predictor.class_names))
    images = _find_images(dataset, predictor.input.pixels)
    report = export(model, predictor, options, folder, images, source, overwrite=_OVERWRITE.value)
    if _EVALUATE.value:
        report["ap"] = _measure_ap(config, predictor, options.buckets, folder)
        write_json(report, os.path.join(folder, "export.json"))
    print(f"exported to {folder}")


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
        return height, width
    except ValueError:
        raise InputError(f"--shape={text}: write HEIGHTxWIDTH, such as 800x1344") from None


def _load(overrides: list[str]) -> "tuple[Any, Predictor]":
    from solov2_jax.pretrained import load_run_config

    predictor = shared.load_predictor(overrides)
    if shared.WORKDIR.value:
        return load_run_config(shared.WORKDIR.value, overrides), predictor
    return load_config(shared.CONFIG.value, overrides), predictor


def _find_images(dataset: Any, pixels: Any) -> list[str]:
    if _IMAGES.value:
        from solov2_jax.tools.predict.sources import find_files, is_video

        files = find_files(_IMAGES.value, pixels, "--images")
        return [path for path in files if not is_video(path)][: _NUM_IMAGES.value]
    number = min(len(dataset), _NUM_IMAGES.value)
    return [dataset.path(i) for i in range(number)]


def _measure_ap(
    config: Any, predictor: "Predictor", buckets: Any, folder: str
) -> dict[str, dict[str, float | None]]:
    """Returns what `solov2 evaluate` finds of the run and of the export, printed too."""
    from solov2_jax.evaluation.coco import format_metric, headlines, json_metrics
    from solov2_jax.tools.export.exported import ExportedPredictor
    from solov2_jax.tools.report.evaluate_run import evaluate_predictor

    with config.unlocked():  # the original pads as the exported files do
        config.input.buckets_test = predictor.input.buckets if buckets == () else buckets
        config.data.vals, config.eval.reports, config.eval.num_pictures = (), (), 0
    found = {}
    for name, each in (("original", predictor), ("exported", ExportedPredictor(folder))):
        metrics = evaluate_predictor(each, config, output=os.path.join(folder, name))
        shown = [key for key in (*headlines(metrics), *_SHOWN) if key in metrics]
        found[name] = json_metrics({key: metrics[key] for key in dict.fromkeys(shown)})
        print(f"{name}: " + ", ".join(f"{k} {format_metric(metrics[k])}" for k in found[name]))
    return found


run = functools.partial(app.run, main, FLAGS)
