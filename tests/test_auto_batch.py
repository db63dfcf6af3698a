"""`train.batch_size = "auto"`: what a step takes, what there is, and what is chosen."""

import copy
import json
import logging

import numpy as np
import pytest
import tiny_coco
import toy
from tiny_network import tiny_config

from configs import quickstart
from solov2_jax import distributed
from solov2_jax.config import load_config, read_config
from solov2_jax.io import InputError
from solov2_jax.tools.cli.train import overfit_config
from solov2_jax.tools.dry_run import dry_run
from solov2_jax.training import memory
from solov2_jax.training.build import in_steps
from solov2_jax.training.loop import train
from solov2_jax.training.optim import rate_scale

GB = 2**30
DEVICES = 8  # of the tests


@pytest.fixture
def linear(monkeypatch):
    """A step takes 1 GB and half a GB for each image on a device; returns what was compiled."""
    compiled = []

    def compile_step(step, state, batch, shape):
        images = len(batch["image"].sharding.mesh.devices.flat)
        images = batch["image"].shape[0] // images
        compiled.append(images)
        return memory.StepMemory(shape, 1.0, 0.0, GB, images * GB // 2)

    monkeypatch.setattr(memory, "compile_step", compile_step)
    monkeypatch.setattr(memory, "memory_limit", lambda: (10 * GB, "a test"))
    return compiled


def config_of(**changes):
    config = tiny_config()
    config.train.batch_size = "auto"
    for key, value in changes.items():
        config.train[key] = value
    return config


def test_the_largest_that_fits_is_chosen_and_the_table_says_why(linear, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    number, lines = memory.choose_batch_size(config_of(), (64, 64), 8)
    # 1 + n / 2 <= 10: 18 images, and 16 is the next smaller one that is tried.
    assert number == 16 * DEVICES and linear == [2, 4]
    rows = {int(line.split()[0]): line for line in lines[2:]}
    assert rows[16 * DEVICES].endswith("9.00   chosen")
    assert rows[24 * DEVICES].endswith("13.00   too much")
    assert rows[2 * DEVICES].endswith("2.00   compiled")
    assert "a device may take 10.00 GB: a test" in lines[0] and lines[0] in caplog.text
    assert "compiling the step for 16 and 32 images" in caplog.text


@pytest.mark.parametrize(
    ("changes", "images", "wanted"),
    [
        ({"accumulate": 3}, None, 6 * 3 * DEVICES),  # 18 images on a device, by threes
        ({}, 16 * 5 * DEVICES, 4 * DEVICES),  # an epoch has 16 steps
        ({}, 3, DEVICES),
    ],
)
def test_it_is_divisible_and_an_epoch_keeps_its_steps(linear, changes, images, wanted):
    number, _ = memory.choose_batch_size(config_of(**changes), (64, 64), 8, images)
    assert number == wanted


def test_nothing_fits_is_a_warning_and_the_smallest_batch(linear, monkeypatch, caplog):
    monkeypatch.setattr(memory, "memory_limit", lambda: (GB, "a test"))
    number, lines = memory.choose_batch_size(config_of(), (64, 64), 8)
    assert number == DEVICES and "no batch fits" in lines[-1]
    assert caplog.records[-1].levelname == "WARNING"


def test_a_rate_far_above_its_own_is_told(linear):
    config = config_of()
    config.optim.reference_batch_size = 4
    _, lines = memory.choose_batch_size(config, (64, 64), 8)
    assert "the rate is 32 times the one for 4 images" in lines[-1]


def test_all_processes_take_what_the_smallest_can(linear, monkeypatch):
    others = lambda own: [own, [own[0], own[1] + GB, own[2] // 2]]  # noqa: E731
    monkeypatch.setattr(distributed, "gather", others)
    number, _ = memory.choose_batch_size(config_of(), (64, 64), 8)
    assert number == 4 * DEVICES  # a GB for each image, within 5


def test_the_estimate_is_what_a_larger_batch_takes():
    mesh = distributed.make_mesh(1)
    step, state, _ = memory.build_step(memory.with_batch_size(config_of(), 1, ()), mesh)
    takes = []
    for n in (2, 4, 12):
        batch = memory.batch_shapes(n, 8, 64, 64, mesh)
        takes.append(memory.compile_step(step, state, batch, (64, 64)).total)
    first, second, third = takes
    assert first < second < third
    assert first + 5 * (second - first) == pytest.approx(third, rel=0.1)


# --- What there is -------------------------------------------------------------------


def group(folder, version, limit, used, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def groups_of(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)
    return root / "sys/fs/cgroup"


def test_control_groups_are_respected(tmp_path):
    assert memory.cgroup_available(tmp_path) is None  # not Linux
    two = groups_of(tmp_path / "two", "0::/a/b\n")
    assert memory.cgroup_available(tmp_path / "two") is None
    group(two / "a/b", 2, "max", 100)
    assert memory.cgroup_available(tmp_path / "two") is None
    group(two / "a", 2, 1000, 700, 200)  # the one above limits
    assert memory.cgroup_available(tmp_path / "two") == 500
    group(two / "a/b", 2, 400, 300)
    assert memory.cgroup_available(tmp_path / "two") == 100
    group(two / "a/b", 2, 400, 500)
    assert memory.cgroup_available(tmp_path / "two") == 0
    # In a container: the path is the host's, the folder is the group's own.
    inside = groups_of(tmp_path / "inside", "0::/docker/0123\n")
    group(inside, 2, 900, 100)
    assert memory.cgroup_available(tmp_path / "inside") == 800
    one = groups_of(tmp_path / "one", "5:cpu,cpuacct:/x\n7:memory:/x\n1:name=systemd:/\n")
    group(one / "memory" / "x", 1, 600, 500, 50)
    group(one / "memory", 1, 2**63 - 4096, 500)
    assert memory.cgroup_available(tmp_path / "one") == 150


def test_devices_of_a_cpu_share_a_part_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_available", lambda: 8 * GB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Stats(available=16 * GB))
    limit, text = memory.memory_limit()
    assert limit == pytest.approx(0.7 * GB, rel=0.01)
    assert text == "70 % of the 8.0 GB left by the control group's limit, shared by 8 CPU devices"
    monkeypatch.setattr(memory, "cgroup_available", lambda: None)
    assert memory.memory_limit()[0] == pytest.approx(1.4 * GB, rel=0.01)


class Stats:
    platform, device_kind = "gpu", "Card"

    def __init__(self, **values):
        self.__dict__.update(values)

    def memory_stats(self):
        return self.stats


def test_accelerators_tell_their_limit(monkeypatch):
    cards = [Stats(stats={"bytes_limit": n * GB}) for n in (20, 10)]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: cards)
    limit, text = memory.memory_limit()
    assert limit == 9 * GB and text == "90 % of 10.0 GB of a Card"
    cards[0].stats = None
    with pytest.raises(InputError, match="Card does not tell its memory; give a number"):
        memory.memory_limit()


# --- The config and the run ----------------------------------------------------------


def test_the_word_is_taken_anywhere_and_the_rate_remembers_the_number(tmp_path):
    flag = "--config.train.batch_size"
    config = load_config("quickstart", [f"{flag}=auto"])
    assert config.train.batch_size == "auto" and config.optim.reference_batch_size == 4
    assert copy.deepcopy(config).train.batch_size == "auto"
    chosen = in_steps(memory.with_batch_size(config, 12, ["why"]), None)
    assert rate_scale(chosen) == 3 and chosen.user.batch_size == ("why",)
    (tmp_path / "own.py").write_text(
        "from configs import quickstart\n\ndef get_config():\n"
        "    config = quickstart.get_config()\n    config.train.batch_size = 'auto'\n"
        "    return config\n"
    )
    config = load_config(str(tmp_path / "own.py"))
    assert config.train.batch_size == "auto" and config.optim.reference_batch_size == 4
    given = load_config("quickstart", [f"{flag}=auto", "--config.optim.reference_batch_size=32"])
    assert given.optim.reference_batch_size == 32
    number = load_config("quickstart", [f"{flag}=6"])
    assert number.train.batch_size == 6 and number.optim.reference_batch_size == 0
    for word in ("aut", "0", "1.5", "true"):
        with pytest.raises(InputError, match="train.batch_size = .* must be"):
            load_config("quickstart", [f"{flag}={word}"])
    config = quickstart.get_config()
    config.train.batch_size = "auto"
    assert overfit_config(config, 5).train.batch_size == 5


def test_a_dry_run_chooses_too(linear, monkeypatch):
    config = config_of()
    config.input.buckets_train = ((32, 64), (64, 64))
    monkeypatch.setattr("solov2_jax.tools.dry_run.compile_step", memory.compile_step)
    rows, notes = dry_run(config)
    assert len(rows) == 2 and linear == [2, 4, 16, 16]
    assert any(note.startswith("train.batch_size = 128 by memory") for note in notes)


def test_a_resumed_run_keeps_the_batch_of_its_start(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    images, annotations = tiny_coco.write(tmp_path)
    config = toy.toy_config(train__steps=3)
    config.train.batch_size = "auto"
    config.data.train.images, config.data.train.annotations = images, annotations
    asked = []

    def choose(config, shape, slots, images, boxes_only):
        asked.append((config.model.num_classes, slots, images))
        return 16, ["the table"]

    monkeypatch.setattr(memory, "choose_batch_size", choose)
    run = tmp_path / "run"
    train(config, run, toy.toy_task)
    assert asked == [(2, 8, 3)] and config.train.batch_size == "auto"
    stored = read_config(run / "config.json")
    assert (stored.train.batch_size, stored.user.batch_size) == (16, ("the table",))
    config.train.steps = 5
    train(config, run, toy.toy_task)
    assert len(asked) == 1 and "train.batch_size = 16, as this run began" in caplog.text
    assert read_config(run / "config.json").user.batch_size == ("the table",)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 5
    assert np.isfinite(stored.optim.learning_rate)
