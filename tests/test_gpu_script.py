"""benchmarks/gpu.sh: what it checks first, and the whole script, tiny, on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_a_figure_outside_of_its_limit_or_not_a_number_fails(monkeypatch, capsys):
    import parity

    good = {figure: 0.0 for figure in parity.MEANING}
    for figure in parity.MEANING:
        for value in (0.9, math.nan):
            monkeypatch.setattr(parity, "errors", lambda *_, f=figure, v=value: good | {f: v})
            assert parity.main(["--only", "float32 highest"]) == 1
            assert f"parity: FAILED in float32 highest: {figure}" in capsys.readouterr().out
    monkeypatch.setattr(parity, "errors", lambda *_: good)
    assert parity.main([]) == 0
    assert set(parity.LIMITS) == {f"{a} {b}" for a, b in parity.PRECISIONS}


def test_without_a_gpu_it_is_one_line():
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = ["bash", str(SCRIPT)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("install jax[cuda13] or jax[cuda12]")


@pytest.mark.slow
def test_the_whole_script_runs_tiny_on_the_cpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    command = ["bash", str(SCRIPT), "--tiny"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "parity: passed" in ended.stdout
    (device,) = tmp_path.glob("device-*.json")
    content = json.loads(device.read_text())
    train = content["train"]
    assert 0 < train["dispatch_ms"] <= train["step_ms"] and 0 <= train["overlap"] <= 1
    assert content["evaluation"]["images_per_second"] > 0
    assert content["evaluation"]["detections_per_image"] > 0
    errors = json.loads((tmp_path / "parity.json").read_text())["errors"]["float32 highest"]
    assert errors["features"] < 1e-4 and errors["detections"] == 0
    assert len(list(tmp_path.glob("*.json"))) == 4, "a step and a whole image besides"
