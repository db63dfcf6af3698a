"""predict.py and evaluate.py: files in, files out, and what happens to bad ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solov2_jax.inference.files import find_images, name_pictures, predict_files
from solov2_jax.inference.prediction import Prediction, encode_mask

ROOT = Path(__file__).resolve().parent.parent


class LeftHalf:
    """Predicts the left half of every image twice, with scores 0.9 and 0.2."""

    class_names = ("wall", "door")
    category_ids = (5, 2)

    def predict_images(self, images):
        for image in images:
            height, width = image.shape[:2]
            masks = np.zeros((2, height, width), bool)
            masks[:, :, : width // 2] = True
            boxes = np.array([[0, 0, width // 2, height]] * 2, np.float32)
            scores = np.array([0.9, 0.2], np.float32)
            yield Prediction(masks, boxes, scores, np.array([1, 0]), 0)


@pytest.fixture
def photos(tmp_path):
    """Two good images of one stem, a damaged one and a text file, in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_finds_a_file_a_folder_and_a_pattern(photos):
    names = [os.path.basename(p) for p in find_images(str(photos))]
    assert names == ["a.jpg", "a.png", "b.jpg"]
    assert find_images(str(photos / "a.png")) == [str(photos / "a.png")]
    assert len(find_images(str(photos / "*.jpg"))) == 2
    nested = photos.parent / "**" / "*.png"
    assert find_images(str(nested)) == [str(photos / "a.png")]
    odd = photos / "a[1].png"
    (photos / "a.png").rename(odd)
    assert find_images(str(odd)) == [str(odd)], "an existing name is no pattern"


def test_no_input_is_a_clear_error(tmp_path):
    for source in (tmp_path / "missing.jpg", tmp_path / "*.jpg"):
        with pytest.raises(ValueError, match="no such file"):
            find_images(str(source))
    with pytest.raises(ValueError, match="no image in this folder"):
        find_images(str(tmp_path))


def test_equal_stems_get_different_pictures():
    paths = ["x/a.jpg", "y/a.JPG", "x/a.jpeg", "x/a_2.jpg", "a.png", "a.bmp"]
    named = [os.path.basename(p) for p in name_pictures(paths, "out")]
    assert named == ["a.jpg", "a_2.jpg", "a_3.jpg", "a_2_2.jpg", "a.png", "a_2.png"]


def test_pictures_never_replace_inputs(photos):
    with pytest.raises(ValueError, match="would overwrite an input"):
        name_pictures([str(photos / "a.jpg")], str(photos))


def test_bad_files_are_reported_and_good_ones_done(photos, tmp_path):
    out = tmp_path / "deep" / "out"
    problems = predict_files(LeftHalf(), find_images(str(photos)), str(out), 0.3)
    assert len(problems) == 1 and "b.jpg" in problems[0]
    assert {p.name for p in out.iterdir()} == {"a.jpg", "a.png", "predictions.json"}
    original, drawn = (np.asarray(Image.open(f / "a.png")) for f in (photos, out))
    assert drawn.shape == original.shape
    assert (drawn[:, :20] != original[:, :20]).any()
    np.testing.assert_array_equal(drawn[:, 45:], original[:, 45:])

    results = json.loads((out / "predictions.json").read_text())
    assert [(r["image_id"], r["file_name"]) for r in results] == [
        (0, "a.jpg"),
        (1, "a.png"),
    ]
    first = results[0]
    assert (first["category_id"], first["class_name"]) == (2, "door")
    assert first["score"] == pytest.approx(0.9) and first["bbox"] == [0, 0, 30, 40]
    left = np.zeros((40, 60), bool)
    left[:, :30] = True
    assert first["segmentation"] == encode_mask(left)


def test_score_0_keeps_everything(photos, tmp_path):
    predict_files(LeftHalf(), [str(photos / "a.png")], str(tmp_path), 0.0)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [r["class_name"] for r in results] == ["door", "wall"]


def test_equal_names_in_two_folders_stay_apart(photos, tmp_path):
    other = photos / "more"
    other.mkdir()
    (other / "a.png").write_bytes((photos / "a.png").read_bytes())
    paths = [str(photos / "a.png"), str(other / "a.png")]
    predict_files(LeftHalf(), paths, str(tmp_path / "out"), 0.3)
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r["file_name"] for r in results] == ["a.png", os.path.join("more", "a.png")]
