"""The benchmarks' harness: protocol, statistics, refusal of recompilations."""

import json
import sys
from pathlib import Path

import harness
import pytest
import report
import tables

ROOT = Path(__file__).resolve().parent.parent


def program(tmp_path, name, body, optional=False):
    """Returns a worker whose function `load` has the given body."""
    path = tmp_path / f"{name}.py"
    lines = "\n    ".join(body.splitlines())
    path.write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"import worker\ncalls = []\n\ndef load():\n    {lines}\n\nworker.serve(load)\n"
    )
    return harness.Program(name, [sys.executable, str(path)], optional=optional)


SLEEPS = (
    "print('a library prints')\n"
    "return worker.Work(lambda: time.sleep({}), {{'threads': 1}}, "
    "found=lambda: {{'n': 3}})"
)


def test_programs_take_turns_and_report(tmp_path):
    log = tmp_path / "log"

    def noting(name):
        return (
            f"def run():\n  with open({str(log)!r}, 'a') as f: f.write({name!r})\n"
            "  return {'part': 0.5}\nreturn worker.Work(run, {'threads': 2})"
        )

    pair = [program(tmp_path, name, noting(name)) for name in "AB"]
    found = harness.alternate(pair, runs=3, warmups=1)
    assert log.read_text() == "AB" + "AB" * 3
    figures = found["programs"]["A"]
    assert figures["about"]["threads"] == 2
    assert figures["seconds"]["n"] == 3
    assert figures["stages"]["part"]["median"] == 0.5
    assert 0 < figures["peak_memory_gb"] < 1
    assert set(found["ratios"]) == {"B"}


def test_the_ratio_is_of_our_time_to_the_peers(tmp_path):
    pair = [
        program(tmp_path, "ours", SLEEPS.format(0.01)),
        program(tmp_path, "peer", SLEEPS.format(0.2)),
    ]
    found = harness.alternate(pair, runs=2, warmups=0)
    assert found["ratios"]["peer"]["of_medians"] < 0.5
    assert found["programs"]["peer"]["found"] == {"n": 3}
    # Sleeping costs no CPU, neither one's own nor while the other runs.
    assert found["programs"]["peer"]["cpu_seconds"]["max"] < 0.1
    assert found["programs"]["ours"]["cpu_seconds_while_waiting"] < 0.1


def test_a_compilation_after_the_warmups_fails(tmp_path):
    body = "return worker.Work(lambda: calls.append(1), {}, compiles=lambda: len(calls) // 3)"
    one = [program(tmp_path, "compiles", body)]
    assert harness.alternate(one, runs=1, warmups=1)["failed"] == {}
    with pytest.raises(harness.BenchmarkError, match="compiled 1 .*in run 2"):
        harness.alternate(one, runs=2, warmups=1)


def test_a_program_that_fails_is_an_error_unless_optional(tmp_path):
    works = program(tmp_path, "works", SLEEPS.format(0))
    body = "raise ValueError('no compiler')"
    with pytest.raises(harness.BenchmarkError, match="broken: ValueError: no compiler"):
        harness.alternate([works, program(tmp_path, "broken", body)], runs=1)
    broken = program(tmp_path, "broken", body, optional=True)
    found = harness.alternate([works, broken], runs=1)
    assert "no compiler" in found["failed"]["broken"]
    assert list(found["programs"]) == ["works"]


def test_the_allocator_setting_reaches_every_program_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    body = (
        "import os\nseen = os.environ.get('MALLOC_ARENA_MAX')\n"
        "return worker.Work(lambda: None, {'seen': seen})"
    )
    pair = [program(tmp_path, name, body) for name in "ab"]
    for allocator, expected in (("tuned", "1"), ("default", None)):
        found = harness.alternate(pair, runs=1, warmups=0, allocator=allocator)
        seen = [p["about"]["seen"] for p in found["programs"].values()]
        assert seen == [expected, expected]


def test_summary_and_ratio():
    assert report.summary([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0, "min": 1.0, "max": 10.0, "q1": 2.0, "q3": 4.0, "n": 5,
    }  # fmt: skip
    assert report.summary([2.0])["q3"] == 2.0
    ours = [{"seconds": s, "cpu_seconds": 2 * s} for s in (1.0, 2.0, 6.0)]
    peer = [{"seconds": s, "cpu_seconds": s} for s in (2.0, 8.0, 3.0)]
    found = report.ratio(ours, peer)
    assert found["of_medians"] == pytest.approx(2 / 3)
    assert found["of_pairs"]["median"] == 0.5  # of 1/2, 1/4 and 2
    assert found["of_cpu_medians"] == pytest.approx(4 / 3)


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
        found = {"cpu_seconds": report.summary([2 * seconds]), "peak_memory_gb": 1.26}
        found["seconds"] = report.summary([seconds, 2 * seconds, 3 * seconds])
        found["about"] = {"start_s": 9.0, "first_call_s": 4.0, "versions": {"x": "1"}}
        found["stages"] = {k: report.summary([v]) for k, v in stages.items()}
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
        "failed": {"broken": "no | compiler"},
    }


def test_tables_hold_the_results():
    text = (
        "a\n<!-- table: infer network -->\nold\n<!-- end -->\n"
        "b\n<!-- table: infer image -->\nold\n<!-- end -->\n"
    )
    made = tables.render(text, [result(ours=(1.0, {"fpn": 0.25}), peer=(2.0, {"neck": 12.0}))])
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert rows[2] == (
        "| `r50_3x` 800 x 1333, batch 1 | tuned | ours | 2.00 (1.50 to 2.50) | 2.00 "
        "| 1.3 | 4.00 |  |"
    )
    assert rows[3].endswith("| **0.50** (0.40 to 0.60) |")
    assert "does not run: no / compiler" in rows[4]
    assert "| fpn | 0.250 |  |" in rows and "| neck |  | 12.0 |" in rows
    assert "2020-01-01: 2 cores of C, 8 GB; x 1; 3 runs each." in made
    assert made.count(tables.EMPTY) == 1 and "old" not in made
    assert tables.render(made, []) == tables.render(text, [])


def test_readme_is_what_the_results_say():
    text = tables.README.read_text()
    assert tables.document(text, tables.RESULTS) == text, "run `python benchmarks/tables.py`"


def test_programs_must_have_done_the_same_work():
    def found(**values):
        return {"found": values}

    programs = {
        "ours": found(n=[100], loss=1.0, classes=[[1, 2, 2, 3]]),
        "peer": found(n=[100], loss=1.01, classes=[[2, 3, 2, 5]]),
    }
    assert not report.differences(programs, {"n": 0, "loss": 0.02, "classes": 0.25})
    assert len(report.differences(programs, {"loss": 0.001, "classes": 0.1})) == 2
    programs["peer"]["found"]["n"] = [100, 3]
    assert "n: [100] of ours" in report.differences(programs, {"n": 1.0})[0]
