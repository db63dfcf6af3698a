"""The benchmarks' harness: protocol, statistics, refusal of recompilations; tables."""

import json
import sys
from pathlib import Path

import harness
import metric_cases
import metrics
import numpy as np
import pytest
import tables

ROOT = Path(__file__).resolve().parent.parent


def program(tmp_path, name, body):
    """Returns a program whose function `load` has the given body."""
    path = tmp_path / f"{name}.py"
    lines = "\n    ".join(body.splitlines())
    path.write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from harness import Stages, Work, serve\ncalls = []\n\n"
        f"def load():\n    {lines}\n\nserve(load)\n"
    )
    return harness.Program(name, [sys.executable, str(path)])


SLEEPS = (
    "print('a library prints')\n"
    "return Work(lambda: time.sleep({}), lambda _: {{'n': 3}}, about={{'threads': 1}})"
)


def test_programs_take_turns_and_report(tmp_path):
    log = tmp_path / "log"

    def noting(name):
        return (
            f"stages = Stages()\ndef run():\n  with open({str(log)!r}, 'a') as f:\n"
            f"    f.write({name!r})\n"
            "  stages.add('part', 0.5)\n  return 7\n"
            "return Work(run, lambda result: {'seven': result}, stages=stages)"
        )

    pair = [program(tmp_path, name, noting(name)) for name in "AB"]
    measured = harness.alternate(pair, runs=3, warmups=1)
    assert log.read_text() == "AA" + "BB" + "AB" * 3  # the first call, a warm-up, the runs
    figures = measured["programs"]["A"]
    assert figures["seconds"]["n"] == 3 and figures["found"] == {"seven": 7}
    assert figures["stages"]["part"]["median"] == 0.5, "of one run, not the sum"
    assert 0 < figures["about"]["first_call_s"] < figures["about"]["start_s"]
    assert 0 < figures["peak_memory_gb"] < 1
    assert set(measured["ratios"]) == {"B"}


def test_the_ratio_is_of_our_time_to_the_peers(tmp_path):
    pair = [
        program(tmp_path, "ours", SLEEPS.format(0.01)),
        program(tmp_path, "peer", SLEEPS.format(0.4)),
    ]
    measured = harness.alternate(pair, runs=2, warmups=0)
    assert measured["ratios"]["peer"]["of_medians"] < 0.5
    assert measured["programs"]["peer"]["found"] == {"n": 3}
    # Sleeping costs no CPU, neither one's own nor while the other runs.
    assert measured["programs"]["peer"]["cpu_seconds"]["max"] < 0.1
    assert measured["programs"]["ours"]["cpu_seconds_while_waiting"] < 0.1


def test_a_compilation_after_the_warmups_fails(tmp_path):
    body = "return Work(lambda: calls.append(1), compiles=lambda: len(calls) // 4)"
    one = [program(tmp_path, "compiles", body)]
    assert harness.alternate(one, runs=1, warmups=1)["programs"]["compiles"]["compiles"] == 0
    with pytest.raises(harness.BenchmarkError, match="compiled 1 .*in run 2"):
        harness.alternate(one, runs=2, warmups=1)


def test_a_program_that_fails_is_an_error(tmp_path):
    works = program(tmp_path, "works", SLEEPS.format(0))
    broken = program(tmp_path, "broken", "raise ValueError('no compiler')")
    with pytest.raises(harness.BenchmarkError, match="broken: ValueError: no compiler"):
        harness.alternate([works, broken], runs=1)


def test_the_allocator_setting_reaches_every_program_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    body = (
        "import os\nvalue = os.environ.get('MALLOC_ARENA_MAX')\n"
        "return Work(lambda: None, about={'value': value})"
    )
    pair = [program(tmp_path, name, body) for name in "ab"]
    for allocator, expected in (("tuned", "1"), ("default", None)):
        measured = harness.alternate(pair, runs=1, warmups=0, allocator=allocator)
        values = [p["about"]["value"] for p in measured["programs"].values()]
        assert values == [expected, expected]


def test_summary_and_ratio():
    assert harness.summary([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0, "min": 1.0, "max": 10.0, "q1": 2.0, "q3": 4.0, "n": 5,
    }  # fmt: skip
    assert harness.summary([2.0])["q3"] == 2.0
    ours = [{"seconds": s, "cpu_seconds": 2 * s} for s in (1.0, 2.0, 6.0)]
    peer = [{"seconds": s, "cpu_seconds": s} for s in (2.0, 8.0, 3.0)]
    ratio = harness.ratio(ours, peer)
    assert ratio["of_medians"] == pytest.approx(2 / 3)
    assert ratio["of_pairs"]["median"] == 0.5  # of 1/2, 1/4 and 2
    assert ratio["of_cpu_medians"] == pytest.approx(4 / 3)


def test_results_are_written_without_the_machines_name(tmp_path, capsys):
    import platform

    args = [program(tmp_path, "ours", SLEEPS.format(0))]
    options = type("Args", (), {"runs": 1, "warmups": 0, "allocator": "default"})()
    options.results = tmp_path / "results"
    harness.measure("nothing", {"size": [1, 2]}, args, options)
    text = (tmp_path / "results" / "nothing.json").read_text()
    content = json.loads(text)
    assert content["work"] == {"size": [1, 2]}
    assert content["machine"]["cores"] >= 1
    assert platform.node() not in text
    assert "ours" in capsys.readouterr().out


def result(what="network", **programs):
    """Returns a result of invented figures."""

    def figures(seconds, stages):
        found = {"cpu_seconds": harness.summary([2 * seconds]), "peak_memory_gb": 1.26}
        found["seconds"] = harness.summary([seconds, 2 * seconds, 3 * seconds])
        found["about"] = {"start_s": 9.0, "first_call_s": 4.0, "versions": {"x": "1"}}
        found["stages"] = {k: harness.summary([v]) for k, v in stages.items()}
        return found | {"found": {}}

    made = {name: figures(*value) for name, value in programs.items()}
    pairs = {"q1": 0.4, "q3": 0.6}
    return {
        "name": "n",
        "date": "2020-01-01",
        "machine": {"cpu": "C", "cores": 2, "memory_gb": 8.0},
        "work": {
            "script": "infer",
            "what": what,
            "config": "configs/r50_3x.py",
            "size": [800, 1333],
            "batch": 1,
        },
        "allocator": "tuned",
        "programs": made,
        "ratios": {"peer": {"of_medians": 0.5, "of_pairs": pairs}},
    }


def test_tables_hold_the_results(tmp_path):
    text = (
        "a\n<!-- table: infer network -->\nold\n<!-- end -->\n"
        "b\n<!-- table: infer image -->\nold\n<!-- end -->\n"
    )
    content = result(ours=(1.0, {"fpn": 0.25}), peer=(2.0, {"neck": 12.0}))
    (tmp_path / "n.json").write_text(json.dumps(content))
    made = tables.readme(text, tmp_path)
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert rows[2] == (
        "| `r50_3x` 800 x 1333, batch 1 | tuned | ours | 2.00 (1.50 to 2.50) | 2.00 "
        "| 1.3 | 4.00 |  |"
    )
    assert rows[3].endswith("| **0.50** (0.40 to 0.60) |")
    assert "| fpn | 0.250 |  |" in rows and "| neck |  | 12.0 |" in rows
    assert "2020-01-01: 2 cores of C, 8 GB; x 1; 3 runs each." in made
    assert made.count(tables.EMPTY) == 1 and "old" not in made
    assert tables.readme(made, tmp_path) == made


@pytest.mark.parametrize("path", [tables.README, tables.SCALING], ids=lambda path: path.name)
def test_documents_are_what_the_results_say(path):
    document = tables.readme if path == tables.README else tables.scaling_document
    text = path.read_text()
    assert document(text, tables.RESULTS) == text, "run `python benchmarks/tables.py`"


def test_programs_must_have_done_the_same_work():
    def found(**values):
        return {"found": values}

    programs = {
        "ours": found(n=[100], loss=1.0, classes=[[1, 2, 2, 3]]),
        "peer": found(n=[100], loss=1.01, classes=[[2, 3, 2, 5]]),
    }
    assert not harness.differences(programs, {"n": 0, "loss": 0.02, "classes": 0.25})
    assert len(harness.differences(programs, {"loss": 0.001, "classes": 0.1})) == 2
    programs["peer"]["found"]["n"] = [100, 3]
    assert "n: [100] of ours" in harness.differences(programs, {"n": 1.0})[0]


def test_accuracy_at_equal_steps_and_at_equal_time(tmp_path):
    import accuracy

    def curve(*points):
        keys = ("step", "seconds", "AP", "AP50", "memory_gb")
        return {"steps": 4, "curve": [dict(zip(keys, (*p, 0.5, 2.0), strict=True)) for p in points]}

    slow = {str(s): curve((2, 60, 0.1 + s / 10), (4, 120, 0.3)) for s in range(2)}
    fast = {str(s): curve((2, 30, 0.2), (4, 66, 0.25)) for s in range(3)}
    table = accuracy.accuracy_table({"rows": {"x": {"solov2_jax": fast, "mmdetection": slow}}})
    ours, peer = table.splitlines()[2:]
    assert ours.startswith("| x | solov2_jax | 2 | 4 | 0.2500 ± 0.0000 |")
    assert "| 0.3000 ± 0.0000 |" in peer and "| 0.1500 ± 0.0707 |" in peer and "| 2.0 ± " in peer
    assert accuracy.at_time(fast["0"]["curve"], 10) == 0.0


def test_predictions_are_compared_by_pycocotools(tmp_path):
    import accuracy
    from tiny_coco import content, encode_mask, write

    _, truth = write(tmp_path)
    found = []
    for record in content()["annotations"]:
        x, y, w, h = record["bbox"]
        size = {7: (48, 64), 3: (64, 48)}[record["image_id"]]
        mask = np.zeros(size, bool)
        mask[y : y + h, x : x + w] = True
        keys = {k: record[k] for k in ("image_id", "category_id")}
        found.append({**keys, "score": 0.9, "segmentation": encode_mask(mask)})
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(found))
    assert accuracy.average_precision(truth, path)["AP"] == pytest.approx(1.0)
    path.write_text("[]")
    assert accuracy.average_precision(truth, path) == {"AP": 0.0, "AP50": 0.0}


def test_metrics_are_compared_and_stand_in_the_results():
    row = metrics.row(
        "public", lambda: {"AP": 0.25, "APs": float("nan"), "AP50": 0.5}, lambda: {"AP": 0.25}
    )
    assert (row["AP"], row["compared"], row["difference"]) == (0.25, 1, 0)
    undefined = metrics.row(
        "public", lambda: {"AP": 0.25, "APs": float("nan")}, lambda: {"AP": 0.5, "APs": -1}
    )
    assert (undefined["compared"], undefined["difference"]) == (2, 0.25)
    assert metrics.difference(0.5, None) == metrics.difference(float("nan"), 0.1) == float("inf")
    about = {"date": "2026-01-01", "machine": {"cores": 2, "cpu": "a CPU"}}
    counts = {"images": 3, "objects": 4, "predictions": 5}
    content = {**about, **counts, "rows": {"coco": row, "lvis": undefined}}
    lines = tables.metrics_table(content).splitlines()
    assert lines[2].startswith("| coco | public | 1 | 0.2500 | 0 |")
    assert lines[3].startswith("| lvis | public | 2 | 0.2500 | 2.5e-01 |")
    assert "3 images, 4 objects, 5 predictions" in lines[-1]


def test_a_file_of_predictions_is_scored_by_both_programs(tmp_path):
    content, results = metric_cases.instances_case(3)
    for name, value in (("a", content), ("p", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    # Of the public programs, pycocotools is here.
    pairs = metrics.pairs(content, results, None, tmp_path)
    name, ours, theirs = next(pairs)
    row = metrics.row(metrics.PUBLIC[name], ours, theirs)
    assert (name, row["compared"], row["difference"]) == ("coco", 12, 0)
    name, ours, _ = next(pairs)
    assert name == "lvis" and "segm/APr" in ours()
    for category, other in zip(content["categories"], ("person", "car", "dog"), strict=False):
        category["name"] = other
    truth, found = metric_cases.write_as_cityscapes(content, results, tmp_path)
    figures = metrics.score(str(truth), str(found), "cityscapes")()
    assert 0 < figures["segm/AP50"] < 1 and not np.isnan(figures["segm/AP/person"])


def test_the_first_photographs_are_those_without_crowds_and_specks(tmp_path):
    import accuracy

    sizes = {3: (0.2, 0), 1: (0.5, 0), 4: (0.5, 1), 5: (0.001, 0), 2: (0.3, 0)}
    images = [{"id": i, "height": 10, "width": 10} for i in (*sizes, 6)]
    objects = [
        {"id": i, "image_id": i, "area": 100 * share, "iscrowd": crowd}
        for i, (share, crowd) in sizes.items()
    ]
    path, found = tmp_path / "all.json", tmp_path / "first.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": []}))
    accuracy.write_first(str(path), 2, found)
    content = json.loads(found.read_text())
    assert [[x["id"] for x in content[k]] for k in ("images", "annotations")] == [[1, 2], [1, 2]]
    with pytest.raises(SystemExit, match="has 3 such images, --first wants 4"):
        accuracy.write_first(str(path), 4, found)
    with pytest.raises(SystemExit, match="data.train.annotations is '', no json file"):
        accuracy.write_first("", 2, found)
