"""ONNX files of networks with other backbones than ResNet, beside the programs they are from."""

import numpy as np
import pytest
import tiny_network
from golden_backbones import SWIN_HEADS, WIDTHS
from PIL import Image

from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_model
from solov2_jax.tools.export.run import ExportOptions, export

for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:onnxruntime")
SMALL = {
    "convnext_t": {"depths": (1, 1, 1, 1), "widths": WIDTHS},
    "swin_t": {"depths": (2, 1, 1, 1), "heads": SWIN_HEADS, "width": 8},
    "dinov2_s": {"depth": 2, "width": 32, "heads": 2, "grid": 5},
    "mobilenet_v3_large": {},
}


# The others' operations are among those of these.
SLOW = {name: pytest.mark.slow for name in ("convnext_t", "mobilenet_v3_large")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in SMALL])
def test_the_file_detects_the_same(tmp_path, name):
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    config.model.backbone.name = name
    config.model.backbone.options.update(SMALL[name])
    model = build_model(config, len(tiny_network.NAMES))
    variables = tiny_network.tiny_variables(config)
    names, ids = tiny_network.NAMES, tiny_network.IDS
    predictor = build_predictor(config, model, variables, names, ids)
    small = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((50, 60)).save(tmp_path / "a.png")
    options = ExportOptions("onnx")
    report = export(model, predictor, options, tmp_path / "x", [str(tmp_path / "a.png")], "a test")
    parity = report["parity"]
    assert parity["detections"] >= parity["images"]
    assert parity["max_score_difference"] < 2e-4 and parity["mean_mask_iou"] > 0.99
