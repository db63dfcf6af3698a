import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from solov2_jax import checkpoint, distributed
from solov2_jax.checkpoint import CheckpointManager, list_steps, restore_parts, restore_variables
from solov2_jax.training.restore import abstract, create_state
from solov2_jax.training.step import TrainState

pytestmark = pytest.mark.filterwarnings(
    # Orbax leaves a coroutine behind when TensorStore cannot read a file.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture(scope="module")
def start():
    task = toy.toy_task(toy.toy_config(), None, width=64)
    mesh = distributed.make_mesh(8)
    return task, mesh, create_state(task.init, task.tx, jax.random.key(0), mesh)


def at_step(state, step):
    """Returns the state with other numbers for each step, as after training."""
    state = jax.tree.map(lambda x: x + jax.numpy.asarray(step, x.dtype), state)
    return state.replace(step=jax.numpy.int32(step))


def save_all(workdir, state, steps, keep=10, best=None):
    checkpoints = CheckpointManager(workdir, keep=keep)
    for step in steps:
        checkpoints.save(step, at_step(state, step).parts(), {"next_step": step})
        if step == best:
            checkpoints.record_best(step, "segm/AP", 0.5)
    checkpoints.close()


def restored_state(workdir, abstract_state):
    """Returns (state, position) as a run resumes, unreadable checkpoints moved aside."""
    restored = restore_parts(workdir, abstract_state.parts())
    for step in restored.unreadable:
        checkpoint.move_aside(workdir, step)
    return TrainState.from_parts(restored.parts), restored.position


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_restores_what_was_saved_on_any_number_of_devices(tmp_path, start):
    _, mesh, state = start
    save_all(tmp_path, state, [3])
    for devices in (8, 1):
        target = distributed.make_mesh(devices)
        restored, position = restored_state(tmp_path, abstract(state, target))
        assert_equal(restored, at_step(state, 3))
        kernel = restored.params["ins_head"]["cate_pred"]["kernel"]
        assert kernel.sharding == distributed.replicated(target)
        assert position["next_step"] == 3
    variables, step = restore_variables(tmp_path)
    assert_equal(variables, at_step(state, 3).variables)
    assert step == 3 and set(variables) == {"params", "batch_stats"}


def test_keeps_the_newest_and_the_best(tmp_path, start):
    save_all(tmp_path, start[2], range(1, 8), keep=2, best=3)
    assert list_steps(tmp_path) == [3, 6, 7]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 3, "metric": "segm/AP", "value": 0.5}
    for which, step in (("last", 7), ("best", 3), ("6", 6)):
        assert restore_variables(tmp_path, which)[1] == step


def test_nothing_to_restore(tmp_path, start):
    assert restore_parts(tmp_path, abstract(start[2], start[1]).parts()) is None
    with pytest.raises(ValueError, match="no checkpoint in checkpoints/"):
        restore_variables(tmp_path)


def test_an_unknown_checkpoint_is_an_error_that_lists_the_others(tmp_path, start):
    save_all(tmp_path, start[2], [2, 4])
    with pytest.raises(ValueError, match="no checkpoint '3'; there are .* 2, 4"):
        restore_variables(tmp_path, "3")
    with pytest.raises(ValueError, match="no evaluation has finished"):
        restore_variables(tmp_path, "best")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=os.path.getsize)


DAMAGE = {
    "data cut": lambda folder: cut(largest_file(folder / "variables")),
    "data changed": lambda folder: flip(largest_file(folder / "variables")),
    "optimizer changed": lambda folder: flip(largest_file(folder / "optimizer")),
    "data gone": lambda folder: largest_file(folder / "variables").unlink(),
    "part gone": lambda folder: shutil.rmtree(folder / "optimizer"),
    "position cut": lambda folder: cut(folder / "position" / "metadata"),
    "empty folder": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
}


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("two")
    save_all(folder, start[2], [4, 8])
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path, two_saves, start, damage, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(two_saves, workdir)
    DAMAGE[damage](workdir / "checkpoints" / "8")
    restored, position = restored_state(workdir, abstract(start[2], start[1]))
    assert_equal(restored, at_step(start[2], 4))
    assert position["next_step"] == 4
    assert "checkpoints/8 is unreadable" in caplog.text
    assert list_steps(workdir) == [4]
    assert (workdir / "checkpoints_unreadable" / "8").is_dir(), "moved, not deleted"
    # The step can be saved again.
    save_all(workdir, start[2], [8])
    assert restore_variables(workdir)[1] == 8


def test_reading_for_inference_falls_back_too_and_moves_nothing(two_saves, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_saves, workdir)
    DAMAGE["data cut"](workdir / "checkpoints" / "8")
    assert restore_variables(workdir)[1] == 4
    assert list_steps(workdir) == [4, 8]
    with pytest.raises(ValueError, match=r"checkpoints/8 is unreadable.*\[4, 8\]"):
        restore_variables(workdir, "8")


def test_no_readable_checkpoint_is_an_error(tmp_path, two_saves, start):
    workdir = tmp_path / "run"
    shutil.copytree(two_saves, workdir)
    for step in (4, 8):
        DAMAGE["data cut"](workdir / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="no checkpoint is readable.*8: .*4: "):
        restore_parts(workdir, abstract(start[2], start[1]).parts())
    assert list_steps(workdir) == [4, 8], "nothing is moved when nothing is readable"


def test_a_killed_save_leaves_a_temporary_folder_that_is_ignored(tmp_path, start):
    save_all(tmp_path, start[2], [4])
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "4", folder / "8.orbax-checkpoint-tmp-123")
    assert list_steps(tmp_path) == [4]
    assert restore_variables(tmp_path)[1] == 4
    save_all(tmp_path, start[2], [8])
    assert sorted(p.name for p in folder.iterdir()) == ["4", "8"]


def test_a_lost_best_checkpoint_is_forgotten(tmp_path, start, caplog):
    save_all(tmp_path, start[2], [4, 8], best=8)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert checkpoint.read_best(tmp_path) is None
    assert "which is gone" in caplog.text


def test_a_failed_write_is_an_error_and_the_last_good_save_stays(tmp_path):
    """The operating system refuses to write large files, as a full disk would."""
    script = Path(toy.__file__)
    command = [sys.executable, str(script), f"--workdir={tmp_path}", "--width=256"]
    command.append("--cpu_devices=1")
    subprocess.run([*command, "--config.train.steps=4"], check=True)
    limit = largest_file(tmp_path / "checkpoints" / "4").stat().st_size // 2
    result = subprocess.run(
        [*command, "--config.train.steps=8", "--compilation_cache="],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "the checkpoint of step 8 could not be written" in result.stderr
    assert "The last good one on disk: step 4" in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert list_steps(tmp_path) == [4]
    subprocess.run([*command, "--config.train.steps=8"], check=True)
    assert list_steps(tmp_path) == [4, 8]
