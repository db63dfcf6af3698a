"""predict.py as several processes: the files of one, an error told once, nothing lost."""

import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import predict_part
import pytest
import tiny_network
from PIL import Image
from test_output_folder import contents
from test_processes import finish, start

from solov2_jax.tools.predict.dealing import deal
from solov2_jax.tools.predict.output_folder import LOCK, MANIFEST, OutputFolder

ROOT = Path(__file__).resolve().parent.parent
COMMAND = SimpleNamespace(__file__=str(ROOT / "predict.py"))


def write_photos(folder, number):
    """Writes pictures of two shapes, one in three upright, and a damaged one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        height, width = (60, 40) if i % 3 == 0 else (40, 60)
        coarse = rng.integers(0, 255, (height // 10, width // 10, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{i:02d}.png")
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:60])
    return folder


def predict_halves(photos, out, *arguments, **options):
    """Returns [(exit code, output)] of the processes."""
    given = (f"--input={photos}", f"--out={out}", *arguments)
    return finish(start(predict_part, *given, devices=1, **options))


def errors(results):
    """Returns the lines by which the processes ended, and checks that they ended with 2."""
    assert [code for code, _ in results] == [2] * len(results), results
    return [line for _, text in results for line in text.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 11)


def test_the_command_writes_what_one_process_does(photos, tmp_path):
    run = tiny_network.write_workdir(tmp_path / "run", tiny_network.tiny_config())
    given = [f"--workdir={run}", f"--input={photos}", "--write=overlay,coco,yolo", "--score=0.1"]
    outputs = {}
    for name, count in (("one", 1), ("two", 2)):
        results = finish(
            start(COMMAND, *given, f"--output={tmp_path / name}", count=count, devices=1)
        )
        assert [code for code, _ in results] == [1] * count, results
        text = outputs[name] = "".join(text for _, text in results)
        assert len(re.findall("^error: .*broken.png", text, re.MULTILINE)) == 1, "told once"
        assert text.count("prediction on 1 device(s): cpu") == 1
    (said,) = re.findall(r"11 pictures, \d+ objects", outputs["one"])
    assert said in outputs["two"] and "2 devices (cpu)" in outputs["two"]
    one, two = (contents(tmp_path / name) for name in outputs)
    assert {LOCK} >= set(one) ^ set(two)
    assert json.loads(one["predictions.json"]), "there is something to compare"
    assert {n: x for n, x in one.items() if x != two[n]} == {}, "to the bit"


def test_files_about_all_pictures_are_joined_and_a_run_may_follow(photos, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    ((code, output),) = predict_halves(photos, one, count=1)
    assert code == 0 and "done: 11 pictures, 22 objects" in output
    for _ in range(2):  # into the folder of a run of two
        results = predict_halves(photos, two)
        for code, text in results:
            assert code == 0, text
            assert "done: 11 pictures, 22 objects" in text and "broken.png" in text
        seen = [text.count("a picture") for _, text in results]
        assert sum(seen) == 11 and min(seen) >= 5
        assert contents(two) == contents(one)
    ((code, output),) = predict_halves(photos, two, count=1)
    assert code == 0 and "killed" not in output
    assert not list(two.glob(".solov2_files.process*"))


def test_what_is_wrong_is_told_once(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text("mine")
    (line,) = errors(predict_halves(photos, out))
    assert "predictions.json: not written by this command" in line
    assert [p.name for p in out.iterdir()] == ["predictions.json"]
    (line,) = errors(predict_halves("camera:0", tmp_path / "live"))
    assert "--input camera:0: " in line and "cannot be dealt over 2 processes" in line


def test_a_full_disk_at_one_ends_both_and_keeps_what_was_done(photos, tmp_path):
    results = predict_halves(photos, tmp_path, last=("--fail_at=2",))
    (line,) = errors(results)
    assert "error: process 1 of 2: [Errno 28] No space left on device" in line
    done = sum(text.count("a picture") for _, text in results)
    found = json.loads((tmp_path / "predictions.json").read_text())
    ids = [r["image_id"] for r in found]
    assert ids == sorted(ids) and 2 < len(set(ids)) <= done
    assert not list(tmp_path.glob("*partial*"))


def test_a_signal_at_one_ends_both(photos, tmp_path):
    given = (f"--input={photos}", f"--out={tmp_path}", "--seconds=0.5")
    started = start(predict_part, *given, devices=1)
    while "a picture" not in started[1].stdout.readline():
        assert started[1].poll() is None
    started[1].send_signal(signal.SIGTERM)
    for code, text in finish(started):
        assert code == 0 and f"stopped {signal.SIGTERM}" in text, text
    assert not list(tmp_path.glob("*partial*"))


def test_a_killed_process_loses_nothing(photos, tmp_path):
    given = (f"--input={photos}", f"--out={tmp_path}", "--seconds=0.5")
    started = start(predict_part, *given, devices=1)
    partial = tmp_path / "predictions.partial.process_1.json"
    while not (partial.is_file() and b"score" in partial.read_bytes()):
        assert started[1].poll() is None
        time.sleep(0.02)
    started[1].kill()
    (code, _), (killed, _) = finish(started)
    assert code != 0 and killed == -signal.SIGKILL
    ((code, output),) = predict_halves(photos, tmp_path, count=1)
    assert code == 0 and "an earlier run was killed" in output
    kept = [json.loads(p.read_text()) for p in tmp_path.glob("predictions.recovered*.json")]
    assert kept and all(kept)
    assert not list(tmp_path.glob("*partial*"))
    assert not list(tmp_path.glob(".solov2_files.process*"))


# Without processes


def test_pictures_are_dealt_by_shape_and_size():
    wide, tall = (64, 96), (96, 64)
    shapes = [wide, tall, wide, None, wide, tall, wide, tall]
    first, second = deal(shapes, 2)
    assert first == [0, 2, 3, 4] and second == [1, 5, 6, 7]
    assert deal(shapes, 1) == [list(range(8))]
    # One of four times the pixels is as much as four others.
    assert deal([(64, 64)] * 4 + [(128, 128)], 2) == [[0, 1, 2, 3], [4]]
    assert deal([None] * 5, 2) == [[0, 1], [2, 3, 4]]
    for count in (3, 20):
        dealt = deal(shapes, count)
        assert len(dealt) == count and sorted(sum(dealt, [])) == list(range(8))
    assert deal([], 3) == [[], [], []]


def test_lists_of_other_processes_are_read_and_taken_over(tmp_path):
    first, second = (OutputFolder(tmp_path, rank=(i, 2)) for i in range(2))
    with first.opened():
        with second.opened(), second.replacing(str(tmp_path / "a.txt")) as temporary:
            temporary.write_text("a")
        assert OutputFolder(tmp_path).is_ours(str(tmp_path / "b.txt"))
        first.take_over_lists()
    assert {p.name for p in tmp_path.iterdir()} - {LOCK} == {MANIFEST, "a.txt"}
    OutputFolder(tmp_path).check([str(tmp_path / "a.txt")])
