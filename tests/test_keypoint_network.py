"""A network with key points through the tools: exported, served, compiled from shapes."""

import json

import jax
import numpy as np
import pytest
import tiny_network
from PIL import Image

from solov2_jax.inference.predictor import build_predictor
from solov2_jax.models import build_model
from solov2_jax.tools.dry_run import dry_run

POINTS = ("head", "left_hand", "right_hand")


@pytest.fixture(scope="module")
def network():
    """The config, the model and the predictor of images of 64 x 64."""
    config = tiny_network.tiny_config()
    config.data.mapper = "fcpose"
    config.model.keypoint_head.names = POINTS
    config.model.keypoint_head.skeleton = ((1, 2), (1, 3))
    config.input.buckets_test = ((64, 64),)
    model = build_model(config, len(tiny_network.NAMES))
    variables = tiny_network.tiny_variables(config)
    return config, model, build_predictor(config, model, variables, tiny_network.NAMES, (5, 20))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, size in enumerate(((60, 50), (70, 90))):
        small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size).save(folder / f"{i}.png")
    return sorted(map(str, folder.iterdir()))


def test_an_exported_network_finds_the_same_points(tmp_path, network, images):
    for needed in ("onnx", "onnxruntime"):
        pytest.importorskip(needed)
    from solov2_jax.tools.export.exported import ExportedPredictor
    from solov2_jax.tools.export.run import ExportOptions, export

    _, model, predictor = network
    export(model, predictor, ExportOptions("onnx"), tmp_path, images, "a test")
    loaded = ExportedPredictor(tmp_path)
    both = zip(loaded.predict_images(images), predictor.predict_images(images), strict=True)
    for got, want in both:
        assert len(want) and want.keypoints.shape == (len(want), len(POINTS), 3)
        np.testing.assert_array_equal(got.labels, want.labels)
        # Between the pixels of a flat heatmap, as random weights make them, a place is loose.
        np.testing.assert_allclose(got.keypoints[..., :2], want.keypoints[..., :2], atol=0.5)
        np.testing.assert_allclose(got.keypoints[..., 2], want.keypoints[..., 2], atol=1e-4)
        assert got.skeleton == want.skeleton == ((1, 2), (1, 3))


def test_the_step_compiles_from_shapes(network):
    config = network[0].copy_and_resolve_references()
    config.train.batch_size = 8
    config.input.buckets_train = ((64, 64),)
    (row,), _ = dry_run(config)
    assert row.shape == (64, 64) and row.flops > 0
    assert {"keypoint_head"} <= set(jax.tree.map(lambda x: 0, network[2].variables["params"]))


def test_the_server_answers_with_points(network, images):
    pytest.importorskip("fastapi")
    from solov2_jax.tools.serving import engine

    _, _, predictor = network
    serving = engine.Engine(predictor, ((64, 64),), 1)
    picture = np.asarray(Image.open(images[0]))
    (body,) = serving.answer([serving.preprocess(picture, 0.0, 10, drawn=False)])
    answer = json.loads(body)
    want = predictor(picture)
    assert len(answer["detections"]) == len(want) > 0
    for found, points in zip(answer["detections"], want.keypoints, strict=True):
        got = np.reshape(found["keypoints"], (len(POINTS), 3))
        # A COCO file counts from the middle of the first pixel.
        np.testing.assert_allclose(got[:, :2] + 0.5, points[:, :2], atol=0.05)
    (drawn,) = serving.answer([serving.preprocess(picture, 0.0, 10, drawn=True)])
    assert drawn[:4] == b"\x89PNG"
