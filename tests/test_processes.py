"""Several processes: two with two emulated devices each, talking through gloo."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import auto_batch_part
import evaluate_painted
import evaluate_part
import jax
import numpy as np
import pytest
import tiny_coco
import toy
from flax.traverse_util import flatten_dict
from test_own_data import as_bare_coco

from solov2_jax import cluster, distributed
from solov2_jax.checkpoint import list_steps, restore_variables

# Gradients of the same rows are added in another order.
TOLERANCE = 1e-6
SECONDS = 600  # for a machine that does other things too


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(script, *arguments, count=2, devices=2, last=()):
    """Returns `count` started processes; `last` are arguments of the last one only."""
    address = f"--coordinator=localhost:{free_port()}"
    command = [sys.executable, script.__file__, f"--cpu_devices={devices}", *arguments]
    command += ["--heartbeat_timeout=10"]
    if count > 1:
        command += [address, f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [
                *command,
                *([f"--process_id={i}"] if count > 1 else []),
                *(last if i == count - 1 else ()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(started):
    """Returns [(exit code, output)] of the distributed."""
    outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    return [(p.returncode, text) for p, text in zip(started, outputs, strict=True)]


def train(workdir, *arguments, **options):
    """Trains and returns the first process's output."""
    results = finish(start(toy, f"--workdir={workdir}", *arguments, **options))
    assert all(code == 0 for code, _ in results), results
    return results[0][1]


def variables_of(workdir, step="last"):
    variables, _ = restore_variables(workdir, step)
    return flatten_dict(jax.device_get(variables), sep="/")


def assert_close(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=TOLERANCE)


def lines_of(workdir):
    text = (Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the workdirs of one process with four devices, and of two with two."""
    folder = tmp_path_factory.mktemp("runs")
    every = "--config.train.eval_every=6"
    one = start(toy, f"--workdir={folder / 'one'}", every, count=1, devices=4)
    two = start(toy, f"--workdir={folder / 'two'}", every)
    for code, output in finish([*one, *two]):
        assert code == 0, output
    return folder / "one", folder / "two"


def test_two_processes_compute_what_one_does(runs):
    one, two = runs
    assert_close(variables_of(two), variables_of(one))
    assert list_steps(two) == list_steps(one)
    for a, b in zip(lines_of(two), lines_of(one), strict=True):
        assert a["step"] == b["step"]
        for key in ("loss", "grad_norm", "learning_rate", "num_pairs"):
            assert a[key] == pytest.approx(b[key], abs=TOLERANCE)
        assert ("segm/AP" in a) == ("segm/AP" in b)


def test_the_first_process_writes_and_the_second_logs(runs):
    one, two = runs
    extra = {p.name for p in two.iterdir()} ^ {p.name for p in one.iterdir()}
    assert extra == {"train_process_1.log"}
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert "resumed" not in (two / "train_process_1.log").read_text()


def test_a_run_continues_with_another_number_of_processes(runs, tmp_path):
    one, two = (shutil.copytree(run, tmp_path / run.name) for run in runs)
    longer = "--config.train.steps=16"
    # Two take over what one has left, and the other way round.
    assert f"resumed {one} at step 12" in train(one, longer)
    assert f"resumed {two} at step 12" in train(two, longer, count=1, devices=1)
    assert list_steps(one)[-1] == list_steps(two)[-1] == 16
    assert_close(variables_of(one), variables_of(two))


def test_four_processes_restore_and_continue_as_one(runs, tmp_path):
    longer = "--config.train.steps=14"
    one, four = (shutil.copytree(runs[0], tmp_path / name) for name in ("one", "four"))
    train(one, longer, count=1, devices=4)
    assert f"resumed {four} at step 12" in train(four, longer, count=4, devices=1)
    assert_close(variables_of(four), variables_of(one))
    for a, b in zip(lines_of(four), lines_of(one), strict=True):
        assert a["step"] == b["step"] and ("segm/AP" in a) == ("segm/AP" in b)
        for key in {"loss", "segm/AP"} & b.keys():
            assert a[key] == pytest.approx(b[key], abs=TOLERANCE)


def test_a_checkpoint_that_is_damaged_is_so_for_all(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    files = (run / "checkpoints" / "12" / "variables").rglob("*")
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:50])
    output = train(run)
    assert f"resumed {run} at step 8" in output
    assert (run / "checkpoints_unreadable" / "12").is_dir()
    assert_close(variables_of(run), variables_of(runs[0]))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(runs, tmp_path, victim):
    run = tmp_path / "run"
    slow = ("--seconds_per_batch=0.2", "--config.train.steps=500")
    started = start(toy, f"--workdir={run}", *slow)
    while not list_steps(run):
        assert started[0].poll() is None, started[0].communicate()[0]
        time.sleep(0.1)
    killed, other = started[victim], started[1 - victim]
    killed.send_signal(signal.SIGKILL)
    before = time.monotonic()
    output = other.communicate(timeout=SECONDS)[0]
    killed.communicate(timeout=SECONDS)
    assert other.returncode != 0
    assert time.monotonic() - before < 120, "heartbeats of 10 s, on a busy machine"
    ours = rf"error: process {1 - victim} of 2: an operation .* another process ended"
    jaxs = "Terminating process because the JAX distributed service detected fatal"
    assert re.search(f"{ours}|{jaxs}", output), output
    train(run, f"--config.train.steps={list_steps(run)[-1] + 2}")


def test_an_error_of_one_process_ends_both(tmp_path):
    (first, _), (code, output) = finish(start(toy, f"--workdir={tmp_path}", last=("--fail_at=5",)))
    assert code == 2 and "error: process 1 of 2: image 5 is broken" in output
    assert first != 0
    assert list_steps(tmp_path) == [4]


def test_sigterm_at_one_process_saves_and_ends_both(runs, tmp_path):
    slow = ("--seconds_per_batch=0.2", "--config.train.steps=500")
    started = start(toy, f"--workdir={tmp_path}", *slow)
    while not list_steps(tmp_path):
        assert started[0].poll() is None, started[0].communicate()[0]
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    (code, output), (other, told) = finish(started)
    assert (code, other) == (0, 0), output + told
    assert "stopped by another process after step" in output
    assert "SIGTERM: saving a checkpoint" in told
    assert list_steps(tmp_path)[-1] == lines_of(tmp_path)[-1]["step"] < 500


@pytest.fixture(scope="module")
def evaluated_alone(tmp_path_factory):
    """Returns what one process says of its evaluations."""
    folder = tmp_path_factory.mktemp("alone")
    images, annotations = tiny_coco.write(folder)
    given = (f"--images={images}", f"--annotations={annotations}", f"--out={folder / 'out'}")
    ((code, text),) = finish(start(evaluate_part, *given, count=1, devices=1))
    assert code == 0, text
    return text


@pytest.mark.parametrize("count", [2, 4])
def test_evaluation_counts_every_image_once_and_ends_when_one_process_is_told(
    evaluated_alone, tmp_path, count
):
    images, annotations = tiny_coco.write(tmp_path)
    out = tmp_path / "out"
    given = (f"--images={images}", f"--annotations={annotations}", f"--out={out}")
    results = finish(start(evaluate_part, *given, count=count, devices=1))
    text = "".join(text for _, text in results)
    assert all(code == 0 for code, _ in results), text
    assert text.count("segm/AP 1.000") == 2 * count, "all processes know both results"
    for index in range(count):
        number = 1 if index == 0 else 0
        assert f"one: process {index} predicted {number} batches" in text
        assert f"told: process {index} predicted 4 batches" in text, "of 20 and more"
    said = re.findall("all metrics: .*", text)
    assert said == re.findall("all metrics: .*", evaluated_alone) * count
    metrics = json.loads(said[0].partition(": ")[2])
    assert metrics["segm/AP"] == pytest.approx(1) and metrics["fewer/segm/AP"] < 1
    written = json.loads((out / "training" / "eval" / "fewer" / "metrics.json").read_text())
    assert written["segm/AP"] == metrics["fewer/segm/AP"] and written["num_images"] == 3
    assert not (out / "told" / "metrics.json").exists()
    for name, number in (("all", 3), ("one", 1)):
        assert json.loads((out / name / "metrics.json").read_text())["num_images"] == number
    found = json.loads((out / "all" / "predictions.json").read_text())
    assert [r["image_id"] for r in found] == [3, 7, 7]


def test_results_are_those_of_one_device_on_any_number_of_devices_and_processes(tmp_path):
    evaluate_painted.write_data(tmp_path / "data")
    written = {}
    for name, count, devices in (("one", 1, 1), ("eight", 1, 8), ("two", 2, 2)):
        flags = (f"--folder={tmp_path / 'data'}", f"--out={tmp_path / name}")
        results = finish(start(evaluate_painted, *flags, count=count, devices=devices))
        text = "".join(text for _, text in results)
        assert all(code == 0 for code, _ in results), text
        assert f"prediction on {devices} device(s): cpu" in results[0][1]
        files = ("predictions.json", "metrics.json")
        written[name] = [(tmp_path / name / file).read_bytes() for file in files]
    assert written["one"] == written["eight"] == written["two"], "to the bit"
    number = len(json.loads(written["one"][0]))
    assert number > len(evaluate_painted.SIZES)
    assert f"process 0: {number} results" in results[0][1], "the first one has all"
    own = re.search(r"process 1: (\d+) results", results[1][1])
    assert own and 0 < int(own[1]) < number
    assert results[1][1].count("96, 3)") == 1, "few shapes for each process"


def test_auto_batch_of_a_folder_is_what_fits_into_the_smallest_memory(tmp_path):
    as_bare_coco(tmp_path / "photos")
    given = [f"--data={tmp_path / 'photos'}", "--config.train.batch_size=auto"]
    results = finish(start(auto_batch_part, *given, f"--workdir={tmp_path / 'run'}", devices=1))
    assert all(code == 0 for code, _ in results), results
    said = [re.findall("chosen: .*", text) for _, text in results]
    assert said[0] == said[1] and said[0][0].startswith("chosen: (4, "), said
    table = results[0][1]
    assert re.search(r"\b4 +2\.00   chosen, compiled", table), "2 for each; the first alone: 4"


# Without other processes


def test_the_cluster_is_known_by_its_variables():
    assert cluster.find_cluster({}) == ""
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}
    assert cluster.find_cluster(step) == "Slurm"
    script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert cluster.find_cluster(script) == "", "a batch script is one process"
    assert cluster.find_cluster({**step, "SLURM_STEP_NUM_TASKS": "1"}) == ""
    assert cluster.find_cluster({"OMPI_COMM_WORLD_SIZE": "4"}) == "Open MPI"
    assert cluster.find_cluster({"TPU_WORKER_HOSTNAMES": "a"}) == ""
    assert "GKE" in cluster.find_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert cluster.find_cluster({"JAX_COORDINATOR_ADDRESS": "a:1"})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "a:1"}, "--coordinator needs --num_processes and"),
        ({"coordinator": "a:1", "process_id": 0}, "--coordinator needs"),
        ({"num_processes": 2, "process_id": 0}, "need --coordinator=HOST:PORT"),
        ({"mode": "off", "process_id": 1}, "--distributed=off contradicts"),
    ],
)
def test_incomplete_settings_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        cluster.initialize(cluster.Joining(**given))


def test_alone_nothing_is_waited_for():
    assert not cluster.initialize(cluster.Joining(mode="off"))
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast_from_host0(lambda: (1, 2)) == (1, 2)
    distributed.barrier("nobody else")
    agree_on_stop = distributed.AgreeOnStop(distributed.make_mesh())
    assert [agree_on_stop(wish) for wish in (False, True, False)] == [False, True, False]


def test_rows_of_a_batch_follow_the_order_of_the_processes():
    devices = distributed.make_mesh().devices.tolist()
    assert devices == sorted(devices, key=lambda d: (d.process_index, d.id))
