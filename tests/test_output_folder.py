"""Users' files stay, whatever is predicted into their folder; so do results, however it ends."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.predict import output_folder
from solov2_jax.tools.predict.output_folder import (
    MANIFEST,
    PARTIAL,
    RECOVERED,
    OutputFolder,
    ResultsFile,
)
from solov2_jax.tools.predict.outputs import DetectionFilter
from solov2_jax.tools.predict.predict_files import FileOptions, predict_files
from solov2_jax.tools.predict.sources import open_sources

ALL = ("overlay", "coco", "masks", "cutouts", "yolo", "labelme")


class Halves:
    """Predicts the left and the right half of every image."""

    class_names, category_ids = ("wall", "door"), (5, 2)
    objects = 2

    def predict_images(self, images, batch_size=1):
        for image in images:
            height, width = image.shape[:2]
            masks = np.zeros((2, height, width), bool)
            masks[0, :, : width // 2] = masks[1, :, width // 2 :] = True
            half = width // 2
            boxes = np.array([[0, 0, half, height], [half, 0, width, height]], np.float32)
            scores = np.array([0.9, 0.8], np.float32)
            yield Prediction(masks, boxes, scores, np.array([1, 0]), 0).take(
                np.arange(self.objects)
            )


def predict(source, out, formats=ALL, predictor=None, **options):
    sources = open_sources(str(source), "", threads=1, limit=0, every=1)
    chosen = FileOptions(formats, DetectionFilter(0.3), **options)
    return predict_files(predictor or Halves(), sources, str(out), chosen)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (60, 40), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def contents(folder):
    """Returns what all files of a folder hold, but the manifest."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


HAND_MADE = {
    "overlay": "0.png",
    "coco": "predictions.json",
    "masks": "masks/0/000_tree.png",
    "cutouts": "cutouts/3/017_tree.png",
    "yolo": "yolo/labels/5.txt",
    "labelme": "labelme/5.json",
}


@pytest.mark.parametrize("kind", [*HAND_MADE, "classes"])
def test_files_of_the_user_are_neither_replaced_nor_deleted(photos, tmp_path, kind):
    out = tmp_path / "out"
    path = out / HAND_MADE.get(kind, "yolo/classes.txt")
    path.parent.mkdir(parents=True)
    path.write_text("by hand")
    with pytest.raises(ValueError, match=rf"{path.name}.*--overwrite"):
        predict(photos, out)
    assert contents(out) == {str(path.relative_to(out)): b"by hand"}, "nothing is written"
    predict(photos, out, overwrite=True)
    held = contents(out).get(str(path.relative_to(out)))
    assert held != b"by hand", "replaced, or deleted as a mask of another run"


def test_a_second_run_replaces_its_own_files_but_no_edited_one(photos, tmp_path):
    out = tmp_path / "out"
    predict(photos, out)
    fewer = Halves()
    fewer.objects = 1
    predict(photos, out, predictor=fewer)
    assert [p.name for p in (out / "masks" / "0").iterdir()] == ["000_door.png"]
    note = out / "masks" / "0" / "notes.txt"
    note.write_text("mine")
    label = out / "labelme" / "3.json"
    label.write_text(label.read_text() + " ")
    with pytest.raises(ValueError, match=r"3\.json: not written by this command, or changed"):
        predict(photos, out)
    predict(photos, out, formats=("masks", "yolo"))  # which touch neither
    assert note.read_text() == "mine" and label.read_text().endswith(" ")


def test_links_and_folders_in_the_way(photos, tmp_path):
    out, precious = tmp_path / "out", tmp_path / "precious.png"
    out.mkdir()
    precious.write_text("precious")
    (out / "0.png").symlink_to(precious)
    with pytest.raises(ValueError, match=r"0\.png.*--overwrite"):
        predict(photos, out)
    predict(photos, out, overwrite=True)
    assert precious.read_text() == "precious" and not (out / "0.png").is_symlink()
    (out / "1.png").unlink()
    (out / "1.png").mkdir()
    with pytest.raises(ValueError, match=r"1\.png: is a folder, and a file must go there"):
        predict(photos, out, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(photos)
    with pytest.raises(ValueError, match="would overwrite an input"):
        predict(photos, link, overwrite=True)


def test_names_that_clash_or_are_too_long_get_names_of_their_own(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["A.png", "a.png", "e\u0301.png", "\u00e9.png", "x" * 240 + ".png", "x" * 239 + "y.png"]
    for name in names:
        Image.new("RGB", (60, 40)).save(folder / name)
    summary = predict(folder, tmp_path / "out")
    assert summary.pictures == len(names) and not summary.problems
    stems = [p.stem.casefold() for p in (tmp_path / "out" / "labelme").iterdir()]
    assert len(set(stems)) == len(names)


def test_a_picture_whose_files_cannot_be_written_does_not_stop_the_others(photos, tmp_path):
    class Blocking(Halves):
        def predict_images(self, images, batch_size=1):
            path = tmp_path / "out" / "labelme" / "2.json"
            if not path.exists():
                path.mkdir(parents=True)
            return super().predict_images(images)

    summary = predict(photos, tmp_path / "out", predictor=Blocking())
    assert summary.pictures == 5 and "2.json" in summary.problems[0]
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {r["file_name"] for r in results} == {f"{i}.png" for i in range(6)}


def test_what_is_done_stays_when_the_disk_is_full(photos, tmp_path, monkeypatch):
    real, count = output_folder.atomic_path, []

    def full(path, sync=True):
        count.append(path)
        if len(count) > 9:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, sync)

    monkeypatch.setattr(output_folder, "atomic_path", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        predict(photos, out, formats=("overlay", "labelme", "coco"))
    results = json.loads((out / "predictions.json").read_text())
    done = {r["file_name"] for r in results}
    assert 1 <= len(done) < 6 and {f"{i}.png" for i in range(len(done))} == done
    assert not list(out.rglob(".writing-*")) and not (out / PARTIAL).exists()


def test_results_stay_whole_when_a_write_fails_halfway(tmp_path):
    folder = OutputFolder(tmp_path)
    with folder.opened():
        results = ResultsFile(folder)
        results.add(2, [{"image_id": 2}] * 2)
        results.add(0, [{"image_id": 0}])
        real = results._file

        class Halfway:
            def write(self, data):
                if len(data) < 50:
                    return real.write(data)
                real.write(bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "full")

            def __getattr__(self, name):
                return getattr(real, name)

        results._file = Halfway()
        with pytest.raises(OSError, match="full"):
            results.add(1, [{"image_id": 1, "more": "x" * 100}])
        results._file = real
        assert len(json.loads((tmp_path / PARTIAL).read_text())) == 3
        results.add(3, [])
        results.finish()
    ordered = json.loads((tmp_path / "predictions.json").read_text())
    assert [r["image_id"] for r in ordered] == [0, 2, 2]


def slowly(photos, out):
    class Slow(Halves):
        def predict_images(self, images, batch_size=1):
            time.sleep(1.0)  # the test must be done before the last picture is
            return super().predict_images(images)

    predict(photos, out, predictor=Slow())


@contextlib.contextmanager
def started(photos, out):
    """Yields a process that predicts, after its first picture."""
    code = f"import test_output_folder as t; t.slowly({str(photos)!r}, {str(out)!r})"
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tests, env=environment) as process:
        try:
            while not (out / PARTIAL).exists() or (out / PARTIAL).stat().st_size < 100:
                assert process.poll() is None
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_a_killed_run_keeps_its_results_and_the_next_one_cleans_up(photos, tmp_path, caplog):
    out = tmp_path / "out"
    with started(photos, out):
        with pytest.raises(ValueError, match="another prediction is writing there"):
            predict(photos, out)
    (out / "masks" / ".writing-abc").touch()
    held = json.loads((out / PARTIAL).read_text())
    assert len(held) >= 2
    predict(photos, out)
    assert "an earlier run was killed" in caplog.text
    assert json.loads((out / RECOVERED).read_text()) == held
    assert not list(out.rglob(".writing-*"))
    assert len(json.loads((out / "predictions.json").read_text())) == 12


def test_each_killed_run_keeps_its_results(tmp_path):
    for image_id in (3, 5, None):
        folder = OutputFolder(tmp_path)
        folder.check([])
        with contextlib.suppress(KeyboardInterrupt), folder.opened():
            results = ResultsFile(folder)
            results.add(image_id or 0, [{"image_id": image_id}] if image_id else [])
            results._file.close()
            killed(folder)
    with OutputFolder(tmp_path).opened():
        recovered = sorted(tmp_path.glob("predictions.*"))
    assert [p.name for p in recovered] == [RECOVERED, "predictions.recovered_2.json"]
    assert [json.loads(p.read_text())[0]["image_id"] for p in recovered] == [3, 5]


def killed(folder):
    """Ends a run without the line that says so, as a kill does."""
    folder._append = lambda entry: None
    raise KeyboardInterrupt


def test_a_kill_between_listing_and_renaming_leaves_both_files_ours(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second, killed"):
        folder = OutputFolder(tmp_path)
        with contextlib.suppress(KeyboardInterrupt), folder.opened():
            with folder.replacing(str(path)) as temporary:
                temporary.write_text(text)
                if text != "first":
                    folder.record(str(path), temporary)
                    killed(folder)
    assert path.read_text() == "first"
    OutputFolder(tmp_path).check([str(path)])
    path.write_text("edited")
    with pytest.raises(ValueError, match="a.txt: not written by this command"):
        OutputFolder(tmp_path).check([str(path)])


def test_a_line_of_the_list_that_was_cut_spoils_no_other(tmp_path):
    manifest = tmp_path / MANIFEST
    manifest.write_text('"begin"\n["a.png", 12')
    folder = OutputFolder(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), folder.opened():
        (tmp_path / ".writing-abc").touch()
        killed(folder)
    assert manifest.read_text().splitlines()[-1] == '"begin"'
    with OutputFolder(tmp_path).opened():
        assert not (tmp_path / ".writing-abc").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match="/proc/nope: this folder cannot be made"):
        with OutputFolder("/proc/nope").opened():
            pass


def test_a_list_that_cannot_grow_is_an_error(tmp_path):
    folder = OutputFolder(tmp_path)
    with folder.opened():
        real = folder._manifest

        class Short:
            def write(self, data):
                return real.write(data[:5])

            def close(self):
                real.close()

        folder._manifest = Short()
        with (
            pytest.raises(OSError, match="No space left"),
            folder.replacing(str(tmp_path / "a.txt")) as temporary,
        ):
            temporary.write_text("x")
    assert not (tmp_path / "a.txt").exists() and not list(tmp_path.glob(".writing-*"))


def test_a_terminated_run_ends_in_order(photos, tmp_path):
    out = tmp_path / "out"
    with started(photos, out) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    results = json.loads((out / "predictions.json").read_text())
    assert 2 <= len(results) and not (out / PARTIAL).exists()
    assert not list(out.rglob(".writing-*"))
    assert len(list((out / "labelme").iterdir())) * 2 == len(results)
