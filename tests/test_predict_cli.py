"""predict.py and evaluate.py: files in, files out, and what happens to bad ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import tiny_network
from PIL import Image

from solov2_jax.config import save_config
from solov2_jax.inference.files import find_images, name_pictures, predict_files
from solov2_jax.inference.prediction import Prediction

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
    assert first["segmentation"] == tiny_coco.encode_mask(left)


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


def command(script, *arguments, **environment):
    """Runs a script as a user does; returns (exit code, what it printed)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run with the tiny network."""
    folder = tmp_path_factory.mktemp("run")
    return tiny_network.write_workdir(folder, tiny_network.tiny_config())


def test_predict_with_a_workdir(workdir, photos, tmp_path):
    out = tmp_path / "out"
    code, text = command(
        "predict.py",
        *("--workdir", workdir, "--input", photos, "--output", out, "--score=0"),
        *("--config.test.max_per_image=3", "--config.test.update_threshold=0"),
    )
    assert code == 2, text
    # Everything but the damaged image is done, and the message says which it was.
    assert text.splitlines()[-1].startswith("error: 1 of 3 images could not be read")
    assert "b.jpg" in text.splitlines()[-1] and "Traceback" not in text
    assert text.count("compiling") == 1, "one program for two images of one size"
    results = json.loads((out / "predictions.json").read_text())
    assert {r["file_name"] for r in results} == {"a.jpg", "a.png"}
    assert 0 < len(results) <= 6
    assert {r["category_id"] for r in results} <= {5, 20}
    assert np.asarray(Image.open(out / "a.png")).shape == (40, 60, 3)


def test_predict_with_a_config_and_weights(photos, tmp_path):
    config = tiny_network.tiny_config()
    save_config(config, tmp_path / "tiny.json")
    weights = tiny_network.write_weights(tmp_path, config)
    code, text = command(
        "predict.py",
        *("--config", tmp_path / "tiny.json", "--weights", weights),
        *("--input", photos / "a.jpg", "--output", tmp_path, "--score", "0"),
    )
    assert code == 0, text
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results and {r["class_name"] for r in results} <= {"cat", "dog"}


def test_evaluate_a_workdir(workdir, tmp_path):
    images, annotations = tiny_coco.write(tmp_path)
    code, text = command(
        "evaluate.py",
        *("--workdir", workdir, f"--config.data.val.images={images}"),
        f"--config.data.val.annotations={annotations}",
    )
    assert code == 0, text
    metrics = json.loads((Path(workdir) / "eval" / "metrics.json").read_text())
    assert metrics["num_images"] == 3
    assert 0 <= metrics["segm/AP"] <= 1 and "segm/AP/dog" in metrics
    results = json.loads((Path(workdir) / "eval" / "predictions.json").read_text())
    assert len(results) == metrics["num_predictions"] > 0
    assert {r["image_id"] for r in results} <= {7, 3, 9}
    assert f"segm/AP {metrics['segm/AP']:.4f}" in text


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("predict.py", ["--workdir=x", "--input=none.jpg", "--output=o"], "none.jpg"),
        ("predict.py", ["--input=none.jpg", "--output=o"], "--config and --weights"),
        ("evaluate.py", ["--workdir=nowhere"], "has no config.json"),
    ],
)
def test_user_errors_are_one_line(script, arguments, message):
    code, text = command(script, *arguments)
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in text
