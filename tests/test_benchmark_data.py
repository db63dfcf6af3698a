"""The input pipeline's benchmark: both programs make the same batches; its table."""

import argparse
import json

import data
import harness
import numpy as np
import pytest
import tables
from tiny_coco import load

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # pycocotools' decode
)


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        short=[33, 40, 45], longest=64, batch=2, batches=3, results=tmp_path, soak=60
    )


def test_the_programs_make_the_same_batches(args, tmp_path):
    dataset = load(tmp_path)
    loaders = {
        name: data.make_batch_maker(data.batches_of(dataset, (33, 40, 45, 64), 2, 50, 0), name)
        for name in data.PROGRAMS
    }
    objects = 0
    for step in range(8):
        ours, plain = (loader(step) for loader in loaders.values())
        for key in plain:
            np.testing.assert_array_equal(ours[key], plain[key], err_msg=key)
        assert data.digest(ours) == data.digest(plain)
        objects += plain["valid"].sum()
    assert objects > 8
    for loader in loaders.values():
        assert set(loader.stages.seconds) == set(tables.DATA_STAGES)


def test_soak_notices_growing_memory(args, tmp_path, monkeypatch):
    dataset = load(tmp_path)
    sizes = iter(np.linspace(100, 5000, 1000))
    monkeypatch.setattr(data, "resident_mb", lambda pid: float(next(sizes)))
    with pytest.raises(SystemExit, match="memory of the reader grew"):
        data.soak(args, dataset)
    content = json.loads((tmp_path / "data_soak.json").read_text())
    assert len(content["resident_mb"]) > 10
    assert "60 batches of 2 images" in tables.data_table([content])


def measured(what, **seconds):
    """Returns a result of 100 images, the same stages for every program."""
    stages = {"decode": 0.2, "resize": 0.5, "rasterise": 0.1}
    programs = {
        name: {
            "about": {"versions": {"numpy": "2"}},
            "seconds": harness.summary([value]),
            "stages": {k: harness.summary([v]) for k, v in stages.items()},
            "peak_memory_gb": 0.25,
            "found": {"worker_peak_gb": 0.5},
        }
        for name, value in seconds.items()
    }
    pairs = {"q1": 0.4, "q3": 0.6}
    return {
        "date": "2020-01-01",
        "machine": {"cpu": "C", "cores": 2, "memory_gb": 8.0},
        "work": {"script": "data", "what": what, "label": "photos", "images": 100},
        "programs": programs,
        "ratios": {"plain": {"of_medians": 0.5, "of_pairs": pairs}},
    }


def test_the_table_tells_where_the_time_goes():
    results = [
        measured("stages", ours=0.9, plain=1.5),
        measured("pipeline", ours=1.0, plain=2.0),
    ]
    lines = tables.data_table(results).splitlines()
    assert lines[2] == (
        "| photos | ours | **100.0** | 2.00 | 5.00 | 1.00 | 2.00 | 0.25 / 0.50 |  |"
    )
    assert "| **50.0** |" in lines[3] and "| 12.00 |" in lines[3]
    assert lines[3].endswith("| **0.50** (0.40 to 0.60) |")
    assert lines[-1] == "2020-01-01: 2 cores of C, 8 GB; numpy 2; 1 runs each."
    assert "|" not in tables.data_table(results[:1])


def test_halves_of_a_soak():
    samples = [[1.0, 5.0], [3.0, 5.0], [2.0, 4.0], [2.0, 6.0]]
    assert tables.halves(samples) == [("reader", 3.0, 2.0), ("worker", 5.0, 6.0)]
