"""predict.py and evaluate.py: files in, files out, and what happens to bad ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
import tiny_network
from PIL import Image

from solov2_jax.config import save_config
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.cli.predict import EarlySignal
from solov2_jax.tools.predict import predict_files as files
from solov2_jax.tools.predict.output_folder import MANIFEST
from solov2_jax.tools.predict.outputs import DetectionFilter
from solov2_jax.tools.predict.predict_files import FileOptions, predict_files
from solov2_jax.tools.predict.sources import open_sources, shapes_of, sizes_of
from solov2_jax.tools.predict.video import VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parent.parent


class LeftHalf:
    """Predicts the left half of every image twice, with scores 0.9 and 0.2."""

    class_names = ("wall", "door")
    category_ids = (5, 2)

    def predict_images(self, images, batch_size=1):
        for image in images:
            height, width = image.shape[:2]
            masks = np.zeros((2, height, width), bool)
            masks[:, :, : width // 2] = True
            boxes = np.array([[0, 0, width // 2, height]] * 2, np.float32)
            scores = np.array([0.9, 0.2], np.float32)
            yield Prediction(masks, boxes, scores, np.array([1, 0]), 0)


def predict(source, out, score=0.3, formats=("overlay", "coco"), **options):
    """Predicts what `--input` would name; returns the summary."""
    sources = open_sources(str(source), "", threads=2, limit=0, every=1)
    chosen = FileOptions(formats, DetectionFilter(score), **options)
    return predict_files(LeftHalf(), sources, str(out), chosen)


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


@pytest.fixture
def clip(tmp_path):
    """A video of 12 frames, 41 x 60 pixels, a bright square moving right."""
    writer = VideoWriter(str(tmp_path / "clip"), 10.0)
    for i in range(12):
        image = np.full((41, 60, 3), 40, np.uint8)
        image[10:20, 3 * i : 3 * i + 10] = 220
        writer.write(image)
    return writer.close()


def test_bad_files_are_reported_and_good_ones_done(photos, tmp_path):
    out = tmp_path / "deep" / "out"
    summary = predict(photos, out)
    assert len(summary.problems) == 1 and "b.jpg" in summary.problems[0]
    written = {"a.jpg", "a_2.png", "predictions.json", MANIFEST}
    assert {p.name for p in out.iterdir()} == written
    original, drawn = (Image.open(f) for f in (photos / "a.png", out / "a_2.png"))
    original, drawn = np.asarray(original), np.asarray(drawn)
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
    predict(photos / "a.png", tmp_path, score=0.0)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [r["class_name"] for r in results] == ["door", "wall"]


def test_equal_names_in_two_folders_stay_apart(photos, tmp_path):
    other = photos / "more"
    other.mkdir()
    (other / "a.png").write_bytes((photos / "a.png").read_bytes())
    predict(photos / "**" / "*.png", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r["file_name"] for r in results] == ["a.png", os.path.join("more", "a.png")]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"a.png", "a_2.png"}


def test_inputs_are_never_replaced_and_a_file_is_no_folder(photos, clip):
    with pytest.raises(ValueError, match="would overwrite an input"):
        predict(photos / "a.jpg", photos)
    with pytest.raises(ValueError, match="would overwrite an input"):
        predict(clip, os.path.dirname(clip))
    with pytest.raises(ValueError, match="notes.txt: is a file; give a folder"):
        predict(photos / "a.jpg", photos / "notes.txt")


def test_nothing_written_is_an_error(photos, tmp_path):
    summary = predict(photos / "b.jpg", tmp_path / "out")
    with pytest.raises(ValueError, match="nothing was written to there: .*b.jpg"):
        summary.report("there")
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_a_video_in_a_video_out_with_tracks(clip, tmp_path):
    out = tmp_path / "deep" / "out"
    formats = ("overlay", "coco")
    summary = predict(clip, out, formats=formats, color_by="track", labels=False, track=True)
    (path,) = summary.videos
    assert path == str(out / "clip.mp4") and summary.pictures == 12
    reader = VideoReader(path)
    frames = [image for image, _ in reader.frames()]
    assert (len(frames), reader.fps, frames[0].shape) == (12, 10, (42, 60, 3))
    # The left half is tinted, the right one as it was but for the codec.
    assert np.ptp(frames[0][2:39, 4:26].astype(int).mean((0, 1))) > 30
    assert abs(frames[0][2:39, 34:].astype(int) - 40).max() < 12
    results = json.loads((out / "predictions.json").read_text())
    assert [r["frame"] for r in results] == [r["image_id"] for r in results]
    assert {(r["track_id"], r["file_name"]) for r in results} == {(0, "clip.mp4")}
    assert [r["time"] for r in results] == pytest.approx(np.arange(12) / 10)
    assert [p.name for p in out.glob(".*")] == [MANIFEST], "no temporary files are left"


def test_frames_for_labels_of_a_video(clip, tmp_path):
    sources = open_sources(clip, "", threads=2, limit=2, every=5)
    options = FileOptions(("labelme",), DetectionFilter(0.3))
    predict_files(LeftHalf(), sources, str(tmp_path / "out"), options)
    names = sorted(p.name for p in (tmp_path / "out" / "labelme").iterdir())
    assert names == ["clip_000000.json", "clip_000005.json"]
    content = json.loads((tmp_path / "out" / "labelme" / names[1]).read_text())
    image = tmp_path / "out" / "labelme" / content["imagePath"]
    assert np.asarray(Image.open(image)).shape == (42, 60, 3)  # sides are even
    assert abs(np.asarray(Image.open(image))[15, 20].astype(int) - 220).max() < 25


def test_ctrl_c_finishes_what_was_read(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    for i in range(40):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")

    class Interrupted(LeftHalf):
        seen = 0

        def predict_images(self, images, batch_size=1):
            self.seen += 1
            if self.seen == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().predict_images(images)

    sources = open_sources(str(tmp_path), "", threads=2, limit=0, every=1)
    options = FileOptions(("coco",), DetectionFilter(0.3))
    before = signal.getsignal(signal.SIGINT)
    summary = predict_files(Interrupted(), sources, str(tmp_path / "out"), options)
    assert signal.getsignal(signal.SIGINT) == before
    assert summary.stopped and 3 <= summary.pictures < 40
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r["image_id"] for r in results] == list(range(summary.pictures))


def test_pictures_and_objects_are_counted(monkeypatch, caplog):
    caplog.set_level("INFO", "solov2_jax")
    monkeypatch.setattr(files, "PROGRESS_EVERY", 0.0)
    with files.ProgressReport(3) as report:
        for objects in (1, 2, 3):
            report.count(objects)
    assert "predicting: 3 of 3 pictures, about 0 s left, 6 objects" in caplog.text


def test_few_shapes_for_many_images(tmp_path):
    sizes = [(40, 60), (60, 40), (40, 61), (64, 48), (30, 90)]
    for i, (height, width) in enumerate(sizes):
        pixels = np.zeros((height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").touch()
    sources = open_sources(str(tmp_path), "", threads=1, limit=0, every=1)

    def padded_shape(height, width):
        return -(-height // 32) * 32, -(-width // 32) * 32

    few = shapes_of(sizes_of(sources), padded_shape, 2)
    assert len(few) == 2
    for height, width in sizes:
        assert any(h >= height and w >= width for h, w in few)
    assert len(shapes_of(sizes_of(sources), padded_shape, 1)) == 1


def test_options_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="--batch_size 0"):
        FileOptions(("coco",), DetectionFilter(0.3), batch_size=0)
    with pytest.raises(ValueError, match="needs --track"):
        FileOptions(("coco",), DetectionFilter(0.3), color_by="track")


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
        "--workdir",
        workdir,
        "--input",
        photos,
        "--output",
        out,
        "--score=0",
        "--batch_size=2",
        "--shapes=1",
        "--config.test.max_per_image=3",
        "--config.test.update_threshold=0",
    )
    assert code == 1, text
    # Everything but the damaged image is done, and the message says which it was.
    assert text.splitlines()[-1].startswith("error: 1 of 3 pictures could not be read or w")
    assert "b.jpg" in text.splitlines()[-1] and "Traceback" not in text
    assert text.count("compiling for") == 1, "one program for two images of one size"
    results = json.loads((out / "predictions.json").read_text())
    assert {r["file_name"] for r in results} == {"a.jpg", "a.png"}
    assert 0 < len(results) <= 6
    assert {r["category_id"] for r in results} <= {5, 20}
    assert np.asarray(Image.open(out / "a_2.png")).shape == (40, 60, 3)
    assert "objects may be missing: an image reaches test.max_per_image (3)" in text
    assert re.search(r"device busy \d+ % of [\d.]+ s \(plus ", text)


def test_the_limit_of_pixels_is_a_flag(workdir, photos, tmp_path):
    given = ("--workdir", workdir, "--input", photos / "a.png", "--score=0")
    code, text = command("predict.py", *given, "--output", tmp_path / "few", "--max_pixels=1000")
    assert code == 2 and "more than 1000 pixels" in text, text
    assert "--max_pixels" in text.splitlines()[-1] and "Traceback" not in text
    flags = ("--max_pixels=2400", "--tile=48", "--output", tmp_path / "all")
    code, text = command("predict.py", *given, *flags)
    assert code == 0 and "1 pictures" in text, text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("early", [True, False])
def test_the_exit_code_names_the_signal(workdir, tmp_path, number, early):
    for i in range(600):
        Image.new("RGB", (60, 40), (i % 255, 0, 0)).save(tmp_path / f"{i:03}.png")
    out = tmp_path / "out"
    flags = [f"--workdir={workdir}", f"--input={tmp_path}", f"--output={out}", "--score=0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "predict.py"), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = next(line for line in process.stdout if "weights of step" in line)
        while not early and not (out / "000.png").exists():
            assert process.poll() is None, first
            time.sleep(0.01)
        process.send_signal(number)
        text = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + number, text
    assert "Traceback" not in text
    assert not list(out.rglob(".writing-*"))
    if not early:
        results = json.loads((out / "predictions.json").read_text())
        assert 0 < len({r["image_id"] for r in results}) < 600


def test_a_signal_whose_exception_is_lost_is_not():
    early = EarlySignal()
    early.check()
    with pytest.raises(SystemExit, match="143"):
        early(signal.SIGTERM, None)
    with pytest.raises(SystemExit, match="143"):
        early.check()


def test_a_full_disk_while_a_video_is_written_costs_the_video_alone(tmp_path):
    """The system refuses to write a file beyond a size, as a full disk would."""
    noise = np.random.default_rng(0)
    writer = VideoWriter(str(tmp_path / "clip"), 10.0)
    for _ in range(60):
        writer.write(noise.integers(0, 255, (96, 128, 3), dtype=np.uint8))
    code = f"""
import resource, test_predict_cli as t
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
t.predict({writer.close()!r}, {str(tmp_path / "out")!r})
"""
    tests = Path(__file__).resolve().parent
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
    )
    assert f"cannot be written: File too large: '{tmp_path}/out/clip.mp4'" in found.stderr
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MANIFEST, "predictions.json"]


def test_a_mistyped_class_names_the_nearest(workdir, photos, tmp_path):
    code, text = command(
        "predict.py",
        "--workdir",
        workdir,
        "--input",
        photos / "a.png",
        "--output",
        tmp_path,
        "--classes=cat,dgo",
    )
    assert code == 2
    assert text.splitlines()[-1].startswith(
        "error: --classes dgo: no such class; did you mean dog?"
    )


def test_predict_with_a_config_and_weights(photos, tmp_path):
    config = tiny_network.tiny_config()
    save_config(config, tmp_path / "tiny.json")
    weights = tiny_network.write_weights(tmp_path, config)
    code, text = command(
        "predict.py",
        "--config",
        tmp_path / "tiny.json",
        "--weights",
        weights,
        "--input",
        photos / "a.jpg",
        "--output",
        tmp_path,
        "--score",
        "0",
    )
    assert code == 0, text
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results and {r["class_name"] for r in results} <= {"cat", "dog"}


def test_evaluate_a_workdir(workdir, tmp_path):
    images, annotations = tiny_coco.write(tmp_path)
    code, text = command(
        "evaluate.py",
        "--workdir",
        workdir,
        f"--config.data.val.images={images}",
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
    # Limits within the network are told by it, that of detections once for all images.
    assert "an image reaches test.nms_pre (20)" in text
    assert "an image reaches test.max_per_image" not in text
    assert "images have 10 detections, as many as are kept" in text


GIVEN = ("--workdir=nowhere", "--output=o")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("predict.py", ["--workdir=x", "--input=none.jpg", "--output=o"], "none.jpg"),
        ("predict.py", ["--workdir=x", "--input=", "--output=o"], "--input is empty"),
        ("predict.py", ["--input=none.jpg", "--output=o"], "--config and --weights"),
        ("predict.py", [*GIVEN, "--input=README.md", "--write=svg"], "--write svg: "),
        ("predict.py", [*GIVEN, "--input=camera:97"], "camera:97: no such camera"),
        ("predict.py", [*GIVEN, "--input=README.md"], "has no config.json"),
        ("evaluate.py", ["--workdir=nowhere"], "has no config.json"),
    ],
)
def test_user_errors_are_one_line(script, arguments, message):
    code, text = command(script, *arguments)
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in text
