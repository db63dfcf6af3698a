import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from flax.traverse_util import flatten_dict

from solov2_jax import distributed
from solov2_jax.checkpoint import list_steps, read_position, restore_variables
from solov2_jax.io import InputError
from solov2_jax.training import workdir as workdirs
from solov2_jax.training.loop import train
from solov2_jax.training.restore import restore
from solov2_jax.weights.convert import save_weights

TIMING = {"step_seconds", "data_seconds", "images_per_second", "eta_seconds"}
TIMING |= {"memory_gb", "compiles"}


@pytest.fixture(autouse=True, scope="module")
def small_programs_are_cached():
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    toy.cache_everything()
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def lines_of(workdir):
    text = (Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def numbers_of(workdir):
    """Returns what must be equal, bit for bit, in two runs with the same config."""
    lines = [{k: v for k, v in x.items() if k not in TIMING} for x in lines_of(workdir)]
    variables, step = restore_variables(workdir)
    leaves = json.dumps(np.sum([np.sum(x) for x in leaves_of(variables)]).item())
    return lines, leaves, step


def contents_of(workdir):
    """Returns {name: bytes} of everything in a workdir but the log and the lock."""
    files = (p for p in Path(workdir).rglob("*") if p.is_file())
    names = {str(p.relative_to(workdir)): p.read_bytes() for p in files}
    return {n: data for n, data in names.items() if n not in ("train.log", ".lock")}


def leaves_of(tree):
    if not isinstance(tree, dict):
        return [np.asarray(tree, np.float64)]
    return [leaf for key in sorted(tree) for leaf in leaves_of(tree[key])]


def command(workdir, *arguments):
    script = [sys.executable, toy.__file__, f"--workdir={workdir}", "--cpu_devices=1"]
    return [*script, *arguments]


def run(workdir, *arguments):
    result = subprocess.run(
        command(workdir, *arguments), capture_output=True, text=True, timeout=900
    )
    return result.returncode, result.stdout + result.stderr


def test_a_whole_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    config = toy.toy_config(train__eval_every=5)
    metrics = train(config, tmp_path / "run", toy.toy_task)
    path = tmp_path / "run"
    assert set(metrics) == {"segm/AP", "bbox/AP"}
    lines = lines_of(path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["learning_rate"] == pytest.approx(0.01 * 0.01)
    assert [line["step"] for line in lines if "segm/AP" in line] == [5, 10, 12]
    assert lines[-1]["segm/AP"] == metrics["segm/AP"]
    best = json.loads((path / "best.json").read_text())
    assert best["value"] == max(x["segm/AP"] for x in lines if "segm/AP" in x)
    assert best["step"] in list_steps(path) and 12 in list_steps(path)
    classes = json.loads((path / "classes.json").read_text())
    assert classes == {"names": ["a", "b", "c"], "ids": [1, 5, 7]}
    assert read_position(path, 12)["classes"] == classes
    environment = json.loads((path / "environment.json").read_text())
    assert environment["packages"]["jax"] and len(environment["devices"]) == 8
    assert json.loads((path / "config.json").read_text())["train"]["steps"] == 12
    assert list((path / "tensorboard").iterdir())
    log = (path / "train.log").read_text()
    for text in ("start: random weights (seed 0)", "compiled for", "step 12/12"):
        assert text in log
    assert "recompiled" not in log


def test_the_same_command_after_the_end_trains_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    config = toy.toy_config(train__steps=3)
    metrics = train(config, tmp_path, toy.toy_task)
    before = numbers_of(tmp_path)
    evaluate = lambda variables: pytest.fail("evaluated again")  # noqa: E731
    build = lambda c, w: toy.toy_task(c, w, evaluate=evaluate)  # noqa: E731
    assert train(config, tmp_path, build) == metrics
    assert "nothing to train" in caplog.text
    assert numbers_of(tmp_path) == before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the numbers of a run that nothing happened to, logging each 3 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = run(folder, *LONG)
    assert code == 0, output
    return numbers_of(folder)


LONG = ("--config.train.log_every=3", "--config.train.eval_every=6", "--width=512")


@pytest.mark.parametrize("kill_at", [2, 4, 7])
def test_kill_9_and_the_same_command_give_the_same_numbers(tmp_path, uninterrupted, kill_at):
    code, output = run(tmp_path, *LONG, f"--kill_at={kill_at}")
    assert code == -signal.SIGKILL, output
    if kill_at == 4:  # asked for right after the save of step 4 began
        names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
        assert names and names != ["4"], "killed in the middle of the save"
    code, output = run(tmp_path, *LONG)
    assert code == 0, output
    assert ("resumed" in output) == (kill_at > 4)
    assert numbers_of(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0(tmp_path, number):
    process = subprocess.Popen(
        command(tmp_path, "--seconds_per_batch=0.3", "--config.train.steps=50"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    output = ""
    while "step 2/50" not in output:
        output += process.stdout.readline()
    process.send_signal(number)
    output += process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert f"stopped by {signal.Signals(number).name} after step" in output
    last = lines_of(tmp_path)[-1]["step"]
    assert list_steps(tmp_path)[-1] == last < 50
    code, output = run(tmp_path, f"--config.train.steps={last + 2}")
    assert code == 0 and f"resumed {tmp_path} at step {last}" in output
    assert [x["step"] for x in lines_of(tmp_path)] == list(range(1, last + 3))


def test_a_stopped_run_continues_with_the_same_means(tmp_path, uninterrupted):
    """A checkpoint in the middle of a log period holds the period's first half."""

    def stopping(step, size, seed):
        for batch in toy.toy_batches(step, size, seed):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            step += 1

    changes = {"train__log_every": 3, "train__eval_every": 6}
    config = toy.toy_config(**changes, train__checkpoint_every=100)
    usual = signal.getsignal(signal.SIGTERM)

    def build(batches):
        return lambda c, w: toy.toy_task(c, w, batches=batches, width=512)

    assert train(config, tmp_path / "a", build(stopping)) == {}
    assert signal.getsignal(signal.SIGTERM) == usual
    assert list_steps(tmp_path / "a") == [5]
    train(config, tmp_path / "a", build(toy.toy_batches))
    train(config, tmp_path / "b", build(toy.toy_batches))
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")


def test_a_signal_that_ends_the_reading_processes_too_is_saved(tmp_path):
    def batches(step, size, seed):
        yield from (toy.toy_batch(i, size, seed) for i in range(step, 3))
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a worker is gone")

    build = lambda c, w: toy.toy_task(c, w, batches=batches)  # noqa: E731
    assert train(toy.toy_config(), tmp_path, build) == {}
    assert list_steps(tmp_path) == [3]


def test_a_workdir_of_another_config_is_an_error_that_lists_the_keys(tmp_path):
    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    other = toy.toy_config(train__steps=2, optim__momentum=0.8, seed=3)
    with pytest.raises(ValueError) as error:
        train(other, tmp_path, toy.toy_task)
    message = str(error.value)
    assert "optim.momentum was 0.9, is 0.8" in message
    assert "seed was 0, is 3" in message
    assert f"--config.init_from={tmp_path}" in message
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["optim"]["momentum"] == 0.9, "the run's config is untouched"


def test_keys_that_change_no_step_may_change(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    changes = {"train__steps": 5, "train__checkpoint_every": 1, "data__num_workers": 7}
    config = toy.toy_config(**changes, optim__milestones=(3, 4), eval__batch_size=2)
    train(config, tmp_path, toy.toy_task)
    assert "changed since the last start: train.steps was 2, is 5" in caplog.text
    assert lines_of(tmp_path)[-1]["step"] == 5
    with pytest.raises(ValueError, match="optim.milestones was"):
        past = toy.toy_config(**changes, optim__milestones=(2,), eval__batch_size=2)
        train(past, tmp_path, toy.toy_task)


def test_a_longer_cosine_is_another_run_unless_the_curve_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    train(toy.toy_config(optim__schedule="cosine", train__steps=3), tmp_path, toy.toy_task)
    longer = {"optim__schedule": "cosine", "train__steps": 5}
    with pytest.raises(ValueError, match="train.steps was 3, is 5"):
        train(toy.toy_config(**longer), tmp_path, toy.toy_task)
    train(toy.toy_config(**longer, optim__decay_steps=3), tmp_path, toy.toy_task)
    assert "changed since the last start: optim.decay_steps was 0, is 3" in caplog.text
    assert [x["learning_rate"] for x in lines_of(tmp_path)[3:]] == [0, 0]


def test_other_training_data_is_an_error(tmp_path):
    config = toy.toy_config(train__steps=2)
    train(config, tmp_path, toy.toy_task)
    build = lambda c, w: toy.toy_task(c, w, fingerprint="other")  # noqa: E731
    with pytest.raises(ValueError, match="was trained on other data"):
        train(config, tmp_path, build)


def test_checkpoints_without_a_config_are_an_error(tmp_path):
    config = toy.toy_config(train__steps=2)
    train(config, tmp_path, toy.toy_task)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has checkpoints but no config.json"):
        train(config, tmp_path, toy.toy_task)


@pytest.mark.parametrize("keep_folder", [True, False])
def test_lost_checkpoints_stop_the_run_and_the_log_stays(tmp_path, keep_folder):
    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    shutil.rmtree(tmp_path / "checkpoints")
    if keep_folder:
        (tmp_path / "checkpoints").mkdir()
    before = contents_of(tmp_path)
    with pytest.raises(InputError, match="checkpoints/ has no checkpoint, but this run"):
        train(toy.toy_config(train__steps=3), tmp_path, toy.toy_task)
    assert contents_of(tmp_path) == before
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old.jsonl")  # as the message says
    train(toy.toy_config(train__steps=1, seed=1), tmp_path, toy.toy_task)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_init_from_another_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    train(toy.toy_config(train__steps=2), tmp_path / "a", toy.toy_task)
    first, _ = restore_variables(tmp_path / "a")
    source = str(tmp_path / "a")
    still = toy.toy_config(train__steps=1, init_from=source, optim__learning_rate=1e-30)
    train(still, tmp_path / "b", toy.toy_task)
    second, step = restore_variables(tmp_path / "b")
    for a, b in zip(leaves_of(first), leaves_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert step == 1 and f"start: weights of {source}" in caplog.text
    with pytest.raises(ValueError, match="init_from = '/nowhere': no such file"):
        config = toy.toy_config(init_from="/nowhere")
        train(config, tmp_path / "c", toy.toy_task)


def test_what_the_weights_lack_is_drawn_as_without_them(tmp_path):
    config = toy.toy_config(init_from=str(tmp_path / "part.safetensors"))
    task = toy.toy_task(config, tmp_path)
    mesh = distributed.make_mesh(2)
    scratch = restore(toy.toy_config(), tmp_path, task, mesh)
    flat = flatten_dict(jax.device_get(scratch.state.variables), sep="/")
    lacking = "params/ins_head/cate_pred/kernel"
    file = {name: leaf + 1 for name, leaf in flat.items() if name != lacking}
    save_weights(config.init_from, file, {})
    state = restore(config, tmp_path, task, mesh).state
    for name, leaf in flatten_dict(jax.device_get(state.variables), sep="/").items():
        np.testing.assert_array_equal(leaf, file.get(name, flat[name]))


def not_finite(steps):
    """Returns the toy's batches, with a NaN in those of some steps."""

    def batches(step, size, seed):
        for batch in toy.toy_batches(step, size, seed):
            if step in steps:
                batch["image"][3] = np.nan
            yield batch
            step += 1

    return lambda c, w: toy.toy_task(c, w, batches=batches)


def test_steps_that_are_not_finite_in_a_row_name_steps_and_images(tmp_path):
    config = toy.toy_config(train__log_every=100, train__max_skipped=2)
    with pytest.raises(FloatingPointError) as error:
        train(config, tmp_path, not_finite((2, 5, 6)))
    assert "steps 6 to 7: " in str(error.value) and "loss = nan" in str(error.value)
    assert "40, 41, 42, 43, 44, 45, 46, 47, 48, 49" in str(error.value)
    assert list_steps(tmp_path) == [4]
    assert "the run ended here" in (tmp_path / "train.log").read_text()


def test_a_run_with_skipped_steps_resumes_and_ends(tmp_path):
    build = not_finite((2, 3, 8))
    changes = {"train__max_skipped": 3, "train__eval_every": 4}
    short = toy.toy_config(**changes, train__steps=4)  # ends after two in a row
    train(short, tmp_path / "a", build)
    for folder in "ab":
        train(toy.toy_config(**changes), tmp_path / folder, build)
    lines = lines_of(tmp_path / "a")
    assert [x["step"] for x in lines if "loss" not in x] == [3, 4, 9]
    assert lines[-1]["skipped_steps"] == 3
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")


def test_an_error_of_the_data_ends_the_run_with_its_last_step_saved(tmp_path):
    def batches(step, size, seed):
        for batch in toy.toy_batches(step, size, seed):
            if step == 6:
                raise ValueError("image 7 is broken")
            yield batch
            step += 1

    build = lambda c, w: toy.toy_task(c, w, batches=batches)  # noqa: E731
    with pytest.raises(ValueError, match="image 7 is broken"):
        train(toy.toy_config(), tmp_path, build)
    assert list_steps(tmp_path) == [4, 6]
    assert "the checkpoint of step 6 is saved" in (tmp_path / "train.log").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, uninterrupted):
    code, output = run(tmp_path, *LONG)
    assert code == 0, output
    files = (tmp_path / "checkpoints" / "12" / "variables").rglob("*")
    largest = max((f for f in files if f.is_file()), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:1000])
    code, output = run(tmp_path, *LONG)
    assert code == 0, output
    assert "checkpoints/12 is unreadable" in output
    assert "at step 8" in output and "Traceback" not in output
    assert numbers_of(tmp_path) == uninterrupted


def test_two_runs_in_one_workdir_are_an_error(tmp_path):
    with workdirs.locked(tmp_path):
        with pytest.raises(ValueError, match="another process is training in it"):
            train(toy.toy_config(), tmp_path, toy.toy_task)
    assert not (tmp_path / "config.json").exists()
    with workdirs.locked(tmp_path):
        pass


def test_batch_size_and_workdir_errors(tmp_path):
    with pytest.raises(ValueError, match="batch_size = 6 cannot be split over 8"):
        train(toy.toy_config(train__batch_size=6), tmp_path / "a", toy.toy_task)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be created"):
        train(toy.toy_config(), tmp_path / "file" / "run", toy.toy_task)


def test_a_log_period_of_0_writes_the_evaluation_only(tmp_path):
    train(toy.toy_config(train__log_every=0), tmp_path, toy.toy_task)
    assert [set(line) - {"step"} for line in lines_of(tmp_path)] == [{"segm/AP", "bbox/AP"}]


def test_revision_is_a_commit_or_none():
    revision = workdirs.revision()
    assert revision is None or len(revision.removesuffix("+changes")) == 40
