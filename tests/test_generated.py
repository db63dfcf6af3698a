"""The embedded data set: deterministic, complete or absent, exact masks."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from configs import quickstart
from solov2_jax.config import load_config, save_config
from solov2_jax.data import build
from solov2_jax.data.coco import load_coco
from solov2_jax.tools.synthetic import shapes

# pycocotools 2.0.11, under numpy 2: decode lacks a keyword of the array protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
SETTINGS = shapes.ShapesSettings(num_train=40, num_val=8, height=64, width=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data set, written once."""
    return shapes.write_shapes(str(tmp_path_factory.mktemp("shapes")), SETTINGS)


def load(folder, split):
    """Returns a split."""
    images = os.path.join(folder, split)
    return load_coco(images, os.path.join(folder, f"instances_{split}.json"))


def test_it_is_an_ordinary_coco_folder(folder):
    train, val = load(folder, "train"), load(folder, "val")
    assert (len(train), len(val)) == (40, 8)
    assert train.category_ids == val.category_ids == (2, 3, 5, 7, 11)
    assert not set(train.image_ids) & set(val.image_ids)
    assert set(train.labels) == set(range(5))
    runs = [len(train.segmentations.run_lengths(i)) for i in range(len(train.labels))]
    assert any(runs) and not all(runs)
    assert not {k for k in train.counts if k.startswith(("no_", "bad", "empty"))} & {
        k for k, v in train.counts.items() if v
    }
    assert {Path(str(n)).suffix for n in train.file_names} == {".png", ".jpg"}


def test_masks_are_exact_and_do_not_overlap():
    settings = dataclasses.replace(SETTINGS, crowd_fraction=0.5)
    kinds = {"polygon": 0, "list": 0, "string": 0, "crowd": 0}
    for i in range(60):
        rng = np.random.default_rng(i)
        picture, objects = shapes.draw_scene(rng, settings)
        assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8
        total = np.zeros((64, 96), int)
        for obj in objects:
            shape = obj["segmentation"]
            if isinstance(shape, list):
                kinds["polygon"] += 1
                runs = coco_mask.merge(coco_mask.frPyObjects(shape, 64, 96))
            elif isinstance(shape["counts"], str):
                kinds["string"] += 1
                runs = shape
            else:
                kinds["list"] += 1
                runs = coco_mask.frPyObjects(shape, 64, 96)
            mask = coco_mask.decode(runs)
            assert mask.sum() == obj["area"]
            np.testing.assert_allclose(coco_mask.toBbox(runs), obj["bbox"])
            if obj["iscrowd"]:
                kinds["crowd"] += 1
            else:
                total += mask
        assert total.max(initial=0) <= 1
    assert min(kinds.values()) > 3, kinds


def test_empty_images_and_counts_are_as_asked():
    settings = dataclasses.replace(SETTINGS, empty_fraction=0.5, crowd_fraction=0.0)
    numbers = [len(shapes.draw_scene(np.random.default_rng(i), settings)[1]) for i in range(80)]
    assert 25 < numbers.count(0) < 55
    assert max(numbers) <= settings.max_objects


def test_same_seed_same_files(tmp_path, folder):
    again = shapes.write_shapes(str(tmp_path), SETTINGS)
    names = sorted(p.relative_to(folder) for p in Path(folder).rglob("*.*"))
    assert names == sorted(p.relative_to(again) for p in Path(again).rglob("*.*"))
    for name in names:
        assert (Path(folder) / name).read_bytes() == (Path(again) / name).read_bytes()


def test_other_settings_get_another_folder(tmp_path):
    small = dataclasses.replace(SETTINGS, num_train=2, num_val=1)
    first = shapes.write_shapes(str(tmp_path), small)
    other = shapes.write_shapes(str(tmp_path), dataclasses.replace(small, seed=1))
    assert first != other
    stamp = os.stat(os.path.join(first, "settings.json")).st_mtime_ns
    assert shapes.write_shapes(str(tmp_path), small) == first
    assert os.stat(os.path.join(first, "settings.json")).st_mtime_ns == stamp
    settings = json.loads(Path(first, "settings.json").read_text())
    assert settings["num_train"] == 2


def test_a_half_written_folder_is_never_used(tmp_path, monkeypatch):
    small = dataclasses.replace(SETTINGS, num_train=3, num_val=1)
    real, calls = shapes._write_split, []

    def killed(folder, split, *rest):
        calls.append(split)
        if split == "val":
            raise KeyboardInterrupt
        real(folder, split, *rest)

    monkeypatch.setattr(shapes, "_write_split", killed)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(str(tmp_path), small)
    assert calls == ["train", "val"] and os.listdir(tmp_path) == []
    monkeypatch.setattr(shapes, "_write_split", real)
    assert len(load(shapes.write_shapes(str(tmp_path), small), "val")) == 1


def test_processes_may_write_at_once(tmp_path):
    small = dataclasses.replace(SETTINGS, num_train=6, num_val=2)
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        jobs = [pool.apply_async(shapes.write_shapes, (str(tmp_path), small)) for _ in range(3)]
        folders = {job.get(timeout=120) for job in jobs}
    assert len(folders) == 1
    assert [os.path.join(tmp_path, n) for n in os.listdir(tmp_path)] == list(folders)


def test_impossible_settings_are_an_error(tmp_path):
    for changes, message in (
        ({"num_val": 0}, "num_val 0 must be at least 1"),
        ({"height": 16}, "image_size .16, 96. must be at least 32"),
    ):
        settings = dataclasses.replace(SETTINGS, **changes)
        with pytest.raises(ValueError, match=message):
            shapes.write_shapes(str(tmp_path), settings)


def test_pycocotools_reads_it_and_the_pictures_are_there(folder):
    coco = COCO(os.path.join(folder, "instances_train.json"))
    for i, record in coco.imgs.items():
        with Image.open(os.path.join(folder, "train", record["file_name"])) as image:
            assert image.size == (96, 64)
        for obj in coco.imgToAnns[i]:
            assert coco.annToMask(obj).sum() == obj["area"]


def test_from_a_config(tmp_path):
    config = quickstart.get_config()
    config.data.generated.root = str(tmp_path)
    config.data.generated.num_train, config.data.generated.num_val = 6, 2
    config.train.steps, config.train.batch_size = 2, 2
    train, val = build.load_datasets(config)
    batches = list(build.build_train_batches(config, train))
    assert [b["image"].shape for b in batches] == [(2, 128, 128, 3)] * 2
    assert len(val) == 2


def own_files(config):
    """A user's provider, as an import path names it."""
    folder = config.user.folder
    return (folder, "train.json"), (folder, "val.json")


def test_data_of_a_users_own_provider(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.data.providers.mine = 'test_generated:own_files'\n"
        "    config.data.name = 'mine'\n"
        "    config.user.folder = 'photos'\n"
        "    return config\n"
    )
    config = load_config(str(file))
    assert build.data_files(config) == (("photos", "train.json"), ("photos", "val.json"))
    save_config(config, tmp_path / "config.json")
    again = load_config(str(tmp_path / "config.json"), ["--config.user.folder=x"])
    assert build.data_files(again)[0] == ("x", "train.json")
    wrong = ["--config.data.providers.mine=nowhere:files"]
    with pytest.raises(ValueError, match="data.providers.mine: 'nowhere:files' cannot be imp"):
        build.data_files(load_config(str(file), wrong))
    with pytest.raises(ValueError, match="data.name = 'yours' must be one of '', a name in"):
        load_config(str(file), ["--config.data.name=yours"])


def test_a_config_from_before_the_providers_still_names_the_shapes(tmp_path):
    config = quickstart.get_config()
    values = config.to_dict()
    del values["data"]["providers"]
    values["data"]["generated"] |= {"num_train": 2, "num_val": 1, "root": str(tmp_path / "s")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (images, path), _ = build.data_files(load_config(str(tmp_path / "config.json")))
    assert len(load_coco(images, path)) == 2
