"""The examples in README and docs run as they stand, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from PIL import Image

import solov2_jax

ROOT = Path(__file__).resolve().parent.parent


def examples(document, first=None):
    """Returns the Python blocks of a document, from a title on."""
    text = (ROOT / document).read_text("utf-8")
    text = text[text.index(first) :] if first else text
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the examples name: a run's folder and two photographs."""
    tiny_network.write_workdir(tmp_path / "runs" / "mine", tiny_network.tiny_config())
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg"):
        pixels = rng.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


def test_examples_run(files, capsys):
    (short,) = examples("README.md")
    lines = [line for line in short.splitlines() if line]
    assert len(lines) <= 5, "the README promises little"
    names: dict = {}
    exec(short, names)
    assert capsys.readouterr().out.count("40, 60") == 2
    assert set(names["found"].names) <= {"cat", "dog"}

    blocks = examples("docs/evaluation_and_prediction.md", "## In Python")
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["picture"].shape == (40, 60, 3)
    assert names["predictor"].padded_shape(40, 60) == (64, 96)


def test_the_package_is_light_until_a_predictor_is_asked_for():
    code = (
        "import sys, solov2_jax\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert 'Predictor' in dir(solov2_jax)\n"
        "from solov2_jax import Predictor\n"
        "assert 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'Predict'"):
        solov2_jax.Predict()
