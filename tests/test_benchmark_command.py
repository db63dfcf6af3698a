"""`solov2 benchmark`: what is measured, written and refused."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from PIL import Image

from solov2_jax.inference.predictor import Predictor
from solov2_jax.io import InputError
from solov2_jax.tools import benchmark
from solov2_jax.tools.benchmark import PARTS, Benchmark, Measurement, measure
from solov2_jax.tools.cli import benchmark as command
from solov2_jax.tools.cli import flags


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Path(tiny_network.write_workdir(folder, tiny_network.tiny_config()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(60, 40), (60, 40), (60, 40)]):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def run(*words):
    for flag in command.FLAGS:
        flag.value, flag.present = flag.default, False
    overrides = flags.parse(command.FLAGS, list(words))
    command.main(overrides)


def test_the_table_and_both_files(workdir, photos, capsys):
    options = ("--config.test.update_threshold=0", "--config.input.buckets_test=((64,64),)")
    run(f"--workdir={workdir}", f"--input={photos}", "--batch_sizes=1,2", "--rounds=4", *options)
    printed = capsys.readouterr().out
    content = json.loads((workdir / "benchmark" / "benchmark.json").read_text())
    rows = content["rows"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        assert row["shape"] == [64, 64] and row["images"] == 3 and row["compiled"] == 0
        assert row["detections"] == 10  # test.max_per_image
        assert set(row["seconds"]) == set(PARTS) == set(row["median_ms_per_image"])
        for part in PARTS:
            assert len(row["seconds"][part]) == 4
            own = 1000 * np.median(row["seconds"][part]) / row["batch_size"]
            assert row["median_ms_per_image"][part] == pytest.approx(own, abs=1e-3)
        # The sum is of the same rounds, and the parts that it has take time.
        summed = ("load", "decode", "resize", "predict", "paste")
        for i, total in enumerate(row["seconds"]["total"]):
            assert total == pytest.approx(sum(row["seconds"][p][i] for p in summed))
        assert min(row["seconds"]["network"]) > 0 and min(row["seconds"]["paste"]) > 0
    assert content["conditions"]["device"] and content["conditions"]["packages"]["jax"]
    text = (workdir / "benchmark" / "benchmark.md").read_text()
    assert text.strip() in printed and "step " in text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4


def test_time_is_booked_where_it_is_spent(workdir, photos, monkeypatch):
    predictor = Predictor.from_workdir(workdir)
    paste = Predictor.paste

    def slow(*given):
        time.sleep(0.05)
        return paste(*given)

    monkeypatch.setattr(predictor, "paste", slow)
    (row,) = measure(predictor, [str(photos / "0.png")], batch_size=2, rounds=3, warm_up=1)
    assert min(row.seconds["paste"]) > 0.1 and row.median("paste") > 50
    assert row.median("decode") < 40


def test_a_compilation_in_a_counted_round_is_told():
    seconds = {part: [0.1, 0.3, 0.2] for part in PARTS}
    row = Measurement((64, 96), 2, 3, 7.0, 1, seconds)
    assert row.median("total") == pytest.approx(100)
    about = {"device": "x", "platform": "cpu", "cpu_cores": 2, "load_average": 0.1, "python": "3"}
    about |= {"dtype": "float32", "matmul_precision": "default", "packages": {"jax": "1"}}
    text = Benchmark("run", [row], about).markdown()
    assert "| 64x96 | 2 |" in text and "10.00 | 7 |" in text
    assert "compiled in counted rounds" in text


def test_sizes_keep_the_proportion(workdir):
    options = Predictor.from_workdir(workdir).input
    assert benchmark.size_overrides(96, options)[:2] == [
        "--config.input.min_size_test=96",
        "--config.input.max_size_test=128",
    ]


def test_what_is_wrong_is_said_before_anything_is_loaded(workdir, photos, tmp_path):
    with pytest.raises(InputError, match="--weights needs --input"):
        run("--config=quickstart", "--weights=x.npz")
    with pytest.raises(InputError, match="give either --workdir"):
        run(f"--input={photos}")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        run(f"--workdir={workdir}", f"--output={tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no images"):
        run(f"--workdir={workdir}", f"--input={tmp_path / 'empty'}")
    with pytest.raises(InputError, match="no such folder"):
        run(f"--workdir={workdir}", f"--input={tmp_path / 'none'}")
    words = [f"--workdir={workdir}", f"--input={tmp_path / 'empty'}", f"--output={tmp_path}/new"]
    with pytest.raises(InputError, match="has no images"):
        run(*words)
    with pytest.raises(InputError, match="this folder cannot be made"):
        run(*words[:2], f"--output={tmp_path / 'file' / 'x'}")
    assert not (tmp_path / "new").exists()
    for words in (["--batch_sizes=0"], ["--sizes=big"], ["--rounds=1"]):
        with pytest.raises(InputError, match="must"):
            run(f"--workdir={workdir}", *words)
