"""Exported files against the program they were made from, each in its own runtime."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_network
from PIL import Image

from solov2_jax.inference.predictor import build_predictor
from solov2_jax.inference.preprocess import default_buckets
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.tools.export.exported import (
    ExportedPredictor,
    read_metadata,
    resize_masks,
    tight_boxes,
)
from solov2_jax.tools.export.formats import FORMATS
from solov2_jax.tools.export.parity import compare
from solov2_jax.tools.export.program import make_program
from solov2_jax.tools.export.run import ExportOptions, export

for needed in ("onnx", "onnxruntime", "flatbuffers"):
    pytest.importorskip(needed)
# Its tools import a module that warns of its own renaming.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:onnxruntime")


@pytest.fixture(scope="module")
def network():
    """The tiny network and its predictor, whose images are 64 x 64."""
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    model = build_model(config, len(tiny_network.NAMES))
    variables = tiny_network.tiny_variables(config)
    names, ids = tiny_network.NAMES, tiny_network.IDS
    return model, build_predictor(config, model, variables, names, ids)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths of pictures, one of them thinner than the network's input."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate(((60, 50), (70, 90), (96, 96))):
        small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(small).resize(size[::-1]).save(path)
        paths.append(str(path))
    return paths


CASES = {
    "onnx": ExportOptions("onnx"),
    "onnx, probabilities, batch": ExportOptions("onnx", masks="quarter", batch=2),
    "onnx, float16": ExportOptions("onnx", "float16"),
    "stablehlo": ExportOptions("stablehlo"),
    "stablehlo, float16": ExportOptions("stablehlo", "float16", "quarter"),
}


@pytest.mark.parametrize("name", CASES)
def test_exported_files_detect_the_same(tmp_path, network, images, name):
    options, (_, predictor) = CASES[name], network
    report = export(*network, options, tmp_path, images, "a test")
    parity = report["parity"]
    half = options.precision == "float16"
    assert parity["images"] >= 3 and parity["detections"] == 10 * parity["images"]
    # float32: sums in another order. 16-bit weights are off by 2^-11 each; both move
    # a score by little and a pixel at the threshold from one side to the other.
    assert parity["max_score_difference"] < (2e-2 if half else 1e-4)
    assert parity["mean_mask_iou"] > (0.9 if half else 0.999)
    assert (parity["max_score_difference"] > 1e-5) == half  # it is the original's
    assert json.loads((tmp_path / "export.json").read_text()) == report

    loaded = ExportedPredictor(tmp_path)
    assert loaded.class_names == tiny_network.NAMES
    for got, want in zip(
        loaded.predict_images(images), predictor.predict_images(images), strict=True
    ):
        assert got.masks.shape[1:] == want.masks.shape[1:]
        if options.masks == "quarter" and not half:
            np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)
            assert (got.masks == want.masks).mean() > 0.999
            np.testing.assert_array_equal(got.boxes, tight_boxes(got.masks))


@pytest.mark.parametrize("file_format", ["onnx", "stablehlo"])
def test_float16_halves_a_file(tmp_path, network, images, file_format):
    sizes = []
    for precision in ("float32", "float16"):
        options = ExportOptions(file_format, precision)
        report = export(*network, options, tmp_path, images[:1], "a test")
        sizes += report["bytes"].values()
    assert 0.5 < sizes[1] / sizes[0] < 0.52


def test_int8_is_smaller_and_finds_the_same_objects(tmp_path, network, images):
    report = export(*network, ExportOptions("onnx", "int8"), tmp_path, images, "a test")
    # Random weights are the hardest case: half of the pixels lie near the threshold.
    assert report["parity"]["pairs"] > 0
    assert report["bytes"]["64x64.onnx"] < 0.3 * 4 * parameters(network)
    import onnx

    model = onnx.load(str(tmp_path / "64x64.onnx"))
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}


def parameters(network) -> int:
    return sum(x.size for x in jax.tree.leaves(network[1].variables))


def test_metadata_is_inside_the_onnx_file(tmp_path, network, images):
    import onnxruntime

    export(*network, ExportOptions("onnx"), tmp_path, images[:1], "run, step 3")
    session = onnxruntime.InferenceSession(str(tmp_path / "64x64.onnx"))
    inside = json.loads(session.get_modelmeta().custom_metadata_map["solov2_jax"])
    assert inside == read_metadata(tmp_path)
    assert inside["classes"] == {"names": ["cat", "dog"], "ids": [5, 20]}
    assert inside["files"] == {"64x64.onnx": [64, 64]}
    assert inside["source"] == "run, step 3"
    assert inside["outputs"] == [o.name for o in session.get_outputs()]
    assert inside["preprocessing"]["min_size"] == 48


def test_stablehlo_needs_jax_only(tmp_path, network, images):
    """Another process, which cannot import this package, runs the file."""
    export(*network, ExportOptions("stablehlo"), tmp_path, images[:1], "a test")
    code = (
        "import sys, numpy as np\n"
        "sys.modules['solov2_jax'] = None\n"
        "from jax import export\n"
        "data = open('64x64.stablehlo', 'rb').read()\n"
        "call = export.deserialize(bytearray(data)).call\n"
        "size = np.array([[64, 64]], 'int32')\n"
        "out = call(np.zeros((1, 64, 64, 3), np.uint8), size)\n"
        "print(int(out['count'][0]), out['masks'].shape)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "10 (1, 10, 64, 64)\n", found.stderr


def test_masks_and_boxes_are_those_of_the_padded_input(network):
    model, predictor = network
    arguments = (model, predictor.variables, predictor.input, predictor.options)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    size = np.array([[40, 56]], np.int32)
    full = jax.jit(make_program(*arguments, "input"))(image, size)
    soft = jax.jit(make_program(*arguments, "quarter"))(image, size)["masks"]
    large = jax.image.resize(soft, (1, 10, 64, 64), "bilinear", antialias=False)
    want = np.array(large > 0.5)
    want[:, :, 40:] = want[:, :, :, 56:] = False
    assert (np.asarray(full["masks"]) == want).mean() > 0.9999
    boxes = tight_boxes(np.asarray(full["masks"][0], bool))
    np.testing.assert_array_equal(full["boxes"][0], boxes)


def test_what_cannot_be_exported_is_named(tmp_path, network, images, monkeypatch):
    model, predictor = network
    for options, message in (
        (ExportOptions("stablehlo", "int8"), "stablehlo has only float32, float16"),
        (ExportOptions("pt"), "choose one of stablehlo, onnx"),
        (ExportOptions("onnx", masks="all"), "choose one of input, quarter"),
        (ExportOptions("onnx", buckets=((60, 64),)), "multiples of 32"),
        (ExportOptions("onnx", buckets=((64, 64), (96, 96))), "none of 1 images"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, predictor, options, tmp_path, images[2:], "a test")
    half = model.clone(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="model.dtype=float32"):
        export(half, predictor, ExportOptions("onnx"), tmp_path, images, "a test")
    missing = dataclasses.replace(FORMATS["onnx"], needs=("onnx", "no_such_module"))
    monkeypatch.setitem(FORMATS, "onnx", missing)
    with pytest.raises(ValueError, match=r"needs no_such_module, which is not"):
        export(model, predictor, ExportOptions("onnx"), tmp_path, images, "a test")


def test_nothing_is_written_where_something_is_refused(tmp_path, network, images):
    folder = tmp_path / "out"
    options = ExportOptions("onnx", buckets=((64, 64), (96, 96)))
    with pytest.raises(InputError, match="none of 1 images"):
        export(*network, options, folder, images[2:], "a test")
    assert not folder.exists()


def test_a_file_that_no_export_wrote_is_not_overwritten(tmp_path, network, images):
    for name in ("64x64.stablehlo", "metadata.json", "export.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match=f"{name}: exists and was not written by an export"):
            export(*network, ExportOptions("stablehlo"), folder, images[:1], "a test")
        assert [f.name for f in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"
    arguments = (*network, ExportOptions("stablehlo"), folder, images[:1], "a test")
    report = export(*arguments, overwrite=True)
    assert report["written"] == ["64x64.stablehlo", "export.json", "metadata.json"]
    assert export(*arguments)["written"] == report["written"]  # its own may be replaced
    assert sorted(f.name for f in folder.iterdir()) == report["written"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: a file; --output must be a folder"):
        export(*network, ExportOptions("onnx"), tmp_path / "file", images[:1], "a test")


@pytest.mark.parametrize("file_format", ["stablehlo", "onnx"])
def test_damaged_exports_are_one_sentence(tmp_path, network, images, file_format):
    export(*network, ExportOptions(file_format), tmp_path, images[:1], "a test")
    file = tmp_path / f"64x64.{file_format}"
    whole = file.read_bytes()
    for data in (b"", b"<html>", whole[:100], whole[: len(whole) // 2], whole[:-10]):
        file.write_bytes(data)
        with pytest.raises(InputError, match=rf"64x64\.{file_format}: cannot be read as an export"):
            next(iter(ExportedPredictor(tmp_path).predict_images(images[:1])))


META = {
    "version": 1,
    "format": "onnx",
    "masks": "input",
    "batch": 1,
    "outputs": ["count", "scores", "labels", "boxes", "masks"],
    "classes": {"names": ["a"], "ids": [1]},
    "preprocessing": {"channel_order": "RGB", "min_size": 48, "max_size": 64},
    "options": {"mask_threshold": 0.5},
    "files": {"64x64.onnx": [64, 64]},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": None}, "classes is missing, should be an object"),
        ({"classes": ["a"]}, "classes is of type list, should be an object"),
        ({"classes": {"names": ["a"]}}, "classes.ids is missing, should be a list of int"),
        ({"classes": {"names": [1], "ids": [1]}}, "classes.names is of type list, should be a"),
        ({"classes": {"names": ["a", "b"], "ids": [1]}}, "as many classes.ids as classes.names"),
        ({"batch": "1"}, "batch is of type str, should be int"),
        ({"batch": True}, "batch is of type bool, should be int"),
        ({"batch": 0}, "batch at least 1"),
        ({"version": None}, "version is missing"),
        ({"version": 2}, "has form 2, this version reads 1"),
        ({"format": "pt"}, "format one of stablehlo"),
        ({"masks": "all"}, "masks one of input"),
        ({"outputs": ["count"]}, "the outputs of masks"),
        ({"files": {}}, "files such as"),
        ({"files": {"../x.onnx": [64, 64]}}, "files such as"),
        ({"files": {"64x64.onnx": 64}}, "files such as"),
        ({"preprocessing": {"channel_order": "RGB"}}, "preprocessing.min_size is missing"),
        ({"options": {"mask_threshold": "x"}}, "options.mask_threshold is of type str"),
    ],
)
def test_metadata_of_another_form_is_one_sentence(tmp_path, change, message):
    (tmp_path / "metadata.json").write_text(json.dumps(META))
    assert read_metadata(tmp_path) == META
    (tmp_path / "metadata.json").write_text(json.dumps({**META, **change}))
    with pytest.raises(InputError, match=rf"metadata\.json: .*{message}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "nonsense", "[" * 100_000, '{"a":' * 9999])
def test_metadata_that_is_no_object_is_one_sentence(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(InputError, match=r"metadata\.json: .*Give a folder that export.py wrote"):
        read_metadata(tmp_path)


def test_two_shapes_hold_every_image():
    assert default_buckets(800, 1333) == ((800, 1344), (1344, 800))
    assert default_buckets(128, 128) == ((128, 128),)


def outputs(scores, masks, labels=None):
    n = len(scores)
    return {
        "count": np.array([n]),
        "scores": np.array([scores], np.float32),
        "labels": np.array([labels or [0] * n]),
        "masks": np.array([masks], np.uint8),
    }


def test_parity_pairs_the_same_object_whatever_its_place():
    a, b = [[1, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]
    shorter = [[1, 1, 1, 0], [0, 0, 0, 0]]
    original = outputs([0.9, 0.8, 0.3], [a, b, a], [0, 0, 1])
    exported = outputs([0.81, 0.7], [b, shorter])
    parity = compare([(original, exported)], 0.5)
    assert (parity.pairs, parity.detections, parity.unpaired) == (2, 3, 1)
    assert parity.max_score_difference == pytest.approx(0.2)
    assert (parity.mean_mask_iou, parity.min_mask_iou) == (0.875, 0.75)
    assert parity.best_unpaired_score == pytest.approx(0.3)
    nothing = compare([(outputs([0.9], [a]), outputs([], np.zeros((0, 2, 4))))], 0.5)
    assert nothing.max_score_difference is None and "nothing" in nothing.summary()


def test_masks_at_the_original_size():
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, :4, 2:6] = 1
    large = resize_masks(mask, np.array([8, 8]), np.array([16, 24]))
    assert large.shape == (1, 16, 24)
    np.testing.assert_array_equal(tight_boxes(large), [[6, 0, 18, 8]])
    # What is beyond the image before padding is no part of it.
    cut = resize_masks(mask, np.array([8, 4]), np.array([8, 4]))
    np.testing.assert_array_equal(tight_boxes(cut), [[2, 0, 4, 4]])
