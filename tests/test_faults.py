"""Faults while training cost at most the steps since the last good checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from solov2_jax import distributed
from solov2_jax.checkpoint import list_steps, restore_parts, restore_variables
from solov2_jax.training.restore import abstract, state_of

SCRIPT = Path(toy.__file__).with_name("fault_injection.py")
TIMING = {"step_seconds", "data_seconds", "images_per_second", "eta_seconds"}
TIMING |= {"memory_gb", "compiles"}


def inject(workdir, *arguments):
    command = [sys.executable, str(SCRIPT), f"--workdir={workdir}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    log = workdir.with_suffix(".log")
    tail = log.read_text()[-3000:] if log.is_file() else ""
    assert result.returncode == 0, result.stdout + result.stderr + tail
    return result.stdout


def lines_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return [{k: v for k, v in x.items() if k not in TIMING} for x in lines]


def assert_same_run(a, b):
    """Everything that training computed is equal, bit for bit."""
    assert list_steps(a)[-1] == list_steps(b)[-1]
    for which in ("last", "last:raw", "best"):
        (x, step), (y, other) = (restore_variables(f, which) for f in (a, b))
        assert step == other
        jax.tree.map(np.testing.assert_array_equal, x, y)
    for name in ("optimizer", "variables", "ema"):
        sums = [position(f)["checksums"][name] for f in (a, b)]
        assert sums[0] == sums[1], name
    assert (a / "best.json").read_text() == (b / "best.json").read_text()
    assert lines_of(a) == lines_of(b)


def position(workdir):
    folder = workdir / "checkpoints" / str(list_steps(workdir)[-1])
    return json.loads((folder / "position" / "metadata").read_text())


def test_20_kills_at_random_points_change_not_one_bit(tmp_path):
    output = inject(tmp_path / "killed")
    assert output.count("killed after") == 20, output
    inject(tmp_path / "whole", "--kills=0")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    skipped = [line.get("skipped_steps", 0) for line in lines_of(tmp_path / "whole")]
    assert max(skipped) == 9, "steps with a NaN were among them"
    log = (tmp_path / "killed.log").read_text()
    assert log.count("resumed") > 10 and "unreadable" not in log


@pytest.mark.slow  # about 5 minutes; in CI's nightly run
@pytest.mark.parametrize("seed", [0, 1])
def test_20_kills_of_a_real_network_change_not_one_bit(tmp_path, seed):
    output = inject(tmp_path / "killed", "--real", f"--seed={seed}")
    assert output.count("killed after") == 20, output
    inject(tmp_path / "whole", "--real", "--kills=0")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def run_toy(workdir, *arguments, before=()):
    command = [sys.executable, toy.__file__, f"--workdir={workdir}", *arguments]
    return subprocess.run([*before, *command], capture_output=True, text=True)


def test_a_save_that_fails_in_the_background_ends_the_run_soon(tmp_path):
    """The operating system refuses to write large files, as a full disk would."""

    arguments = ["--width=256", "--cpu_devices=1", "--seconds_per_batch=0.05"]
    arguments += ["--config.train.steps=400", "--compilation_cache="]
    limit = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]  # KiB
    result = run_toy(tmp_path, *arguments, before=limit)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "the checkpoint of step 4 could not be written" in result.stderr
    assert "The last good one on disk: none" in result.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 4 <= len(lines) < 100 and list_steps(tmp_path) == []


def test_a_run_goes_on_on_other_devices_with_a_longer_schedule(tmp_path):
    """8 devices, then 2, then 1 with more steps and a milestone that is moved."""
    stages = [
        ("--cpu_devices=8", "--config.train.steps=4", "--config.optim.milestones=(4,)"),
        ("--cpu_devices=2", "--config.train.steps=8", "--config.optim.milestones=(6,)"),
        (
            "--cpu_devices=1",
            "--config.train.steps=12",
            "--config.optim.milestones=(6,)",
        ),
    ]
    for stage in stages:
        result = run_toy(tmp_path / "moved", *stage)
        assert result.returncode == 0, result.stdout + result.stderr
    result = run_toy(tmp_path / "still", *stages[-1])
    assert result.returncode == 0, result.stdout + result.stderr
    moved, still = (
        [line["loss"] for line in lines_of(tmp_path / name)] for name in ("moved", "still")
    )
    assert len(moved) == 12
    # Sums over the batch in another order: a few float32 roundings.
    np.testing.assert_allclose(moved, still, rtol=2e-5)
    task = toy.toy_task(toy.toy_config(), None)
    shapes = jax.eval_shape(lambda k: state_of(task.init(k), task.tx), jax.random.key(0))
    for devices in (8, 3):
        mesh = distributed.make_mesh(devices)
        restored = restore_parts(tmp_path / "moved", abstract(shapes, mesh).parts())
        assert restored is not None
        kernel = restored.parts["variables"]["params"]["ins_head"]["cate_pred"]["kernel"]
        assert len(kernel.sharding.device_set) == devices
