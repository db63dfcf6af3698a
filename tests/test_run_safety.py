"""What a run refuses before it writes, what it saves however it ends, what it never saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_loop import contents_of, lines_of

from solov2_jax import checkpoint, distributed
from solov2_jax.checkpoint import CheckpointManager, list_steps, read_best, read_classes
from solov2_jax.config import read_config
from solov2_jax.evaluation.evaluate import StopEvaluation
from solov2_jax.io import InputError, write_json
from solov2_jax.training import HookBase, WriterBase, train
from solov2_jax.training.checkpoint_hooks import Evaluation
from solov2_jax.training.hooks import Run
from solov2_jax.training.metric_files import read_metrics
from solov2_jax.training.restore import abstract, create_state
from solov2_jax.training.step import TrainState
from solov2_jax.training.writers import CsvWriter, JsonlWriter, TensorBoardWriter


def task_with(**replaced):
    return lambda config, workdir: toy.toy_task(config, workdir, **replaced)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Returns the workdir of a run of two steps, not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    train(toy.toy_config(train__steps=2, train__writers=("csv",)), folder, toy.toy_task)
    return folder


@pytest.fixture
def workdir(two_steps, tmp_path):
    subprocess.run(["cp", "-r", str(two_steps), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


# A refusal leaves the folder as it was.

REFUSALS = {
    "classes reversed": ({}, {"class_names": ("c", "b", "a")}, "trained with other classes"),
    "a category id": ({}, {"category_ids": (1, 5, 8)}, r"\('c', 8\) instead of \('c', 7\)"),
    "a class more": (
        {},
        {"class_names": tuple("abcd"), "category_ids": (1, 5, 7, 9)},
        "other classes",
    ),
    "data": ({}, {"fingerprint": "other"}, "was trained on other data"),
    "config": ({"optim__momentum": 0.5}, {}, "optim.momentum was 0.9, is 0.5"),
    "metric": (
        {"train__best_metric": "segm/Ap"},
        {"metric_names": ("segm/AP", "bbox/AP")},
        "best_metric = 'segm/Ap' .*did you mean segm/AP",
    ),
    "hook": ({"train__hooks": ("nowhere:Hook",)}, {}, "train.hooks: 'nowhere:Hook' cannot"),
    "no hook": ({"train__hooks": ("json:JSONDecoder",)}, {}, "not a class derived from"),
    "writer": (
        {"train__writers": ("json:JSONDecoder",)},
        {},
        "from solov2_jax.training.WriterBase",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_resume_changes_nothing(workdir, kind):
    changes, replaced, message = REFUSALS[kind]
    before = contents_of(workdir)
    config = toy.toy_config(train__steps=4, **changes)
    with pytest.raises(InputError, match=message):
        train(config, workdir, task_with(**replaced))
    assert contents_of(workdir) == before
    log = (workdir / "train.log").read_text()
    assert "the run ended here" in log


def test_a_refused_start_leaves_no_folder(tmp_path):
    """Whatever refuses: the config, or what only building the task finds."""

    def refuses(config, workdir):
        raise InputError("distill_from is no run")

    for build in (refuses, task_with(metric_names=("segm/AP",))):
        config = toy.toy_config(train__best_metric="segm/Ap")
        with pytest.raises(InputError):
            train(config, tmp_path / "a" / "run", build)
        assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        train(toy.toy_config(), tmp_path / "mine", refuses)
    assert not list((tmp_path / "mine").iterdir())


def test_a_refused_start_writes_nothing(tmp_path):
    weights = tmp_path / "weights.npz"
    weights.write_bytes(b"no zip file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").write_text("in the way")
    before = contents_of(tmp_path / "run")
    with pytest.raises(InputError, match="eval should be a folder; move it away"):
        train(toy.toy_config(), tmp_path / "run", toy.toy_task)
    (tmp_path / "run" / "eval").unlink()
    with pytest.raises(ValueError, match="weights.npz"):
        train(toy.toy_config(init_from=str(weights)), tmp_path / "run", toy.toy_task)
    del before["eval"]
    assert contents_of(tmp_path / "run") == before == {}
    assert not list((tmp_path / "run").iterdir())


def test_a_kill_before_the_first_save_may_start_again(tmp_path):
    """The metrics of such a run are dropped: nothing that was saved is lost."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


# Class names live with the weights.


def test_classes_json_must_agree_with_the_checkpoint(workdir):
    path = workdir / "classes.json"
    right = read_classes(workdir)
    assert right == (["a", "b", "c"], [1, 5, 7])
    write_json({"names": ["c", "b", "a"], "ids": [1, 5, 7]}, path)
    for read in (lambda: read_classes(workdir), lambda: read_classes(workdir, 2)):
        with pytest.raises(InputError, match="other classes than the checkpoint.*label 0"):
            read()
    with pytest.raises(InputError, match="other classes"):
        train(toy.toy_config(train__steps=3), workdir, toy.toy_task)
    assert json.loads(path.read_text())["names"] == ["c", "b", "a"], "not repaired in silence"
    path.unlink()
    assert read_classes(workdir) == right


@pytest.mark.parametrize(
    "text",
    [
        '{"names": ["a", "b"], "ids": [1, 5, 7]}',
        '{"names": ["a", "b", "c"], "ids": [1, 5, 5]}',
        '{"names": ["a", "b", "c"], "ids": [1, 5, "x"]}',
        '{"names": "abc", "ids": null}',
        "[1, 2]",
        "{",
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_broken_classes_json_is_one_clear_error(workdir, text):
    (workdir / "classes.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"classes\.json: .*\. Delete the file"):
        read_classes(workdir)


def test_classes_of_another_number_than_the_networks(tmp_path):
    write_json({"names": ["a"], "ids": [1]}, tmp_path / "classes.json")
    assert read_classes(tmp_path) == (["a"], [1]), "no checkpoint and no config contradict"
    config = toy.toy_config(model__num_classes=2)
    write_json(config.to_dict(), tmp_path / "config.json")
    with pytest.raises(InputError, match=r"classes\.json: .*1 classes, and config.json says 2"):
        read_classes(tmp_path)


# Damaged files beside the checkpoints.


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"step": "2", "metric": "segm/AP", "value": 0.5}',
        '{"step": 2, "metric": 3, "value": 0.5}',
        '{"step": 2, "metric": "segm/AP", "value": null}',
        '{"step": 2, "metric": "segm/AP", "value": NaN}',
        '{"best": {"step": 2}}',
        "[" * 100_000,
        "[]",
        "\x00",
    ],
)
def test_a_broken_best_json_is_one_clear_error(workdir, text):
    (workdir / "best.json").write_text(text)
    before = contents_of(workdir)
    with pytest.raises(InputError, match=r"best\.json: cannot be read .*\. Delete the file"):
        read_best(workdir)
    with pytest.raises(InputError, match="best.json"):
        train(toy.toy_config(train__steps=3), workdir, toy.toy_task)
    assert contents_of(workdir) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
@pytest.mark.parametrize("garbage", [b"\xff\xfe\n", b"garbage\n", b'{"loss": 1}\n', b"\x00\n"])
def test_garbage_in_the_metrics_names_file_and_line(workdir, name, garbage):
    path = workdir / name
    path.write_bytes(path.read_bytes() + garbage + path.read_bytes().splitlines()[-1] + b"\n")
    line = 3 if name.endswith("jsonl") else 4
    before = contents_of(workdir)
    config = toy.toy_config(train__steps=3, train__writers=("csv",))
    with pytest.raises(InputError, match=rf"{name}, line {line}: .*Delete that line, or move"):
        train(config, workdir, toy.toy_task)
    assert contents_of(workdir) == before


def test_a_line_that_a_kill_cut_short_is_dropped(workdir):
    for name in ("metrics.jsonl", "metrics.csv"):
        with open(workdir / name, "ab") as file:
            file.write(b'{"st\xff')
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [1, 2]
    config = toy.toy_config(train__steps=3, train__writers=("csv",))
    train(config, workdir, toy.toy_task)
    assert [line["step"] for line in lines_of(workdir)] == [1, 2, 3]


def test_a_config_json_nested_without_end_is_one_clear_error(workdir):
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"seed": 0', "\x80"):
        (workdir / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"config\.json: cannot be read as"):
            read_config(workdir / "config.json")
        with pytest.raises(InputError, match="config.json"):
            train(toy.toy_config(train__steps=3), workdir, toy.toy_task)


# A full disk: /dev/full refuses every write.


# tensorboardX does not close a file whose last flush fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("writer", [JsonlWriter, CsvWriter, TensorBoardWriter])
def test_a_full_disk_names_the_file(tmp_path, writer):
    writer = writer()
    writer.check(tmp_path, 0)
    writer.open(tmp_path, 0, {})
    writer.write(1, {"loss": 1.0})
    tensorboard = isinstance(writer, TensorBoardWriter)
    file = writer._events._py_recordio_writer._writer if tensorboard else writer._file
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file.fileno())
    start = time.perf_counter()
    with pytest.raises(OSError, match=rf"{tmp_path}/\w+.*: cannot be written .*No space left"):
        for step in range(2, 40):
            writer.write(step, {"loss": 1.0})
    writer.close()
    assert time.perf_counter() - start < 10, "it does not wait for a thread that is dead"


def test_a_full_disk_at_the_start_names_the_file(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.json'"):
        train(toy.toy_config(), tmp_path, toy.toy_task)


# Only finite weights are saved, and the last good ones stay.


def with_rate(rate, at):
    """Returns the toy's task with another learning rate at one step."""

    def build(config, workdir):
        schedule = lambda step: jnp.where(step == at, rate, 0.01)  # noqa: E731
        return toy.toy_task(config, workdir, tx=optax.sgd(schedule), schedule=schedule)

    return build


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_saving_steps_own_update_is_checked(tmp_path, ema_decay):
    config = toy.toy_config(
        train__checkpoint_every=1, train__keep_checkpoints=1, optim__ema_decay=ema_decay
    )
    with pytest.raises(FloatingPointError, match="step 6: .*/.* is not finite after the update"):
        train(config, tmp_path, with_rate(jnp.inf, 5))
    assert list_steps(tmp_path)[-1] == 5
    variables, _ = checkpoint.restore_variables(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def test_a_finite_divergence_keeps_the_checkpoint_from_before(tmp_path):
    config = toy.toy_config(
        train__checkpoint_every=1, train__keep_checkpoints=1, train__max_skipped=4
    )
    with pytest.raises(FloatingPointError, match="steps 7 to 10: loss or gradient not finite"):
        train(config, tmp_path, with_rate(1e30, 5))
    assert list_steps(tmp_path) == [5, 6], "6 is where it diverged"
    largest = {}
    for step in (5, 6):
        variables, _ = checkpoint.restore_variables(tmp_path, str(step))
        largest[step] = max(np.abs(x).max() for x in jax.tree.leaves(variables))
    assert largest[5] < 100 and largest[6] > 1e20


def test_a_stop_while_steps_are_skipped_deletes_no_older_checkpoint(tmp_path):
    class Stop(HookBase):
        def after_step(self, run):
            run.window.fetch()
            run.stop = "enough" if run.step == 8 else ""

    config = toy.toy_config(train__checkpoint_every=1, train__keep_checkpoints=1)
    train(config, tmp_path, with_rate(1e30, 5), hooks=[Stop()])
    assert list_steps(tmp_path) == [5, 6, 8]


# An undefined metric is no value.


def test_an_undefined_metric_is_never_best_and_never_compared(tmp_path, caplog):
    caplog.set_level("WARNING", logger="solov2_jax")
    config = toy.toy_config(train__eval_every=2, train__patience=1, train__writers=("csv",))
    nothing = {"segm/AP": -1.0, "bbox/AP": float("nan")}
    results = train(config, tmp_path, task_with(evaluate=lambda variables: nothing))
    lines = lines_of(tmp_path)
    assert lines[-1]["step"] == 12, "patience = 1 does not end it"
    assert results == {"segm/AP": None, "bbox/AP": None}
    evaluated = [line for line in lines if "segm/AP" in line]
    assert len(evaluated) == 6 and all(line["segm/AP"] is None for line in evaluated)
    assert not (tmp_path / "best.json").exists()
    assert "segm/AP is undefined, because the validation data has no object" in caplog.text


def test_a_defined_value_after_undefined_ones_is_the_best(tmp_path):
    values = iter([-1.0, 0.2, -1.0, -1.0, 0.1, 0.1])
    config = toy.toy_config(train__eval_every=2, train__patience=3)
    train(config, tmp_path, task_with(evaluate=lambda variables: {"segm/AP": next(values)}))
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 4, "metric": "segm/AP", "value": 0.2}
    assert lines_of(tmp_path)[-1]["step"] == 10, "three evaluations after the best"


# However a run ends, its work stays.


class Fails(HookBase, WriterBase):
    """Fails at the third step, as a hook or as a writer."""

    def after_step(self, run):
        if run.step == 3:
            raise RuntimeError("my own mistake")

    def write(self, step, scalars):
        if step == 3:
            raise RuntimeError("my own mistake")


@pytest.mark.parametrize("role", ["hooks", "writers"])
def test_an_exception_in_a_hook_or_writer_is_saved_first(tmp_path, role):
    config = toy.toy_config(train__steps=6)
    with pytest.raises(InputError, match="Fails failed in .* at step 3: .*my own mistake"):
        train(config, tmp_path, toy.toy_task, **{role: [Fails()]})
    assert list_steps(tmp_path) == [3]
    assert "Traceback" in (tmp_path / "train.log").read_text()
    train(config, tmp_path, toy.toy_task)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_of_the_command_it_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, toy.__file__, f"--workdir={tmp_path}", "--cpu_devices=1"]
    hook = "--config.train.hooks=('test_run_safety:Fails',)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([*command, hook], capture_output=True, text=True, env=environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: the hook Fails failed in after_step at step 3")
    assert result.stderr.count("\n") == 1 and list_steps(tmp_path) == [3]


def test_an_error_while_saving_after_an_error_hides_neither(tmp_path, monkeypatch, caplog):
    def full(self, *args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(CheckpointManager, "save", full)
    with pytest.raises(InputError, match="my own mistake"):
        train(toy.toy_config(), tmp_path, toy.toy_task, hooks=[Fails()])
    assert "step 3 could not be saved before the error below: no space" in caplog.text


def test_a_signal_in_an_evaluation_saves_within_seconds_and_it_is_made_up_for(tmp_path):
    evaluated = []

    def evaluate(variables):
        evaluated.append(1)
        if len(evaluated) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {"segm/AP": 0.5}

    config = toy.toy_config(train__steps=6, train__checkpoint_every=0, train__eval_every=3)
    start = time.perf_counter()
    assert train(config, tmp_path, task_with(evaluate=evaluate)) == {}
    assert time.perf_counter() - start < 30
    assert list_steps(tmp_path) == [3] and "segm/AP" not in lines_of(tmp_path)[-1]
    assert train(config, tmp_path, task_with(evaluate=evaluate)) == {"segm/AP": 0.5}
    assert [x["step"] for x in lines_of(tmp_path) if "segm/AP" in x] == [3, 6]


@pytest.mark.parametrize("told", [True, False])
def test_of_several_processes_all_evaluate_and_stop_at_one_step(told, monkeypatch):
    """Also the one that a signal has reached: the others do not know of it yet."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    evaluated = []

    def evaluate(variables):
        evaluated.append(1)
        raise StopEvaluation

    run = Mock(
        spec=Run,
        step=3,
        interrupted=told,
        stop="SIGTERM" if told else "",
        all_stop=False,
        finished=False,
        due=Mock(return_value=True),
        window=Mock(),
        state=Mock(variables={}, ema=None),
    )
    Evaluation(evaluate, 3, [], {}).after_step(run)
    assert evaluated and run.all_stop and run.interrupted
    assert run.stop == ("SIGTERM" if told else "another process")


def test_a_second_signal_has_its_usual_effect(tmp_path):
    usual, after_one = signal.getsignal(signal.SIGTERM), []

    class Interrupt(HookBase):
        def after_step(self, run):
            os.kill(os.getpid(), signal.SIGTERM)
            after_one.append(signal.getsignal(signal.SIGTERM))

    assert train(toy.toy_config(), tmp_path, toy.toy_task, hooks=[Interrupt()]) == {}
    assert after_one == [usual] and list_steps(tmp_path) == [1]


# Own hooks and writers, as docs/training.md shows them.


def test_own_hooks_and_writers(tmp_path):
    lines = []

    class Print(HookBase):
        def after_step(self, run):
            lines.append(f"step {run.step} done")

    class Remember(WriterBase):
        def write(self, step, scalars):
            lines.append((step, "loss" in scalars))

    train(
        toy.toy_config(train__steps=2),
        tmp_path,
        toy.toy_task,
        hooks=[Print()],
        writers=[Remember()],
    )
    assert lines == [(1, True), "step 1 done", (2, True), (2, False), "step 2 done"]


SEEN = []


class Seen(HookBase, WriterBase):
    def before_train(self, run):
        SEEN.append("hook")

    def open(self, workdir, step, config):
        SEEN.append("writer")


def test_own_hooks_and_writers_by_import_path(tmp_path):
    SEEN.clear()
    path = f"{__name__}:Seen"
    config = toy.toy_config(train__steps=1, train__hooks=(path,), train__writers=(path, "csv"))
    train(config, tmp_path, toy.toy_task)
    assert SEEN == ["writer", "hook"] and (tmp_path / "metrics.csv").is_file()


@pytest.mark.parametrize("level", ["disallow", "allow"])
def test_the_loop_runs_under_a_transfer_guard(tmp_path, level):
    class Hidden(HookBase):
        transfer_guard = level

        def after_step(self, run):
            jnp.add(np.float32(1), 2)  # copies two numbers to the device

    config = toy.toy_config(train__steps=2)
    if level == "allow":
        train(config, tmp_path, toy.toy_task, hooks=[Hidden()])
        return
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config, tmp_path, toy.toy_task, hooks=[Hidden()])


# Checkpoints of earlier versions.


def test_a_checkpoint_with_the_part_average_loads(tmp_path):
    """The layout before the moving average was called ema."""
    task, mesh = toy.toy_task(toy.toy_config(), None), distributed.make_mesh(1)
    state = create_state(task.init, task.tx, jax.random.key(0), mesh, ema=True)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    parts = state.parts()
    parts["average"] = parts.pop("ema")
    checkpoints = CheckpointManager(tmp_path, keep=2)
    checkpoints.save(4, parts, {"window": []})
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "4" / "average").is_dir()
    restored = checkpoint.restore_parts(tmp_path, abstract(state, mesh).parts())
    assert restored is not None
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, TrainState.from_parts(restored.parts).ema, state.ema)
    jax.tree.map(equal, checkpoint.restore_variables(tmp_path)[0], jax.device_get(state.ema))
    raw = checkpoint.restore_variables(tmp_path, "4:raw")[0]
    jax.tree.map(equal, raw, jax.device_get(state.variables))


def test_the_public_face_is_lazy():
    code = (
        "import sys, solov2_jax, solov2_jax.training; "
        "assert not {'jax', 'numpy', 'grain'} & set(sys.modules); "
        "from solov2_jax import Predictor, SOLOv2, evaluate, load_coco, load_config, train; "
        "assert solov2_jax.evaluate is solov2_jax.evaluate_run; "
        "assert {'train', 'evaluate', 'SOLOv2'} <= set(dir(solov2_jax))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(toy.__file__).parent.parent)
    assert (Path(checkpoint.__file__).parent / "py.typed").is_file()
