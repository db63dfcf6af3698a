"""Runs, images and annotations in object storage, with a real S3-compatible server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import object_server
import pytest
import tiny_coco
import toy

from solov2_jax import io, lease, storage
from solov2_jax.checkpoint import list_steps, restore_variables
from solov2_jax.data.coco import missing_files, read_coco
from solov2_jax.data.images import read_image
from solov2_jax.data.records import split_root
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.weights.convert import flatten_dict

pytest.importorskip("s3fs")
pytest.importorskip("moto")
SECONDS = 300


@pytest.fixture(scope="module")
def bucket():
    """Returns (file system, address of a bucket); the environment leads to its server."""
    with object_server.running() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        store = io.object_store("s3://bucket")
        store.mkdir("bucket")
        yield store, "s3://bucket"


def start(workdir, *flags, count=1):
    """Returns started processes of the toy task."""
    command = [sys.executable, toy.__file__, f"--workdir={workdir}", "--cpu_devices=1", *flags]
    if count > 1:
        import test_processes

        port = test_processes.free_port()
        command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ids = [[f"--process_id={i}"] if count > 1 else [] for i in range(count)]
    return [subprocess.Popen([*command, *more], **pipes) for more in ids]


def train(workdir, *flags, count=1):
    """Returns the first process's output, after all have ended well."""
    started = start(workdir, *flags, count=count)
    outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    assert [p.returncode for p in started] == [0] * count, outputs
    return outputs[0]


def objects(store, address):
    top = address.removeprefix("s3://") + "/"
    return {name.removeprefix(top) for name in store.find(address)}


def same_variables(one, two):
    flat = [flatten_dict(restore_variables(run)[0], sep="/") for run in (one, two)]
    assert flat[0].keys() == flat[1].keys()
    return all(np.array_equal(flat[0][name], flat[1][name]) for name in flat[0])


def losses(text):
    return [(line["step"], line["loss"]) for line in map(json.loads, text.splitlines())]


def write_checkpoint(folder, step, number=1):
    for name in ("variables/d/1", "_CHECKPOINT_METADATA", "position/metadata"):
        path = folder / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} {number}")


# Whole runs


def test_a_run_killed_at_any_moment_goes_on_to_the_same_numbers(bucket, tmp_path):
    store, top = bucket
    address = f"{top}/killed/run"
    steps = "--config.train.steps=60"
    (process,) = start(address, steps, "--seconds_per_batch=0.7")
    while not any(n.endswith("position/metadata") for n in objects(store, address)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ".lock" in objects(store, address), "a kill leaves it"
    # Half a checkpoint, as a kill during an upload leaves it.
    store.pipe_file(f"{address}/checkpoints/40/variables/d/half", b"1")
    output = train(address, steps)
    assert f"{address}: worked on in" in output and "resumed" in output
    train(tmp_path / "here", steps)
    here = tmp_path / "here"
    assert same_variables(storage.local_folder(address), here)
    lines = store.cat_file(f"{address}/metrics.jsonl").decode()
    assert losses(lines) == losses((here / "metrics.jsonl").read_text())
    there = objects(store, address)
    assert ".lock" not in there and "checkpoints/40/variables/d/half" not in there
    kept = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert kept == {str(step) for step in list_steps(here)}
    assert {p.name for p in here.iterdir()} - {".lock"} <= {n.split("/")[0] for n in there}
    text = "nothing to train"
    assert text in train(address, steps), "the end is known too"


def test_two_processes_share_a_run_that_only_the_first_one_reads_and_writes(bucket, tmp_path):
    store, top = bucket
    address = f"{top}/two"
    train(address, count=2)
    output = train(address, "--config.train.steps=16", count=2)
    assert "resumed" in output and "at step 12" in output
    assert "train_process_1.log" in objects(store, address)
    train(tmp_path / "one")
    train(tmp_path / "one", "--config.train.steps=16")
    variables = [
        flatten_dict(restore_variables(run)[0], sep="/")
        for run in (storage.local_folder(address), tmp_path / "one")
    ]
    for name, value in variables[0].items():
        np.testing.assert_allclose(value, variables[1][name], rtol=0, atol=1e-6)


def test_a_server_that_does_not_answer_ends_the_command_in_one_line(bucket, tmp_path):
    for workdir, text in (
        ("s3://nowhere/run", "error: s3://nowhere/run: there is no bucket nowhere"),
        ("s3://", "error: s3://: names no bucket; write s3://BUCKET/PATH"),
    ):
        (process,) = start(workdir)
        output = process.communicate(timeout=SECONDS)[0]
        assert process.returncode == 2 and output.splitlines()[-1] == text


# The mirror


def test_everything_reaches_the_address_in_an_order_that_a_kill_leaves_whole(bucket, monkeypatch):
    store, top = bucket
    address = f"{top}/order"
    mirror = storage.Mirror(address)
    order = []
    put, delete = mirror._put_file, mirror._delete
    monkeypatch.setattr(mirror, "_put_file", lambda n: (order.append(f"+{n}"), put(n)))
    monkeypatch.setattr(mirror, "_delete", lambda n: (order.append(f"-{n}"), delete(n)))
    write_checkpoint(mirror.folder, 4)
    for name in ("best.json", ".last_checkpoint", "metrics.jsonl"):
        (mirror.folder / name).write_text(name)
    (mirror.folder / ".writing-abc").write_text("half")
    mirror.put()
    order = [name for name in order if not (mirror.folder / name[1:]).is_dir()]
    assert order[0] == "+metrics.jsonl"
    assert order[-3:] == ["+checkpoints/4/position/metadata", "+.last_checkpoint", "+best.json"]
    assert len(order) == 6, "not what is being written"
    order.clear()
    mirror.put()
    assert not order, "nothing has changed"
    write_checkpoint(mirror.folder, 8)
    for path in sorted((mirror.folder / "checkpoints" / "4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (mirror.folder / "checkpoints" / "4").rmdir()
    (mirror.folder / "best.json").unlink()
    mirror.put()
    deleted = [name for name in order if name[0] == "-"]
    assert order.index("+checkpoints/8/position/metadata") < order.index(deleted[0])
    assert deleted[0] == "-checkpoints/4/position/metadata" and deleted[-1] == "-best.json"
    assert {n.split("/")[1] for n in objects(store, address) if "/" in n} == {"8"}


def test_only_whole_checkpoints_are_seen_and_their_arrays_come_when_they_are_read(bucket):
    store, top = bucket
    address = f"{top}/lazy"
    first = storage.Mirror(address)
    write_checkpoint(first.folder, 4)
    first.put()
    store.pipe_file(f"{address}/checkpoints/8/variables/d/1", b"half")
    store.pipe_file(f"{address}/../escaped", b"x")
    store.pipe_file(f"{address}/a/../../escaped", b"x")
    folder = storage.local_folder(address)
    assert list_steps(folder) == [4]
    part = folder / "checkpoints" / "4" / "variables"
    assert not part.exists()
    storage.complete(part)
    assert (part / "d" / "1").read_text() == "variables/d/1 1"
    assert not (folder.parent / "escaped").exists()
    assert storage.local_folder(f"{address}/") == folder, "once for each address"
    with storage.mirror_of(folder).held():
        assert "checkpoints/8/variables/d/1" not in objects(store, address)


def test_a_second_run_is_kept_out_and_a_dead_one_is_not(bucket, monkeypatch):
    store, top = bucket
    address = f"{top}/lock"
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    first, second = lease.Lease(address), lease.Lease(address)
    first._content["host"] = second._content["host"] = "another"
    first.acquire()

    def renew(seconds, sleep=time.sleep):
        sleep(seconds)
        first.renew()

    monkeypatch.setattr(time, "sleep", renew)
    with pytest.raises(
        InputError, match=f"another process is training in it .process {os.getpid()}"
    ):
        second.acquire()
    monkeypatch.undo()
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    second.acquire()  # nobody renews it any more
    with pytest.raises(OSError, match="taken the run over"):
        first.renew()
    assert first.lost
    first.release()
    assert store.exists(f"{address}/.lock"), "it is the second one's"
    second.release()
    assert not store.exists(f"{address}/.lock")
    # Of a process of this host that is gone, nobody waits.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    third = lease.Lease(address)
    store.pipe_file(f"{address}/.lock", json.dumps({**third._content, "pid": dead.pid}).encode())
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1000)
    third.acquire()
    third.release()


def test_what_cannot_be_put_ends_the_run_and_stays_here(bucket, monkeypatch):
    _, top = bucket
    mirror = storage.Mirror(f"{top}/full")
    (mirror.folder / "metrics.jsonl").write_text("1")

    def refuse(*_):
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(mirror, "_put_file", refuse)
    with pytest.raises(OSError, match=r"s3://bucket/full: cannot be written .*Access Denied"):
        mirror.put()
    assert (mirror.folder.parent / ".keep").exists()
    monkeypatch.undo()
    mirror.put()
    assert not (mirror.folder.parent / ".keep").exists()


# Data


def test_images_and_annotations_are_read_where_they_are(bucket, tmp_path):
    store, top = bucket
    images, annotations = tiny_coco.write(tmp_path)
    store.put(str(images), f"{top}/data/images", recursive=True)
    store.put_file(str(annotations), f"{top}/data/a b.json")
    here = read_coco(str(images), str(annotations))
    there = read_coco(f"{top}/data/images", f"{top}/data/a b.json")
    assert len(there) == len(here) and missing_files(there) == missing_files(here) == []
    for i in range(len(here)):
        np.testing.assert_array_equal(read_image(there.path(i)), read_image(here.path(i)))
    store.rm_file(there.path(0))
    assert missing_files(read_coco(f"{top}/data/images", f"{top}/data/a b.json")) == [0]
    with pytest.raises(InputError, match="no such file"):
        read_image(there.path(0))
    store.pipe_file(there.path(0), b"")
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(there.path(0))
    with pytest.raises(InputError, match="s3://bucket/none: no such image folder"):
        missing_files(read_coco(f"{top}/none", f"{top}/data/a b.json"))
    with pytest.raises(InputError, match="no such annotation file"):
        read_coco(f"{top}/data/images", f"{top}/data/none.json")
    with pytest.raises(InputError, match="copy the shards to a disk first"):
        split_root("tfds:s3://bucket/records", "train")


def test_one_line_says_where_an_address_is_not_read(monkeypatch):
    flag = app.flags.Flag("input", app.text(), "Images.")
    flag.value = "s3://bucket/images"
    with pytest.raises(InputError, match="--input=s3://bucket/images: only --workdir"):
        app.check_objects([flag], [])
    with pytest.raises(InputError, match="--config.data.generated.root=gs://b: only"):
        app.check_objects([], ["--config.data.generated.root=gs://b"])
    app.check_objects([], ["--config.data.train.images=s3://bucket/images"])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        InputError, match=r"needs the package gcsfs: pip install 'solov2_jax\[gcs\]'"
    ):
        io.read_bytes("gs://bucket/x")
    assert io.list_folder(Path(__file__).parent) and not io.is_object("/s3://x")
