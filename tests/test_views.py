"""Tiles and augmentation with a real, tiny network: in Python and by command."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import tiny_network
from PIL import Image
from test_predict_cli import command

from solov2_jax.inference.prediction import MaskCrops
from solov2_jax.inference.predictor import Predictor
from solov2_jax.tools.multiview.build import build_views
from solov2_jax.tools.multiview.tiling import TileOptions
from solov2_jax.tools.multiview.tta import TtaOptions
from solov2_jax.tools.report.evaluate_run import FullResolutionBatches, FullResolutionPredictor


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run with the tiny network."""
    folder = tmp_path_factory.mktemp("run")
    return tiny_network.write_workdir(folder, tiny_network.tiny_config())


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.from_workdir(workdir)


def photo(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def predict(predictor, image, **options):
    views = build_views(predictor, **{"tta": None, "tiles": None, **options})
    (prediction,) = views.predict_images([image])
    return prediction


def test_one_view_and_one_tile_are_the_plain_prediction(workdir):
    # At 64 x 64 there is no padding, with which a mask at the border is mixed.
    predictor = Predictor.from_workdir(workdir, overrides=["--config.input.min_size_test=64"])
    image = photo(48, 48)
    (plain,) = predictor.predict_images([image])
    for options in ({"tta": TtaOptions()}, {"tiles": TileOptions(48)}):
        found = predict(predictor, image, **options)
        assert len(found) == len(plain) > 0
        np.testing.assert_array_equal(np.asarray(found.masks), plain.masks)
        np.testing.assert_array_equal(found.boxes, plain.boxes)
        np.testing.assert_array_equal(found.labels, plain.labels)
        np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-5)


def test_tiles_are_augmented_and_compiled_once(predictor, caplog):
    with caplog.at_level("INFO"):
        found = predict(predictor, photo(70, 100), tta=TtaOptions(True), tiles=TileOptions(40))
    assert isinstance(found.masks, MaskCrops) and found.masks.shape[1:] == (70, 100)
    assert caplog.text.count("compiling") == 1, caplog.text
    assert "2 image(s) padded to 64 x 64" in caplog.text


def test_the_filling_is_the_mean_colour_and_borders_are_a_masks_cell(predictor):
    tiled = build_views(predictor, None, TileOptions(96))
    # The base config's mean in BGR, as RGB; a cell is 4 of 48 pixels, of 96 here 8.
    assert (tiled.fill, tiled.border) == ((124, 116, 104), 8)


def test_evaluation_of_originals_covers_every_image_once(predictor, tmp_path):
    dataset = tiny_coco.load(tmp_path)
    looking = FullResolutionPredictor(build_views(predictor, TtaOptions(True), None))
    batches = FullResolutionBatches(dataset)
    found = [p for batch in batches for p in looking.predict_batch(batch)]
    assert [p.image_id for p in found] == dataset.image_ids.tolist()
    assert len(batches) == 3 and len(FullResolutionBatches(dataset, 2)) == 2
    sizes = zip(dataset.heights.tolist(), dataset.widths.tolist(), strict=True)
    assert [p.masks.shape[1:] for p in found] == list(sizes)


def test_the_commands_take_views(workdir, tmp_path):
    images, annotations = tiny_coco.write(tmp_path)
    data = f"--config.data.val.images={images}"
    code, text = command(
        "evaluate.py",
        "--workdir",
        workdir,
        data,
        "--tile=32",
        "--tile_whole",
        "--tta=flip,1,0.75",
        f"--config.data.val.annotations={annotations}",
    )
    assert code == 0, text
    folder = Path(workdir) / "eval"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_images"] == 3 and 0 <= metrics["segm/AP"] <= 1
    Image.fromarray(photo(60, 90)).save(tmp_path / "large.png")
    code, text = command(
        "predict.py",
        "--workdir",
        workdir,
        "--input",
        tmp_path / "large.png",
        "--tile=40",
        "--output",
        tmp_path / "out",
        "--score=0",
        "--tile_overlap=0.3",
    )
    assert code == 0, text
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert results and {tuple(r["segmentation"]["size"]) for r in results} == {(60, 90)}
    with Image.open(tmp_path / "out" / "large.png") as picture:
        assert picture.size == (90, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tta=flop"], "neither 'flip' nor a scale"),
        (["--tta=flip,40"], "must be from 0.1 to 10"),
        (["--tile=-1"], "--tile=-1"),
        (["--tile=64", "--tile_overlap=1"], "--tile_overlap=1 "),
        (["--tile_whole"], "need --tile"),
    ],
)
def test_impossible_views_are_one_clear_error(workdir, arguments, message):
    code, text = command("evaluate.py", "--workdir", workdir, *arguments)
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in text
