"""`train --data`: what is printed, set, written and refused."""

import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_own_data
from safetensors.numpy import save_file
from test_own_data import as_bare_coco, as_official_coco, as_yolo

from solov2_jax.config import save_config
from solov2_jax.data.build import build_train_batches, load_datasets
from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError
from solov2_jax.tools.cli import flags, own_data
from solov2_jax.tools.cli import train as command
from solov2_jax.tools.importers.kept import PARTS, forgotten_if_refused
from solov2_jax.training import restore
from solov2_jax.training.build import fingerprint, in_steps
from solov2_jax.weights.settings import check_settings
from solov2_jax.weights.sources import read_weights


def settings(*words):
    """Returns the config of a command line."""
    return command.read_settings(flags.parse(command.FLAGS, list(words)))


@pytest.fixture(autouse=True)
def flags_as_they_were():
    yield
    for flag in command.FLAGS:
        flag.value, flag.present = flag.default, False


def test_what_was_found_is_said_set_and_kept(tmp_path, capsys):
    as_bare_coco(tmp_path / "photos")
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run", "--epochs=3")
    config = settings(*words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 14
    assert (
        lines[0]
        == f"{tmp_path}/photos: COCO, 12 images, {sum(test_own_data.WANTED.values())} objects"
    )
    assert "has no validation part: 2 of 12 images are split off" in lines[1]
    assert lines[2].startswith("classes: 2: ")
    data = tmp_path / "run" / "data"
    assert {p.name for p in data.iterdir()} == {"train.json", "val.json", "source.json"}
    assert config.data.train.annotations == str(data / "train.json")
    assert config.model.num_classes == 2 and config.train.epochs == 3
    # From random weights, small pictures: every line says which keys and why.
    assert config.model.backbone.norm == "gn" and config.input.min_size_test == 320
    assert [f"set: {line}" for line in config.user.derived] == lines[3:]
    assert not any("train.epochs" in line for line in lines)  # it was given
    again = settings(*words)
    assert again == config


def test_what_is_given_stays(tmp_path):
    as_yolo(tmp_path / "photos")
    config = settings(
        f"--data={tmp_path}/photos",
        f"--workdir={tmp_path}/run",
        "--config.input.min_size_test=64",
        "--config.train.batch_size=3",
        "--config.train.steps=2",
    )
    assert (config.input.min_size_test, config.train.batch_size) == (64, 3)
    assert (config.train.steps, config.train.epochs, config.train.patience) == (2, 0, 0)
    named = settings(f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run", "--config=r50_1x")
    assert named.input.min_size_test == 800 and named.train.steps == 90_000
    assert named.data.train.images == str(tmp_path / "photos" / "images" / "train")


def test_settings_of_the_weights_are_adopted(tmp_path, monkeypatch):
    as_yolo(tmp_path / "photos")
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run", "--config.init_from=a.npz")
    with pytest.raises(InputError, match="init_from = 'a.npz': no such file or folder"):
        settings(*words)
    weights = SimpleNamespace(
        settings={
            "input.channel_order": "RGB",
            "input.std": [58.395, 57.12, 57.375],
            "model.backbone.stride_in_1x1": False,
            "model.num_classes": 80,
            "norm_eps": 1e-5,
        }
    )
    monkeypatch.setattr(restore, "read_init", lambda source: weights)
    config = settings(*words, "--config.input.std=(1.0, 1.0, 1.0)")
    assert config.input.channel_order == "RGB" and not config.model.backbone.stride_in_1x1
    assert config.input.std == (1.0, 1.0, 1.0) and config.model.num_classes == 2
    assert config.model.backbone.norm == "frozen_bn"
    assert config.user.derived[0] == (
        "input.channel_order = RGB, model.backbone.stride_in_1x1 = False: as the weights a.npz "
        "were trained"
    )


def write_backbone(path):
    """Writes a file with torchvision's names; RGB, its stride in the 3x3."""
    arrays = {"layer1.0.conv1.weight": np.zeros((8, 8, 1, 1), np.float32)}
    save_file(arrays, path)
    return str(path)


def test_without_data_the_weights_settings_are_adopted_too(tmp_path, capsys):
    weights = write_backbone(tmp_path / "w.safetensors")
    words = ("--config=r50_1x", f"--workdir={tmp_path}/run", f"--config.init_from={weights}")
    config = settings(*words)
    assert capsys.readouterr().out == (
        "set: input.channel_order = RGB, input.mean = (123.675, 116.28, 103.53), input.std = "
        f"(58.395, 57.12, 57.375), model.backbone.stride_in_1x1 = False: as the weights {weights} "
        "were trained\n"
    )
    assert config.input.channel_order == "RGB" and config.init_from_ignores == ()
    check_settings(read_weights(weights).settings, config, weights)
    # What is given stays, and then contradicts on purpose.
    config = settings(*words, "--config.input.channel_order=BGR")
    assert config.input.channel_order == "BGR" and config.input.std[0] == 58.395
    assert config.init_from_ignores == ("input.channel_order",)
    check_settings(
        read_weights(weights).settings, config, weights, ignored=config.init_from_ignores
    )


def test_a_run_resumes_without_its_first_weights(tmp_path, capsys):
    weights = write_backbone(tmp_path / "w.safetensors")
    words = ("--config=r50_1x", f"--workdir={tmp_path}/run", f"--config.init_from={weights}")
    config = settings(*words)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    save_config(config, tmp_path / "run" / "config.json")
    report = {"settings": read_weights(weights).settings}
    (tmp_path / "run" / "init_from.json").write_text(json.dumps(report))
    os.remove(weights)
    assert settings(*words) == config
    assert settings(*words[:2], "--config.init_from=hf:no/where").input == config.input
    (tmp_path / "run" / "init_from.json").write_text("[]")
    with pytest.raises(InputError, match="init_from.json: cannot be read .* Delete it"):
        settings(*words)
    (tmp_path / "run" / "init_from.json").unlink()
    assert settings(*words) == config
    with pytest.raises(InputError, match="init_from = .* no such file or folder; give a weights"):
        settings(words[0], f"--workdir={tmp_path}/new", words[2])


def test_a_refused_run_takes_its_split_back(tmp_path):
    as_bare_coco(tmp_path / "photos")
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/runs/mine")
    overrides = flags.parse(command.FLAGS, [*words, "--config.distill_from=none"])
    with pytest.raises(InputError, match="distill_from"):
        command.main(overrides)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [InputError, ValueError, KeyboardInterrupt])
def test_what_was_imported_goes_unless_the_run_has_begun(tmp_path, error):
    folder = tmp_path / "run" / "data"
    for begun in (False, True):
        with pytest.raises(error), forgotten_if_refused(folder, lambda: begun):  # noqa: B023
            folder.mkdir(parents=True)
            (folder / "train.json").write_text("{}")
            raise error
        assert folder.exists() == begun and (tmp_path / "run").exists() == begun


def test_a_run_keeps_its_split_and_refuses_another(tmp_path):
    as_bare_coco(tmp_path / "photos")
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run")
    settings(*words)
    first = (tmp_path / "run" / "data" / "val.json").read_text()
    settings(*words, "--config.seed=1")  # nothing was trained yet
    assert (tmp_path / "run" / "data" / "val.json").read_text() != first
    settings(*words)
    assert (tmp_path / "run" / "data" / "val.json").read_text() == first
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    settings(*words)
    with pytest.raises(InputError, match="trained on other data .*images more"):
        settings(*words, "--config.seed=1")
    content = json.loads((tmp_path / "photos" / "labels.json").read_text())
    content["annotations"].pop()
    (tmp_path / "photos" / "labels.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="objects and not"):
        settings(*words)


def test_files_of_the_data_set_are_used_and_nothing_is_written(tmp_path):
    as_official_coco(tmp_path / "coco")
    words = [f"--data={tmp_path}/coco", f"--workdir={tmp_path}/run"]
    config = settings(*words)
    assert config.data.val.annotations == str(
        tmp_path / "coco" / "annotations" / "instances_val2017.json"
    )
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path / "coco" / "val2017")
    with pytest.raises(InputError, match="its images, such as"):
        settings(*words)


def test_boxes_alone_are_trained_on_unless_told_otherwise(tmp_path):
    as_bare_coco(tmp_path / "photos")
    content = json.loads((tmp_path / "photos" / "labels.json").read_text())
    for record in content["annotations"]:
        del record["segmentation"]
    (tmp_path / "photos" / "labels.json").write_text(json.dumps(content))
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run")
    with pytest.raises(InputError, match="no object is left to train on"):
        settings(*words, "--config.loss.box_supervised=False")
    assert not (tmp_path / "run").exists()
    config = settings(*words)
    objects = load_coco(config.data.train.images, config.data.train.annotations, boxes=True)
    assert len(objects.labels) and not objects.has_mask.any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--config is missing, or --data"),
        (("--classes=cat",), "--classes goes with --data"),
        (("--data=none",), "--data none: there is no such folder"),
        (("--data=tfds:a", "--data=b"), "records are used alone"),
        (("--data=.", "--data=."), "given twice"),
    ],
)
def test_wrong_use_is_one_error_and_writes_nothing(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        settings(f"--workdir={tmp_path}/run", *words)
    assert not (tmp_path / "run").exists()


def test_a_preset_that_is_named_keeps_its_settings_and_epochs_go_without_data(tmp_path):
    config = settings("--config=r50_1x", f"--workdir={tmp_path}/run", "--epochs=2")
    assert config.train.epochs == 2 and not config.data.advice


def test_what_was_imported_is_not_imported_again(tmp_path, monkeypatch, capsys):
    as_yolo(tmp_path / "photos")
    words = (f"--data={tmp_path}/photos", f"--workdir={tmp_path}/run")
    config = settings(*words)
    data = tmp_path / "run" / "data"
    texts = [(data / name).read_text() for name in PARTS]
    calls = []
    original = own_data.recognise
    monkeypatch.setattr(own_data, "recognise", lambda place: calls.append(place) or original(place))
    capsys.readouterr()
    assert settings(*words) == config and not calls
    assert "as imported before; the data is unchanged" in capsys.readouterr().out
    # Another flag, another file, a touched file, a damaged json: each imports again.
    settings(*words, "--val_share=0.3", "--config.seed=3")
    assert len(calls) == 1
    settings(*words)
    assert len(calls) == 2
    (label,) = list((tmp_path / "photos" / "labels" / "val").iterdir())[:1]
    label.write_text(label.read_text() + "\n")
    settings(*words)
    assert len(calls) == 3
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (data / "train.json").write_text("{")
    settings(*words)  # gives what it gave, and that is put back
    assert len(calls) == 4 and [(data / name).read_text() for name in PARTS] == texts
    (data / "train.json").write_text("{")
    label.unlink()
    with pytest.raises(InputError, match="trained on other data .*train.json: is damaged"):
        settings(*words)


def test_folders_have_weights(tmp_path, capsys):
    as_yolo(tmp_path / "a")
    as_bare_coco(tmp_path / "b")
    words = [f"--data={tmp_path}/{n}" for n in "ab"] + [f"--workdir={tmp_path}/run", "--epochs=4"]
    config = settings(*words, "--data_weights=2,0.5", "--config.train.batch_size=1")
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "data" / "train.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    number = {n: sum(name.startswith(f"{n}/") for name in names) for n in "ab"}
    shown = 2 * number["a"] + 0.5 * number["b"]
    assert f"weights: an epoch has {shown:.0f} images" in said
    assert f"{tmp_path}/b: weight 0.5: {0.5 * number['b']:.0f} images" in said
    with config.unlocked():
        config.data.num_workers = 0
    train = load_datasets(config)[0]
    assert in_steps(config, train).train.steps == math.ceil(4 * shown)
    schedule = build_train_batches(in_steps(config, train), train).maker.schedule
    drawn = np.bincount(schedule.image.ravel(), minlength=len(names))
    is_a = np.array([name.startswith("a/") for name in train.file_names])
    # Two copies an epoch, and one in two epochs: exactly, in whole epochs.
    assert set(drawn[is_a]) == {8} and set(drawn[~is_a]) == {2}
    assert fingerprint(train) != fingerprint(replace(train, weights=np.ones(len(train))))
    for wrong, message in (("2", "has 1 numbers for 2"), ("2,0", "must be"), ("x,1", "must be")):
        with pytest.raises(InputError, match=f"--data_weights.*{message}"):
            settings(*words, f"--data_weights={wrong}")
