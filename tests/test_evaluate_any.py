"""Runs, weights files and exported files, evaluated on data as it lies there."""

import json
import logging
import shutil

import numpy as np
import pytest
import test_own_data
import tiny_coco
import tiny_network
from PIL import Image
from test_own_data import as_bare_coco, as_official_coco, as_roboflow, as_yolo

from solov2_jax.config import save_config
from solov2_jax.data.images import read_image
from solov2_jax.inference.predictor import Predictor
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.tools.cli import evaluate as command
from solov2_jax.tools.cli import flags, predict, shared
from solov2_jax.tools.export.load import open_export
from solov2_jax.tools.export.run import ExportOptions, export
from solov2_jax.tools.importers.eval_data import EvalRequest, read_eval_data
from solov2_jax.tools.serving.engine import Engine
from solov2_jax.tools.serving.exported import ExportedEngine

for needed in ("onnx", "onnxruntime", "flatbuffers"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:onnxruntime")
NAMES, IDS = ("dog", "cat", "bird"), (7, 3, 1)


def read(*places, names=NAMES, ids=IDS, **options):
    return read_eval_data(EvalRequest(tuple(map(str, places)), **options), names, ids)


# --- Data ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "split", "images"),
    [
        (as_roboflow, "", 3),
        (as_roboflow, "train", 9),
        (as_roboflow, "all", 12),
        (as_official_coco, "", 3),
        (as_yolo, "val", 3),
        (as_bare_coco, "", 12),
        (as_bare_coco, "all", 12),
    ],
)
def test_classes_are_the_networks_by_name(tmp_path, caplog, write, split, images):
    write(tmp_path / "data")
    with caplog.at_level(logging.INFO, "solov2_jax"):
        data = read(tmp_path / "data", split=split)
    assert len(data) == images and not len(data.missing)
    assert dict(zip(data.category_ids, data.class_names, strict=True)) == {
        1: "bird", 3: "cat", 7: "dog"
    }  # fmt: skip
    names = test_own_data.LAST if images == 3 else test_own_data.FIRST
    wanted = tuple(test_own_data.SQUARES) if images == 12 else names
    squares = [kind for name in wanted for kind, *_ in test_own_data.SQUARES[name]]
    found = [data.class_names[label] for label in data.labels]
    assert sorted(found) == sorted(test_own_data.NAMES[kind] for kind in squares)
    assert "classes of the network without objects here, no AP: bird" in caplog.text


def test_several_folders_are_one(tmp_path):
    as_bare_coco(tmp_path / "a")
    as_yolo(tmp_path / "b")
    assert len(read(tmp_path / "a", tmp_path / "b")) == 12 + 3


def test_weights_without_names_take_the_order(tmp_path):
    as_bare_coco(tmp_path / "data")
    data = read(tmp_path / "data", names=("class 1", "class 2"), ids=(1, 2))
    want = sum(kind == 1 for each in test_own_data.SQUARES.values() for kind, *_ in each)
    assert (data.labels == 1).sum() == want
    with pytest.raises(InputError, match="has 2 classes, and the weights 3 without names"):
        read(tmp_path / "data", names=("class 1", "class 2", "class 3"), ids=(1, 2, 3))


def test_wrong_data_is_one_error(tmp_path):
    as_bare_coco(tmp_path / "data")
    as_official_coco(tmp_path / "coco")
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"names": ("dog", "bird"), "ids": (1, 2)}, r"does not know: cat \(\d+ objects\)"),
        ({"names": ("Dog", "cat"), "ids": (1, 2)}, r"is 'dog' its 'Dog'\?"),
        ({"names": ("x", "dog"), "ids": (1, 2), "classes": ("mouse",)}, "--classes: mouse"),
        ({"names": ("x", "y"), "ids": (1, 2)}, "that the network does not know: "),
        ({"names": ("dog", "dog"), "ids": (1, 2)}, "has classes of one name"),
        ({"split": "test"}, "has no part test"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "data", **options)
    with pytest.raises(InputError, match="has no part test, only train, val"):
        read(tmp_path / "coco", split="test")
    for place, message in (("none", "there is no such folder"), ("empty", "holds no annotations")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / place)
    with pytest.raises(InputError, match="records are used alone"):
        read("tfds:a", tmp_path / "data")
    some = read(tmp_path / "data", names=("dog", "bird"), ids=(1, 2), classes=("dog",))
    assert set(some.labels.tolist()) == {0} and len(some) == 12


# --- Networks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a run on it, its weights as a file, and its exports."""
    folder = tmp_path_factory.mktemp("place")
    images, annotations = tiny_coco.write(folder / "data")
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    with config.unlocked():
        config.data.val.images, config.data.val.annotations = images, annotations
        config.eval.reports = ()
    tiny_network.write_workdir(folder / "run", config)
    save_config(config, folder / "config.json")
    weights = tiny_network.write_weights(folder, config, seed=3)
    predictor = Predictor.from_workdir(folder / "run")
    model = build_model(config, 2)
    paths = [f"{images}/{name}" for name in ("a.png", "sub/b.png", "c.png")]
    for name, options in {
        "onnx": ExportOptions("onnx", best_scores=(0.25, 0.5)),
        "stablehlo": ExportOptions("stablehlo", masks="quarter", batch=2),
    }.items():
        export(model, predictor, options, folder / name, paths[:1], "a test")
    shutil.copy(folder / "onnx" / "64x64.onnx", folder / "model.onnx")
    assert weights == str(folder / "tiny.safetensors")
    return folder


@pytest.fixture(autouse=True)
def flags_as_they_were():
    yield
    for flag in {*command.FLAGS, *predict.FLAGS}:
        flag.value, flag.present = flag.default, False


def evaluate(*words):
    overrides = flags.parse(command.FLAGS, list(words))
    return command.score_run(overrides, [])


def test_an_export_carries_the_best_scores(place, tmp_path):
    def least(model):
        flags.parse(predict.FLAGS, ["--input=x", "--output=y", f"--model={model}", "--score=best"])
        shared.check_model()
        return shared.least_scores(shared.load_export([]))

    assert least(place / "model.onnx").tolist() == [0.25, 0.5]
    with pytest.raises(InputError, match="stablehlo holds no thresholds; evaluate the run"):
        least(place / "stablehlo")
    shutil.copytree(place / "onnx", tmp_path / "onnx")
    metadata = json.loads((tmp_path / "onnx" / "metadata.json").read_text())
    for wrong in ([0.5], [0.5, 1.5], "all", [None, 0.5]):
        text = json.dumps({**metadata, "best_scores": wrong})
        (tmp_path / "onnx" / "metadata.json").write_text(text)
        with pytest.raises(InputError, match="must have a score for each class"):
            least(tmp_path / "onnx")


def test_weights_score_as_the_run_does(place):
    own = evaluate(f"--workdir={place}/run", f"--output={place}/own")
    data = f"--data={place}/data"
    other = evaluate(f"--workdir={place}/run", data)
    assert (place / "run" / "eval_data" / "metrics.json").is_file()
    assert not (place / "run" / "eval").exists(), "the run's own evaluation is not replaced"
    by_file = evaluate(f"--config={place}/config.json", f"--weights={place}/tiny.safetensors", data)
    names = [name for name in own if "/AP" in name]
    assert len(names) > 6 and max(own[name] for name in names if own[name] == own[name]) >= 0
    for each in (other, by_file):
        np.testing.assert_array_equal([each[n] for n in names], [own[n] for n in names])


@pytest.mark.parametrize("model", ["onnx", "onnx/64x64.onnx", "model.onnx", "stablehlo"])
def test_exported_files_score_as_the_network_does(place, tmp_path, model):
    evaluate(f"--model={place}/{model}", f"--data={place}/data", f"--output={tmp_path}/out")
    got = json.loads((tmp_path / "out" / "predictions.json").read_text())
    want = evaluate(f"--workdir={place}/run", f"--output={tmp_path}/run", f"--data={place}/data")
    expected = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert want and len(got) == len(expected) > 20
    # Sums in another order; equal scores may change places.
    scores = [sorted(r["score"] for r in results) for results in (got, expected)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


@pytest.mark.parametrize("model", ["model.onnx", "stablehlo"])
def test_predict_and_serve_take_exported_files(place, tmp_path, model):
    original, exported = Predictor.from_workdir(place / "run"), open_export(place / model)
    path = place / "data" / "images" / "a.png"
    words = [f"--model={place}/{model}", f"--input={path}", f"--output={tmp_path}/out", "--score=0"]
    overrides = flags.parse(predict.FLAGS, words)
    shared.check_model()
    summary = predict.predict(overrides, str(tmp_path))
    assert not summary.report(str(tmp_path / "out"))
    (one,) = original.predict_images([str(path)])
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    np.testing.assert_allclose([r["score"] for r in results], one.scores, atol=1e-4)
    image = read_image(str(path))
    answers = []
    for engine in (
        Engine(original, original.input.buckets, 1),
        ExportedEngine(exported, exported.input.buckets, exported.batch),
    ):
        jobs = [engine.preprocess(image, 0.0, 5, drawn) for drawn in (False, True)]
        text, png = (engine.answer([job])[0] for job in jobs)
        assert png.startswith(b"\x89PNG")
        answers.append(json.loads(text))
    a, b = answers
    assert (a["height"], a["width"], len(a["detections"])) == (48, 64, 5)
    for one, other in zip(a["detections"], b["detections"], strict=True):
        assert abs(one["score"] - other["score"]) < 1e-4
        boxes = np.abs(np.subtract(one["bbox"], other["bbox"]))
        # Masks of the input's pixels are resized once more: half a pixel at their border.
        assert boxes.max() <= (1 if model == "stablehlo" else 2)


def test_what_an_export_cannot_do_is_one_error(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.onnx").write_text("no")
    shutil.copy(place / "stablehlo" / "64x64.stablehlo", tmp_path / "alone.stablehlo")
    data = f"--data={place}/data"
    for words, message in (
        (["--model=none", data], "no such file or folder"),
        ([f"--model={tmp_path}/empty", data], "holds no metadata.json"),
        ([f"--model={tmp_path}/bad.onnx", data], "cannot be read as an export"),
        ([f"--model={tmp_path}/alone.stablehlo", data], "needs the metadata.json"),
        ([f"--model={place}/tiny.safetensors", data], "is none of .stablehlo, .onnx"),
        ([f"--model={place}/onnx"], "--model needs --data"),
        ([f"--model={place}/onnx", data, "--tta=flip"], "goes without --tta"),
        ([f"--model={place}/onnx", data, "--workdir=x"], "goes without --workdir"),
        ([f"--model={place}/onnx", data, "--config.seed=1"], "keeps its settings"),
        ([f"--workdir={place}/run", "--split=val"], "--split goes with --data"),
        ([data], "give --workdir"),
        ([f"--weights={place}/tiny.safetensors", data], "--config and --weights together"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(*words)
        flags.parse(command.FLAGS, [])
    wide = np.zeros((10, 400, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    small = open_export(place / "model.onnx")
    small.input = type(small.input)(**{**vars(small.input), "max_size": 200})
    with pytest.raises(InputError, match="wide.png: fits into none of the padded shapes"):
        next(iter(small.predict_images([str(tmp_path / "wide.png")])))
