"""SavedModel and TFLite against the original. Runs where TensorFlow is installed.

pip install "solov2_jax[export-tf]" && pytest tests/test_export_tf.py
"""

import io
import json
import zipfile

import numpy as np
import pytest
import tiny_network
from PIL import Image

from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_model
from solov2_jax.tools.export.exported import read_metadata
from solov2_jax.tools.export.run import ExportOptions, export

pytest.importorskip("tensorflow")
# TensorFlow's own imports warn, differently in each version.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("file_format", "precision"),
    [("savedmodel", "float32"), ("tflite", "float32"), ("tflite", "float16")],
)
def test_exported_files_detect_the_same(tmp_path, file_format, precision):
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    model = build_model(config, len(tiny_network.NAMES))
    variables = tiny_network.tiny_variables(config)
    predictor = build_predictor(config, model, variables, tiny_network.NAMES)
    small = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = tmp_path / "image.png"
    Image.fromarray(small).resize((50, 60)).save(image)
    options = ExportOptions(file_format, precision)
    folder = tmp_path / "exported"
    report = export(model, predictor, options, folder, [str(image)], "a test")
    parity = report["parity"]
    assert parity["detections"] == 10 and parity["pairs"] > 0
    half = precision == "float16"
    assert parity["max_score_difference"] < (2e-2 if half else 1e-4)
    assert parity["mean_mask_iou"] > (0.9 if half else 0.999)
    file = folder / f"64x64.{file_format}"
    if file_format == "tflite":
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
            inside = json.loads(archive.read("metadata.json"))
    else:
        inside = json.loads((file / "assets.extra" / "metadata.json").read_text())
    assert inside == read_metadata(folder)
